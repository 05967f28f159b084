"""Signals of a router: what its statistics say of each layer, and pooled.

Notation: p [T, E] probabilities of T tokens over E experts, k experts per token, q [E] share of assignments
that each expert receives, f [E] share of tokens whose most probable expert it is, H entropy in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from .signal_types import Noise, Ramp, Ramps, RouterSignal, unit_ramps
from .statistics import Statistics


def _of_maximum(maximum: Callable[[int, int], float], high: float, low: float, scale: float) -> Ramps:
    """Ramps in shares of the largest value that E and k allow (at least a tiny one: k = E)."""

    def ramps(experts: int, k: int) -> dict[str, Ramp]:
        top = max(maximum(experts, k), 1e-3)
        return {"high": (high * top, scale * top), "low": (low * top, scale * top)}

    return ramps


def _worst_cv(experts: int, k: int) -> float:
    return math.sqrt(max(experts / k - 1, 0.0))


def _cv(share: jax.Array) -> jax.Array:
    """Coefficient of variation over the last axis."""
    return share.std(-1) / share.mean(-1)


def _log(experts: int) -> float:
    """ln E; NaN for one expert, of which there is nothing to choose and nothing to judge."""
    return math.log(experts) if experts > 1 else math.nan


def _of_mean(value: jax.Array, tokens: jax.Array, experts: int, k: int) -> jax.Array:
    """The most that the mean of numbers in 0..1 can stray: their variance is at most m (1 - m) (Bhatia and
    Davis 2000, Amer. Math. Monthly 107)."""
    return jnp.sqrt(jnp.clip(value * (1 - value), 0.0, 0.25) / tokens)


def _of_loads(factor: Callable[[int, int], float]) -> Noise:
    """Multiples of the load_cv that even routing has by chance, sqrt((E - k) / (k N)): each of N tokens takes
    k of E experts, so that an expert's load is binomial."""

    def noise(value: jax.Array, tokens: jax.Array, experts: int, k: int) -> jax.Array:
        return factor(experts, k) * math.sqrt((experts - k) / k) / jnp.sqrt(tokens)

    return noise


def router_tokens(s: Statistics) -> jax.Array:
    """Tokens that the statistics of a step are means over."""
    return s["tokens"]


def router_entropy(s: Statistics) -> jax.Array:
    """Mean H(p_t) / ln E; 0..1."""
    return s["entropy"] / _log(s.experts)


def routing_confidence(s: Statistics) -> jax.Array:
    """Mean of the largest probability; 1/E..1."""
    return s["confidence"]


def routing_margin(s: Statistics) -> jax.Array:
    """Mean of the largest minus the second largest probability; 0..1."""
    return s["margin"]


def boundary_margin(s: Statistics) -> jax.Array:
    """Mean of the smallest selected minus the largest unselected probability; near 0 is fragile."""
    return s["boundary"]


def router_mutual_information(s: Statistics) -> jax.Array:
    """(H(mean p) - mean H(p)) / ln E, between token and expert; 0..1."""
    difference = entr(s["probability"]).sum(-1) - s["entropy"]
    return jnp.maximum(difference, 0.0) / _log(s.experts)  # rounding can make it negative


def load_cv(s: Statistics) -> jax.Array:
    """std(q) / mean(q); 0..sqrt(E/k - 1). Its sampling floor is about sqrt((E - 1) / assignments)."""
    return _cv(s["load"])


def load_cv_normalised(s: Statistics) -> jax.Array:
    """load_cv / sqrt(E/k - 1), 0 where k = E; 0..1."""
    assert s.k is not None
    worst = _worst_cv(s.experts, s.k)
    return _cv(s["load"]) / (worst or jnp.inf)


def load_cv_living(s: Statistics) -> jax.Array:
    """load_cv over the n experts that get a tenth of a fair share or more, / sqrt(n/k - 1); 0..1.

    One silent expert among others that share evenly was masked or broke; a router that collapses leaves its
    living experts uneven too.
    """
    assert s.k is not None
    load = s["load"]
    living = load >= 0.1 / s.experts
    count = living.sum(-1, dtype=load.dtype)
    mean = jnp.where(living, load, 0.0).sum(-1) / count
    square = jnp.where(living, jnp.square(load - mean[..., None]), 0.0).sum(-1) / count
    worst = jnp.sqrt(jnp.maximum(count / s.k - 1, 0.0))
    value = jnp.sqrt(square) / mean / jnp.where(worst > 0, worst, jnp.inf)
    return jnp.where(jnp.isfinite(load).all(-1), value, jnp.nan)


def expert_imbalance(s: Statistics) -> jax.Array:
    """std(f) over its maximum sqrt(E - 1) / E; 1 when one expert is everyone's first choice."""
    worst = math.sqrt(s.experts - 1) / s.experts
    spread = s["first"].std(-1)
    return spread / (worst or jnp.inf)


def max_violation(s: Statistics) -> jax.Array:
    """max(q) / mean(q) - 1, MaxVio of arXiv 2408.15664; 0..E/k - 1."""
    return s["load"].max(-1) / s["load"].mean(-1) - 1


def effective_experts(s: Statistics) -> jax.Array:
    """exp(H(q)), the number of equally loaded experts with the same entropy; 1..E."""
    return jnp.exp(entr(s["load"]).sum(-1))


def dead_expert_fraction(s: Statistics) -> jax.Array:
    """Share of experts whose mean q over the last 32 rows is below .1 / E; 0..1."""
    recent = s["recent_load"]
    dead = (recent < 0.1 / s.experts).mean(-1)
    return jnp.where(jnp.isfinite(recent).all(-1), dead, jnp.nan)


def load_gini(s: Statistics) -> jax.Array:
    """Gini coefficient of q; 0..1 - 1/E."""
    load = jnp.sort(s["load"], axis=-1)
    rank = 2 * jnp.arange(1, s.experts + 1) - s.experts - 1
    return (rank * load).sum(-1) / (s.experts * load.sum(-1))


def load_balancing_loss(s: Statistics) -> jax.Array:
    """E sum_e q_e P_e with P the mean probability (Switch Transformer, eq. 4); 1 at uniform."""
    return s.experts * (s["load"] * s["probability"]).sum(-1)


def expert_coactivation(s: Statistics) -> jax.Array:
    """Largest N_ij / N_i over pairs of experts i != j: how surely i brings j along; 0..1."""
    together = s["pairs"]
    used = jnp.diagonal(together, axis1=-2, axis2=-1)
    share = jnp.where(used[..., None] > 0, together / jnp.maximum(used[..., None], 1e-30), 0.0)
    share = jnp.where(jnp.isfinite(together), share, jnp.nan)
    return jnp.where(jnp.eye(s.experts, dtype=bool), 0.0, share).max((-2, -1))


def router_logit_rms(s: Statistics) -> jax.Array:
    """Root mean square of the logits."""
    return jnp.sqrt(s["logit_square"])


def router_z_loss(s: Statistics) -> jax.Array:
    """Mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return s["log_partition_square"]


def _router(
    function: Callable[..., jax.Array],
    needs: str,
    ramps: Ramps | None,
    units: str = "1",
    noise: Noise | None = None,
) -> RouterSignal:
    long_name = (function.__doc__ or "").split("\n")[0].rstrip(".")
    return RouterSignal(function, tuple(needs.split()), long_name, units, ramps, noise)


def _dead(experts: int, k: int) -> dict[str, Ramp]:
    return {"high": (0.5 / experts, 1 / experts), "low": (0.5 / experts, 1 / experts)}


def _confidence(experts: int, k: int) -> dict[str, Ramp]:
    return {"high": (0.35, 1.0), "low": (1 / experts + 0.1 * (1 - 1 / experts), 0.3)}


def _entropy(experts: int, k: int) -> dict[str, Ramp]:
    return {"high": (0.95, 0.2), "low": (0.6, 1.0)}


def _one(experts: int, k: int) -> float:
    return 1.0


def _of_first(experts: int, k: int) -> float:
    """expert_imbalance is the cv of first choices over sqrt(E - 1), k = 1 whatever k is."""
    return math.sqrt(k / max(experts - k, 1))


ROUTER_SIGNALS: dict[str, RouterSignal] = {
    "router_entropy": _router(router_entropy, "entropy", _entropy, noise=_of_mean),
    "routing_confidence": _router(routing_confidence, "confidence", _confidence, noise=_of_mean),
    "routing_margin": _router(routing_margin, "margin", unit_ramps(0.5, 0.1, 0.3), noise=_of_mean),
    "boundary_margin": _router(boundary_margin, "boundary", unit_ramps(0.2, 0.02, 0.2)),
    "router_mutual_information": _router(
        router_mutual_information, "probability entropy", unit_ramps(0.2, 0.08, 0.2), noise=_of_mean
    ),
    "load_cv": _router(load_cv, "load", _of_maximum(_worst_cv, 0.4, 0.2, 0.5), noise=_of_loads(_one)),
    "load_cv_normalised": _router(
        load_cv_normalised,
        "load",
        unit_ramps(0.4, 0.2, 0.5),
        noise=_of_loads(lambda e, k: 1 / max(_worst_cv(e, k), 1e-3)),
    ),
    "load_cv_living": _router(
        load_cv_living,
        "load",
        unit_ramps(0.4, 0.2, 0.5),
        noise=_of_loads(lambda e, k: 1 / max(_worst_cv(e, k), 1e-3)),
    ),
    "expert_imbalance": _router(expert_imbalance, "first", unit_ramps(0.2, 0.5), noise=_of_loads(_of_first)),
    "max_violation": _router(
        max_violation,
        "load",
        _of_maximum(lambda e, k: e / k - 1, 0.35, 0.15, 0.5),
        noise=_of_loads(lambda e, k: math.sqrt(2 * math.log(max(e, 2)))),  # of the largest of E
    ),
    "effective_experts": _router(
        effective_experts, "load", _of_maximum(lambda e, k: e, 0.95, 0.8, 0.5), "experts"
    ),
    "dead_expert_fraction": _router(dead_expert_fraction, "recent_load", _dead),
    "load_gini": _router(
        load_gini, "load", unit_ramps(0.35, 0.15, 0.5), noise=_of_loads(lambda e, k: 1 / math.sqrt(math.pi))
    ),
    "load_balancing_loss": _router(load_balancing_loss, "load probability", unit_ramps(1.5, 0.95, 0.5)),
    "expert_coactivation": _router(expert_coactivation, "pairs", unit_ramps(0.8, 0.4)),
    "router_logit_rms": _router(router_logit_rms, "logit_square", unit_ramps(8.0, 0.1, 8.0)),
    "router_z_loss": _router(router_z_loss, "log_partition_square", unit_ramps(50.0, 1.0, 50.0)),
    "router_tokens": _router(router_tokens, "tokens", None, "tokens"),
}
