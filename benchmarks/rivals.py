"""What people do without this package, to be compared with it: six rules or their scalars, step by step.

eager       the way of the tutorial: jax.numpy outside of jit, a float() for each number, rules in Python
device_get  the scalars are computed in the step and fetched after each
clu         the scalars are averaged in the step with `clu.metrics` and computed every 64 steps
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics

OFFSETS = {"confidence": 0.35, "decided": 0.4, "imbalance": 0.2, "growth": 0.5, "stable": 0.5, "falling": 0.4}
SLOPE, MARGIN = 12.0, 0.05


def scalars(loss: jax.Array, probs: jax.Array, params: Any) -> dict[str, jax.Array]:
    """Of probabilities [layers, tokens, experts]: confidence, entropy and imbalance by layer; two norms."""
    experts = probs.shape[-1]
    entropy = -(probs * jnp.log(probs + 1e-9)).sum(-1).mean(-1) / jnp.log(experts)
    usage = jax.nn.one_hot(probs.argmax(-1), experts).mean(-2)
    square = sum(jnp.square(leaf).sum() for leaf in jax.tree.leaves(params))
    return {
        "loss": loss,
        "confidence": probs.max(-1).mean(-1),
        "entropy": entropy,
        "imbalance": usage.std(-1),
        "weight_norm": jnp.sqrt(square),
    }


class Eager:
    """Six rules on intervals, evaluated by eager `jax.numpy` on all layers pooled."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._losses: list[float] = []
        self._norm = 0.0

    def __call__(self, loss: jax.Array, probs: jax.Array, params: Any) -> None:
        probs = probs.reshape(1, -1, probs.shape[-1])
        now = {name: float(value.mean()) for name, value in scalars(loss, probs, params).items()}
        self._losses = [*self._losses, now["loss"]][-11:]
        change = (self._losses[-1] - self._losses[0]) / 10
        grown, self._norm = float(now["weight_norm"] > self._norm), now["weight_norm"]
        read = {
            "confidence": now["confidence"],
            "decided": 1 - now["entropy"],
            "imbalance": now["imbalance"],
            "growth": grown,
            "stable": 1 - 10 * abs(change),
            "falling": float(change < 0),
        }
        is_ = {name: self._ramp(value, OFFSETS[name]) for name, value in read.items()}
        rules = {
            "expert_specialization": _both(is_["confidence"], is_["decided"]),
            "load_imbalance": _both(is_["imbalance"], is_["growth"]),
            "routing_stability": _both(is_["confidence"], is_["stable"]),
            "learning_progress": _both(is_["falling"], is_["decided"]),
            "underutilized_experts": _both(_not(is_["decided"]), _not(is_["confidence"])),
            "healthy_specialization": _both(is_["decided"], _not(is_["imbalance"])),
        }
        row = {f"{name}_{'LU'[i]}": float(truth[i]) for name, truth in rules.items() for i in range(2)}
        self.rows.append(now | row)

    @staticmethod
    def _ramp(value: float, offset: float) -> jax.Array:
        centre = SLOPE * (jnp.asarray(value) - offset)
        return jnp.stack([jax.nn.sigmoid(centre - SLOPE * MARGIN), jax.nn.sigmoid(centre + SLOPE * MARGIN)])


def _both(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.clip(a + b - 1, 0.0, 1.0)


def _not(a: jax.Array) -> jax.Array:
    return 1 - a[::-1]


NAMES = ("loss", "confidence", "entropy", "imbalance", "weight_norm")
# The scalars as averages over steps; those of the layers are averaged over layers too.
Averages = clu_metrics.Collection.create(**{name: clu_metrics.Average.from_output(name) for name in NAMES})
