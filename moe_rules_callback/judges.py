"""Signals to truth intervals: all predicates of an audit, evaluated together.

Each predicate reads one feature (a signal as it is, or what a window of it says) and has one ramp in
every layer, so that judging is one gather and one sigmoid, however many predicates there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from .predicates import Predicate
from .signals import TOKENS, Noise, Signal, WindowSignal, shipped
from .temporal import UNKNOWN
from .trends import Function, Lookbacks, rising, spike_score, steadiness

TRENDS: dict[str, Function] = {"increasing": rising, "decreasing": rising, "stable": steadiness}


class Judges:
    """Predicates over signals.

    Args:
        predicates: P of them.
        order: names of the signals, in the order of their rows.
        signals: what these names mean.
        sizes: (E, k) of each of the Y layers.
    """

    def __init__(
        self,
        predicates: Sequence[Predicate],
        order: Sequence[str],
        signals: Mapping[str, Signal],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        self._features = np.array([order.index(p.signal) for p in predicates], int)
        # What must be finite: of a window signal that below it, for it is NaN before it has filled.
        judged = {p.signal: signals[p.signal] for p in predicates}
        base = {name: s.needs[0] if isinstance(s, WindowSignal) else name for name, s in judged.items()}
        below = [base[p.signal] for p in predicates]
        self._sources = np.array([order.index(name) for name in below], int)
        trends: dict[tuple[Function, int, int], int] = {}
        ramp = np.zeros((3, len(predicates), len(sizes)), np.float32)
        for i, predicate in enumerate(predicates):
            signal = signals[predicate.signal]
            look = looks_back(predicate, signal)
            if look is not None:
                key = (*look, int(self._features[i]))
                self._features[i] = len(order) + trends.setdefault(key, len(trends))
            for layer, size in enumerate(sizes):
                ramp[:, i, layer] = ramp_of(predicate, signal, *size)
        self._slope, self._offset, self._margin = ramp
        self._trends = Lookbacks(list(trends))
        self._noisy = [] if TOKENS not in order else _noisy(predicates, signals, sizes)
        self._tokens = order.index(TOKENS) if self._noisy else -1

    def init(self, layers: int) -> tuple[jax.Array, ...]:
        """State before the first row."""
        return self._trends.init(layers)

    def update(
        self, state: tuple[jax.Array, ...], signals: jax.Array, row: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
        """Take in the signals [signals, Y] of a row.

        Returns:
            The new state; truth intervals float32 [P, Y, 2], [0, 1] where a feature is not known; and
            bool [P, Y], whether what is under a predicate is not finite in this row.
        """
        state, trends = self._trends.update(state, signals, row)
        x = jnp.concatenate([signals, trends])[self._features]
        centre = self._slope * (x - self._offset)
        width = np.abs(self._slope) * (self._margin + self._sampling(x, signals))
        truth = jax.nn.sigmoid(jnp.stack([centre - width, centre + width], axis=-1))
        truth = jnp.where(jnp.isfinite(x)[..., None], truth, UNKNOWN)
        return state, truth, ~jnp.isfinite(signals[self._sources])

    def _sampling(self, x: jax.Array, signals: jax.Array) -> jax.Array | float:
        """Half widths that sampling noise adds, [P, Y]."""
        if not self._noisy:
            return 0.0
        widths = jnp.zeros_like(x)
        for noise, (experts, k), errors, layers in self._noisy:
            tokens = jnp.maximum(signals[self._tokens, layers], 1.0)
            predicates = np.flatnonzero(errors)[:, None]
            value = noise(x[predicates, layers], tokens, experts, k)
            widths = widths.at[predicates, layers].set(errors[predicates] * value)
        return widths


def _noisy(
    predicates: Sequence[Predicate], signals: Mapping[str, Signal], sizes: Sequence[tuple[int, int]]
) -> list[tuple[Noise, tuple[int, int], np.ndarray, np.ndarray]]:
    """For each formula of noise and each (E, k): the standard errors that predicates ask for, [P], and the
    layers of that size."""
    errors: dict[Noise, np.ndarray] = {}
    for i, predicate in enumerate(predicates):
        noise = signals[predicate.signal].noise
        if predicate.sampling and noise is not None and predicate.sense in ("high", "low"):
            errors.setdefault(noise, np.zeros(len(predicates), np.float32))[i] = predicate.sampling
    layers = {size: np.flatnonzero([size == each for each in sizes]) for size in sizes}
    return [(noise, size, each, layers[size]) for noise, each in errors.items() for size in layers]


def explicit(predicate: Predicate, signal: Signal, experts: int, k: int) -> Predicate:
    """The predicate with the ramp of a plugin's signal written out, for when the plugin is not there."""
    if predicate.offset is not None or predicate.sense in TRENDS or signal.ramps is None:
        return predicate
    if predicate.signal in shipped():
        return predicate
    slope, offset, margin = ramp_of(predicate, signal, experts, k)
    return replace(predicate, slope=abs(slope), offset=offset, margin=margin)


def _by_history(predicate: Predicate, signal: Signal) -> bool:
    """Whether a signal is judged by its own rolling history."""
    return predicate.sense in ("high", "low") and predicate.offset is None and signal.ramps is None


def looks_back(predicate: Predicate, signal: Signal) -> tuple[Function, int] | None:
    """What a predicate looks back with, and how many rows; None: it reads the signal as it is."""
    if predicate.sense in TRENDS:
        return TRENDS[predicate.sense], predicate.window
    return (spike_score, predicate.window + 1) if _by_history(predicate, signal) else None


def ramp_of(predicate: Predicate, signal: Signal, experts: int, k: int) -> tuple[float, float, float]:
    """Slope (negative where truth falls), offset and margin of a predicate in a layer."""
    sense, slope, margin = predicate.sense, predicate.slope, predicate.margin
    if sense in TRENDS:
        offset = 0.5 if predicate.offset is None else predicate.offset
        # The degree of falling is 1 - the degree of rising.
        return (-slope, 1 - offset, margin) if sense == "decreasing" else (slope, offset, margin)
    sign = -1.0 if sense == "low" else 1.0
    if predicate.offset is not None:
        return sign * slope, predicate.offset, margin
    # 3 standard deviations, on a range of 6; or the signal's own offset, on its own range.
    offset, scale = (3.0 * sign, 6.0) if signal.ramps is None else signal.ramps(experts, k)[sense]
    return sign * slope / scale, offset, margin * scale
