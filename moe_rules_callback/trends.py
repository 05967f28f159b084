"""What a window of rows says: trends against their own noise, and scores against the recent past.

Rows are [window, channels] in the order of a ring, with `age` [window]: 0 for the newest row, window - 1 for
the oldest. Rows that are not finite are left out. `Lookbacks` keeps the windows of a running audit in rings;
until a window has filled its results are NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr

from .rings import put

Function = Callable[[jax.Array, jax.Array], jax.Array]
Place = tuple[int, int]
TINY = 1e-30
SHIFTED = 8  # newest rows whose level is compared with those before
NOISE = 2.0  # standard errors within which a slope is none
ROUNDING = 1e-6  # relative size of a difference between float32 values that means nothing


class Line(NamedTuple):
    """Slope per row, its standard error, and the mean of the rows; each [c]."""

    slope: jax.Array
    error: jax.Array
    mean: jax.Array


def line(rows: jax.Array, age: jax.Array) -> Line:
    """Least-squares line through the finite rows.

    The standard error counts rows that resemble their neighbours as fewer (n (1 - r) / (1 + r) of them,
    r the lag-1 autocorrelation of the residuals: Santer et al. 2000, J. Geophys. Res. 105, section 4). It
    has a floor where the rows differ by no more than float32 rounding, so that a constant has no trend.
    NaN with fewer than three finite rows, or where squares of the rows overflow.
    """
    finite = jnp.isfinite(rows)
    weight = finite.astype(rows.dtype)
    count = weight.sum(0)
    y = jnp.where(finite, rows, 0.0)
    mean = y.sum(0) / count
    x = -age.astype(rows.dtype)[:, None]
    x = weight * (x - (weight * x).sum(0) / count)
    y = weight * (y - mean)
    spread = jnp.square(x).sum(0)
    slope = (x * y).sum(0) / spread
    residual = weight * (y - slope * x)
    squares = jnp.square(residual).sum(0)
    # Rows stand in the order of a ring: each after the one before it, except the oldest.
    before = jnp.where((age == rows.shape[0] - 1)[:, None], 0.0, jnp.roll(residual, 1, axis=0))
    r = jnp.clip((residual * before).sum(0) / (squares + TINY), 0.0, 0.95)
    variance = squares / (count - 2) * (1 + r) / (1 - r) + jnp.square(ROUNDING * mean) + TINY
    error = jnp.sqrt(variance / spread)
    enough = (count >= 3) & jnp.isfinite(error)
    return Line(jnp.where(enough, slope, jnp.nan), error, mean)


@dataclass(frozen=True)
class OfLine:
    """A function of the line through the rows; those over the same window share its fit."""

    read: Callable[[Line, int], jax.Array]

    def __call__(self, rows: jax.Array, age: jax.Array) -> jax.Array:
        return self.read(line(rows, age), len(rows))


def _rising(fit: Line, rows: int) -> jax.Array:
    z = fit.slope / fit.error
    return ndtr(jnp.sign(z) * jnp.maximum(jnp.abs(z) - NOISE, 0.0))


def _steadiness(fit: Line, rows: int) -> jax.Array:
    change = jnp.abs(fit.slope) * (rows - 1) / (jnp.abs(fit.mean) + TINY)
    return jnp.where(jnp.isnan(change), jnp.nan, jnp.maximum(1 - 10 * change, 0.0))


# Confidence in 0..1 that the rows rise; .5 while the slope is within 2 standard errors of 0. Beyond,
# Phi(|z| - 2) with the sign of z = slope / standard error: noise has no trend.
rising = OfLine(_rising)
# 1 - 10 |relative change over the window| of the fitted line, at least 0: 10 % is not stable.
steadiness = OfLine(_steadiness)


def spike_score(rows: jax.Array, age: jax.Array) -> jax.Array:
    """(newest - mean) / std of the finite rows before it; OLMo alarms at 6 (arXiv 2402.00838)."""
    newest = jnp.where((age == 0)[:, None], rows, 0.0).sum(0)
    past = jnp.isfinite(rows) & (age > 0)[:, None]
    count = past.sum(0)
    mean = jnp.where(past, rows, 0.0).sum(0) / count
    variance = jnp.where(past, jnp.square(rows - mean), 0.0).sum(0) / (count - 1)
    score = (newest - mean) / jnp.sqrt(variance + jnp.square(ROUNDING * mean) + TINY)
    return jnp.where((count >= 3) & jnp.isfinite(variance), score, jnp.nan)


def level_shift(rows: jax.Array, age: jax.Array) -> jax.Array:
    """By how many standard errors the mean of the newest 8 rows misses the line through the rows before.

    The error is that of a prediction from a least-squares line: s sqrt(1 / m + 1 / n + d^2 / S), s the
    residual standard deviation of the n older rows, S the spread of their positions, d the distance of the m
    newest from their centre. A loss that falls steadily has no shift.
    """
    newest = (age < SHIFTED)[:, None] & jnp.isfinite(rows)
    older = jnp.where((age < SHIFTED)[:, None], jnp.nan, rows)
    finite = jnp.isfinite(older)
    n, m = finite.sum(0, dtype=rows.dtype), newest.sum(0, dtype=rows.dtype)
    x = -age.astype(rows.dtype)[:, None]
    centre = jnp.where(finite, x, 0.0).sum(0) / n
    away = jnp.where(finite, x - centre, 0.0)
    spread = jnp.square(away).sum(0)
    mean = jnp.where(finite, older, 0.0).sum(0) / n
    difference = jnp.where(finite, older - mean, 0.0)
    slope = (away * difference).sum(0) / spread
    variance = jnp.square(difference - slope * away).sum(0) / (n - 2)
    distance = jnp.where(newest, x, 0.0).sum(0) / m - centre
    miss = jnp.where(newest, rows, 0.0).sum(0) / m - mean - slope * distance
    error = variance * (1 / m + 1 / n + jnp.square(distance) / spread) + jnp.square(ROUNDING * mean) + TINY
    return jnp.where((n >= 3) & (m > 0) & jnp.isfinite(error), miss / jnp.sqrt(error), jnp.nan)


def resistant_slope(rows: jax.Array, age: jax.Array) -> jax.Array:
    """Median of the newer half minus median of the older half, over their distance in rows.

    The slope of Brown and Mood (1951): single spikes do not move it.
    """
    half = rows.shape[0] // 2
    newer = (age < half)[:, None]
    late = jnp.nanmedian(jnp.where(newer, rows, jnp.nan), axis=0)
    early = jnp.nanmedian(jnp.where(newer, jnp.nan, rows), axis=0)
    return (late - early) / (rows.shape[0] / 2)


class Lookbacks:
    """Functions of the last rows of some channels, all rings of one length kept together.

    Args:
        wanted: (function, window, channel): function(rows [window, c], age [window]) -> [c] as above.
    """

    def __init__(self, wanted: Sequence[tuple[Function, int, int]]) -> None:
        self._rings: dict[int, list[int]] = {}  # window -> channels that it keeps
        # (what is fitted, window) -> columns of the ring that it is fitted to, and the functions that read
        # it: for each of their results the number of its column and its position among all results.
        self._fits: dict[tuple[Callable[..., Any], int], tuple[list[int], dict[Function, list[Place]]]] = {}
        for position, (function, window, channel) in enumerate(wanted):
            kept = self._rings.setdefault(window, [])
            if channel not in kept:
                kept.append(channel)
            fit = line if isinstance(function, OfLine) else function
            columns, reads = self._fits.setdefault((fit, window), ([], {}))
            if (column := kept.index(channel)) not in columns:
                columns.append(column)
            reads.setdefault(function, []).append((columns.index(column), position))
        places = [place for _, reads in self._fits.values() for read in reads.values() for place in read]
        self._back = np.argsort([position for _, position in places])

    def init(self, layers: int) -> tuple[jax.Array, ...]:
        """Rings [window, channels, layers], NaN where no row has been."""
        return tuple(
            jnp.full((window, len(kept), layers), jnp.nan, jnp.float32)
            for window, kept in self._rings.items()
        )

    def update(
        self, rings: tuple[jax.Array, ...], channels: jax.Array, row: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Take in channels [all channels, layers]; the new rings and results [wanted, layers]."""
        new: dict[int, jax.Array] = {}
        for ring, (window, kept) in zip(rings, self._rings.items(), strict=True):
            new[window] = put(ring, channels[np.array(kept)], row % window)
        results = [jnp.zeros((0, channels.shape[1]), jnp.float32)]
        for (fit, window), (columns, reads) in self._fits.items():
            rows = new[window][:, np.array(columns)]
            age = (row - np.arange(window)) % window
            fitted = fit(rows.reshape(window, -1), age)
            for function, read in reads.items():
                value = function.read(fitted, window) if isinstance(function, OfLine) else fitted
                value = value.reshape(rows.shape[1:])[np.array([number for number, _ in read])]
                results.append(jnp.where(row + 1 >= window, value, jnp.nan))
        return tuple(new.values()), jnp.concatenate(results)[self._back]
