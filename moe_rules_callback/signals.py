"""Signals: the named scalars that predicates judge.

A signal is computed from one of five sources:

    RouterSignal   a router's statistics, by layer and pooled:   load_cv = std(q) / mean(q)
    WindowSignal   the last rows of another signal:              loss_spike_score over 128 rows of loss
    Signal         the metrics of the step:                      weight_norm from params
    scalar(name)   a scalar that the step passes:                loss, learning_rate, ..
    recorded(name) a history, when it is judged again

`ROUTER_SIGNALS` (in `router_signals`), `MODEL_SIGNALS` and `WINDOW_SIGNALS` list the shipped ones; plugins
add theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from . import trees
from .checks import real
from .errors import MissingSignalError
from .metrics import expert_counts
from .router_signals import ROUTER_SIGNALS
from .signal_types import Noise as Noise
from .signal_types import Ramp, Ramps, RecordedSignal, Signal, WindowSignal, unit_ramps
from .signal_types import RouterSignal as RouterSignal
from .trends import level_shift, resistant_slope, spike_score

TOKENS = "router_tokens"
FAINT = 1e-15  # norm of gradients whose parts may have vanished when they were squared


def _norm(metrics: Mapping[str, Any], key: str) -> jax.Array:
    if not trees.leaves(metrics[key]):
        raise MissingSignalError(f"'{key}' holds no floating-point array, which a norm could be of.")
    return trees.norm(metrics[key])


def _router_share(metrics: Mapping[str, Any]) -> jax.Array:
    """NaN where squares of the gradients are too small for float32: of nothing, routers have no share."""
    share = trees.router_share(metrics["grads"])
    return jnp.where(trees.norm(metrics["grads"]) > FAINT, share, jnp.nan)


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
        ramps=unit_ramps(1.5, 0.6, 0.5),
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
        ramps=unit_ramps(0.5, 0.02, 0.05),
    ),
    "expert_weight_cosine": Signal(
        lambda m: trees.expert_cosine(m["params"], expert_counts(m)),
        ("params",),
        long_name="Mean pairwise cosine of the experts' kernels in a layer, worst layer",
        ramps=unit_ramps(0.3, 0.1, 0.4),
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
        ramps=unit_ramps(6.0, -6.0, 4.0),
        rows=129,
    ),
    "loss_shift": WindowSignal(
        level_shift,
        ("loss",),
        "Standard errors of the mean loss of 8 rows above the line through the 56 before",
        ramps=unit_ramps(5.0, -5.0, 4.0),
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
    "dropped_token_fraction": unit_ramps(0.03, 0.01, 0.05),
    "routing_flip_rate": _flips,
    "router_noise_repetition": unit_ramps(0.5, 0.25, 0.5),
    "router_precision_disagreement": unit_ramps(0.0003, 0.0001, 0.0005),
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
