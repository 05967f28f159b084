"""Router metrics that were reduced before they reach the audit.

    {"expert_load": [E]}                              the share of assignments that each expert received
    {"router_probs": [Summary(..)]}                   statistics that a watched function delivers
    {"recorded": Recorded({"router_entropy": [..]})}  signals that a history holds

They pass for the probabilities as far as they go: a signal over something that is not there is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from .errors import MetricsError
from .metrics import layers_of, natural, stacked_names

_PLACES = ("router_probs", "router_logits", "expert_load")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Summary:
    """Statistics of n layers in the place of their probabilities.

    Attributes:
        names, experts, k: see `Routers`.
        tokens: float32 [n], tokens that each layer saw.
        values: statistic -> float32 [n, ..], mean over those tokens.
    """

    names: tuple[str, ...] = field(metadata={"static": True})
    experts: int = field(metadata={"static": True})
    k: int | None = field(metadata={"static": True})
    tokens: Any
    values: dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Recorded:
    """Signals by layer as they were computed before: name -> float32 [layers + 1], the pooled value last."""

    values: dict[str, Any]


def summaries(metrics: Mapping[str, Any], top_k: int | None, layer_axis: int | None) -> list[Summary]:
    """The summaries that were passed in the place of router metrics, if any.

    Raises:
        MetricsError: loads of experts that are none, or without the number of experts that a token uses.
    """
    given = next((metrics[key] for key in _PLACES if key in metrics), None)
    if isinstance(given, list) and given and isinstance(given[0], Summary):
        return sorted(given, key=lambda summary: natural(summary.names[0]))
    if "expert_load" not in metrics or {"router_probs", "router_logits"} & metrics.keys():
        return []
    layers = layers_of(metrics["expert_load"], "expert_load")
    return [_of_load(name, layers[name], top_k, layer_axis) for name in sorted(layers, key=natural)]


def _of_load(name: str, load: Any, k: int | None, layer_axis: int | None) -> Summary:
    load = jnp.asarray(load, jnp.float32)
    if load.ndim != (1 if layer_axis is None else 2):
        stacked = "" if layer_axis is None else f" with the layers on axis {layer_axis}"
        raise MetricsError(
            f"expert_load of {name} has shape {load.shape}; expected [experts]{stacked}: how much of the "
            f"work each expert did. Average over tokens and devices first."
        )
    if layer_axis not in (None, 0, -2):
        raise MetricsError(
            f"layer_axis={layer_axis} does not count layers in expert_load of {name}, shape {load.shape}: "
            f"its last axis counts experts, so that they are on axis 0."
        )
    load = load[None] if layer_axis is None else load
    n, experts = load.shape
    if k is None or not 1 <= k <= experts:
        raise MetricsError(
            f"top_k is {k} for the {experts} experts of {name}. What loads mean depends on how many experts "
            f"a token uses: pass top_k=1, 2, .."
        )
    total = load.sum(-1, keepdims=True)
    sound = (load.min(-1, keepdims=True) >= 0) & (total > 0) & (total < jnp.inf)
    share = load / jnp.where(sound, total, jnp.nan)
    values = {"load": share} | ({"first": share} if k == 1 else {})
    names = (name,) if layer_axis is None else stacked_names(name, n)
    return Summary(names, experts, k, jnp.ones(n, jnp.float32), values)
