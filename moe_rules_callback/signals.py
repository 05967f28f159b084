"""Signals: the named scalars that predicates judge.

A signal is computed from one of five sources:

    RouterSignal   a router's statistics, by layer and pooled:   load_cv = std(q) / mean(q)
    WindowSignal   the last rows of another signal:              loss_spike_score over 128 rows of loss
    Signal         the metrics of the step:                      weight_norm from params
    scalar(name)   a scalar that the step passes:                loss, learning_rate, ..
    recorded(name) a history, when it is judged again

`ROUTER_SIGNALS`, `MODEL_SIGNALS` and `WINDOW_SIGNALS` list the shipped ones; plugins add theirs.
Notation: p [T, E] probabilities of T tokens over E experts, k experts per token, q [E] share of
assignments that each expert receives, f [E] share of tokens whose most probable expert it is, H entropy
in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import entr

from . import trees
from .checks import real
from .errors import MissingSignalError
from .metrics import expert_counts
from .statistics import NEED_K, NEED_LOGITS, Statistics
from .trends import level_shift, resistant_slope, spike_score

Ramp = tuple[float, float]  # offset, scale: truth .5 at the offset, certain half a scale away
Ramps = Callable[[int, int], Mapping[str, Ramp]]  # of (E, k): ramps for "high" and "low"
Noise = Callable[[jax.Array, jax.Array, int, int], jax.Array]  # (value, tokens, E, k) -> standard error
TOKENS = "router_tokens"
FAINT = 1e-15  # norm of gradients whose parts may have vanished when they were squared


@dataclass(frozen=True)
class Signal:
    """A named scalar of a step.

    Attributes:
        compute: the metrics of the step -> scalar.
        needs: the metrics that it reads; "*" for all.
        long_name, units: for histories and plots.
        ramps: where `high_` and `low_` turn, by (E, k); None: judged by its own rolling history.
        noise: standard error of the value because it is measured on so many tokens; None: not known.
    """

    compute: Callable[..., jax.Array]
    needs: tuple[str, ...]
    long_name: str = ""
    units: str = "1"
    ramps: Ramps | None = None
    noise: Noise | None = None

    def missing(self, metrics: frozenset[str], k_known: bool) -> str:
        """What to pass so that the signal can be computed, or "" when it can."""
        return ", ".join(f"'{need}'" for need in self.needs if need not in metrics | {"*"})


@dataclass(frozen=True)
class RouterSignal(Signal):
    """A signal of each layer: `compute` is given `Statistics`, and gives float32 [layers + 1], the pooled
    value last; `needs` names the statistics."""

    def missing(self, metrics: frozenset[str], k_known: bool) -> str:
        if not metrics & {"router_probs", "router_logits"}:
            return "'router_probs' (or 'router_logits')"
        if NEED_LOGITS & set(self.needs) and "router_logits" not in metrics:
            return "'router_logits'"
        if NEED_K & set(self.needs) and not k_known:
            return "'expert_index' or top_k="
        return ""


@dataclass(frozen=True)
class WindowSignal(Signal):
    """What the last `rows` of one other signal say, the current row included: `compute` is one of `trends`,
    `needs` holds that signal's name."""

    rows: int = 32


@dataclass(frozen=True)
class RecordedSignal(Signal):
    """A signal of each layer that was computed before: `compute` gives float32 [layers + 1]."""


def _unit(high: float, low: float, scale: float = 1.0) -> Ramps:
    return lambda experts, k: {"high": (high, scale), "low": (low, scale)}


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


def _norm(metrics: Mapping[str, Any], key: str) -> jax.Array:
    if not trees.leaves(metrics[key]):
        raise MissingSignalError(f"'{key}' holds no floating-point array, which a norm could be of.")
    return trees.norm(metrics[key])


def _router_share(metrics: Mapping[str, Any]) -> jax.Array:
    """NaN where squares of the gradients are too small for float32: of nothing, routers have no share."""
    share = trees.router_share(metrics["grads"])
    return jnp.where(trees.norm(metrics["grads"]) > FAINT, share, jnp.nan)


ROUTER_SIGNALS: dict[str, RouterSignal] = {
    "router_entropy": _router(router_entropy, "entropy", _entropy, noise=_of_mean),
    "routing_confidence": _router(routing_confidence, "confidence", _confidence, noise=_of_mean),
    "routing_margin": _router(routing_margin, "margin", _unit(0.5, 0.1, 0.3), noise=_of_mean),
    "boundary_margin": _router(boundary_margin, "boundary", _unit(0.2, 0.02, 0.2)),
    "router_mutual_information": _router(
        router_mutual_information, "probability entropy", _unit(0.2, 0.08, 0.2), noise=_of_mean
    ),
    "load_cv": _router(load_cv, "load", _of_maximum(_worst_cv, 0.4, 0.2, 0.5), noise=_of_loads(_one)),
    "load_cv_normalised": _router(
        load_cv_normalised,
        "load",
        _unit(0.4, 0.2, 0.5),
        noise=_of_loads(lambda e, k: 1 / max(_worst_cv(e, k), 1e-3)),
    ),
    "load_cv_living": _router(
        load_cv_living,
        "load",
        _unit(0.4, 0.2, 0.5),
        noise=_of_loads(lambda e, k: 1 / max(_worst_cv(e, k), 1e-3)),
    ),
    "expert_imbalance": _router(expert_imbalance, "first", _unit(0.2, 0.5), noise=_of_loads(_of_first)),
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
        load_gini, "load", _unit(0.35, 0.15, 0.5), noise=_of_loads(lambda e, k: 1 / math.sqrt(math.pi))
    ),
    "load_balancing_loss": _router(load_balancing_loss, "load probability", _unit(1.5, 0.95, 0.5)),
    "expert_coactivation": _router(expert_coactivation, "pairs", _unit(0.8, 0.4)),
    "router_logit_rms": _router(router_logit_rms, "logit_square", _unit(8.0, 0.1, 8.0)),
    "router_z_loss": _router(router_z_loss, "log_partition_square", _unit(50.0, 1.0, 50.0)),
    "router_tokens": _router(router_tokens, "tokens", None, "tokens"),
}

MODEL_SIGNALS: dict[str, Signal] = {
    "weight_norm": Signal(
        lambda m: _norm(m, "params"), ("params",), long_name="Euclidean norm of all parameters"
    ),
    "gradient_norm": Signal(
        lambda m: _norm(m, "grads"), ("grads",), long_name="Euclidean norm of all gradients"
    ),
    "generalisation_ratio": Signal(
        lambda m: jnp.asarray(real(m["validation_loss"], "validation_loss")) / real(m["loss"], "loss"),
        ("validation_loss", "loss"),
        long_name="Validation loss over training loss",
        ramps=_unit(1.5, 0.6, 0.5),
    ),
    "router_gradient_share": Signal(
        _router_share,
        ("grads",),
        long_name="Norm of the routers' gradients over the norm of all gradients",
        ramps=lambda experts, k: {"high": (0.4, 0.5), "low": (0.01, 0.02)},
    ),
    "expert_gradient_min_share": Signal(
        lambda m: trees.expert_min_share(m["grads"], expert_counts(m)),
        ("grads",),
        long_name="Smallest over largest gradient norm among the experts of a layer, worst layer",
        ramps=_unit(0.5, 0.02, 0.05),
    ),
    "expert_weight_cosine": Signal(
        lambda m: trees.expert_cosine(m["params"], expert_counts(m)),
        ("params",),
        long_name="Mean pairwise cosine of the experts' kernels in a layer, worst layer",
        ramps=_unit(0.3, 0.1, 0.4),
    ),
}

WINDOW_SIGNALS: dict[str, WindowSignal] = {
    "loss_slope": WindowSignal(
        resistant_slope, ("loss",), "Resistant slope of the loss over 32 rows", "1/row", rows=32
    ),
    "loss_spike_score": WindowSignal(
        spike_score,
        ("loss",),
        "Standard deviations of the loss above its mean over the 128 rows before",
        ramps=_unit(6.0, -6.0, 4.0),
        rows=129,
    ),
    "loss_shift": WindowSignal(
        level_shift,
        ("loss",),
        "Standard errors of the mean loss of 8 rows above the line through the 56 before",
        ramps=_unit(5.0, -5.0, 4.0),
        rows=64,
    ),
}


def _flips(experts: int, k: int) -> dict[str, Ramp]:
    chance = 1 - k / experts
    return {"high": (0.5 * chance, 0.5 * chance + 1e-3), "low": (0.01, 0.02)}


def _saturation(experts: int, k: int) -> dict[str, Ramp]:
    chance = k / experts
    return {"high": (0.8, 0.4), "low": (chance + 0.2 * (1 - chance), 0.3)}


# Scalars that the trainer passes: ramps, and long names where the name does not say it.
SCALAR_RAMPS: dict[str, Ramps] = {
    "dropped_token_fraction": _unit(0.03, 0.01, 0.05),
    "routing_flip_rate": _flips,
    "router_noise_repetition": _unit(0.5, 0.25, 0.5),
    "router_precision_disagreement": _unit(0.0003, 0.0001, 0.0005),
    "router_saturation": _saturation,
}
SCALAR_NAMES: dict[str, str] = {
    "routing_flip_rate": "Share of chosen experts that the last probe did not choose, worst layer",
    "router_noise_repetition": "Correlation of the router's noise with that of the last probe",
    "router_precision_disagreement": "Share of chosen experts that float32 does not choose, worst layer",
    "router_saturation": "Share of chosen experts that the reference chose too, worst layer",
    "router_probe_age": "Steps since the probe that its scalars are from",
}


def shipped() -> dict[str, Signal]:
    """All signals of this package, by name."""
    return ROUTER_SIGNALS | MODEL_SIGNALS | WINDOW_SIGNALS


def scalar(name: str) -> Signal:
    """The signal that is a scalar of the step itself; under a shipped signal's name it means the same."""

    def given(metrics: Mapping[str, Any]) -> jax.Array:
        return jnp.asarray(real(metrics[name], name))

    if (same := shipped().get(name)) is not None:
        return Signal(given, (name,), same.long_name, same.units, same.ramps, same.noise)
    units = "nat" if name == "loss" else "1"
    long_name = SCALAR_NAMES.get(name, name.replace("_", " "))
    return Signal(given, (name,), long_name, units, SCALAR_RAMPS.get(name))


def recorded(name: str) -> RecordedSignal:
    """The signal that a history holds for every layer; under a shipped signal's name it means the same."""
    same = scalar(name)
    return RecordedSignal(
        lambda metrics: metrics["recorded"].values[name],
        ("recorded",),
        same.long_name,
        same.units,
        same.ramps,
        same.noise,
    )
