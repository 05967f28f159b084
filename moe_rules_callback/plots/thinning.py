"""Few points for many rows, without hiding any: minimum, mean and maximum of equal parts of the run.

    thinned = thin(step, history["expert_share"])       # read block by block, whatever its size
    axes.plot(thinned.at, thinned.mean)
    axes.fill_between(thinned.at, thinned.low, thinned.high)

A run of up to twice as many rows as there are parts is left as it is: each row is a part of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HistoryError

if TYPE_CHECKING:
    import xarray as xr

BINS = 400  # points of a line in a long run: dashes stay dashes
BLOCK = 2**24  # values that are read at once
SMOOTH = 30  # rows of a rolling mean


@dataclass(frozen=True)
class Thinned:
    """n parts of a run, of values [rows, ..].

    Attributes:
        at: first step of each part, [n].
        edges: where the parts begin, and where the last one ends, [n + 1].
        low, mean, high: of the finite values of each part, [n, ..]; NaN where there are none.
        count: how many finite values each part has, [n, ..].
        rows: rows of the longest part; 1 if nothing was thinned.
    """

    at: np.ndarray
    edges: np.ndarray
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray
    count: np.ndarray
    rows: int

    @property
    def overall(self) -> np.ndarray:
        """Mean of all finite values of the run, [..]; NaN where there are none."""
        count = self.count.sum(axis=0)
        total = (np.nan_to_num(self.mean) * self.count).sum(axis=0)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def of(self, *index: Any) -> Thinned:
        """These of the values: `index` is that of the axes behind the first."""
        picked = {name: getattr(self, name)[:, *index] for name in ("low", "mean", "high", "count")}
        return replace(self, **picked)


def rows_of(history: xr.Dataset) -> xr.Dataset:
    """The history with its rows in the order of their steps.

    Raises:
        HistoryError: it has no rows.
    """
    step = history["step"].values
    if len(step) == 0:
        raise HistoryError(
            "There is nothing to draw: the history has no rows. Rows arrive with the first flush; in a "
            "run that goes on, call flush() on the callback first."
        )
    return history if (np.diff(step) >= 0).all() else history.isel(step=np.argsort(step, kind="stable"))


def thin(step: np.ndarray, values: np.ndarray | xr.DataArray, bins: int = BINS) -> Thinned:
    """Parts of `values` [rows, ..], whose rising steps are `step` [rows]; at most `bins` if there are many.

    A single row becomes two points, half a step to either side: a point has no line.
    """
    if len(step) == 1:
        single, at = np.asarray(values), step[0] + np.array([-0.5, 0.5])
        edges = step[0] + np.array([-0.5, 0, 0.5])
        return _reduce(at, edges, np.concatenate([single, single]), np.arange(2))
    starts = np.arange(len(step))
    if len(step) > 2 * bins:
        starts = np.unique(np.searchsorted(step, np.linspace(step[0], step[-1], bins, endpoint=False)))
    at = step[starts]
    return _reduce(at, np.append(at, step[-1] + np.median(np.diff(step))), values, starts)


def _reduce(
    at: np.ndarray, edges: np.ndarray, values: np.ndarray | xr.DataArray, starts: np.ndarray
) -> Thinned:
    shape, ends = (len(starts), *values.shape[1:]), np.append(starts[1:], len(values))
    low, mean, high = (
        np.full(shape, np.nan, np.float32 if values.dtype == np.float32 else float) for _ in "123"
    )
    count = np.zeros(shape, np.int32)
    room, first = max(1, BLOCK // max(1, int(np.prod(shape[1:])))), 0
    while first < len(starts):  # as many whole parts as fit, at least one
        last = max(first + 1, int(np.searchsorted(ends, starts[first] + room, side="right")))
        part, block = slice(first, last), np.asarray(values[starts[first] : ends[last - 1]])
        inside, finite = starts[part] - starts[first], np.isfinite(block)
        known = np.where(finite, block, np.nan)
        low[part], high[part] = np.fmin.reduceat(known, inside), np.fmax.reduceat(known, inside)
        count[part] = np.add.reduceat(finite, inside, dtype=np.int32)
        sums = np.add.reduceat(np.where(finite, block, 0), inside, dtype=float)
        mean[part] = np.where(count[part] > 0, sums / np.maximum(count[part], 1), np.nan)
        first = last
    return Thinned(at, edges, low, mean, high, count, int((ends - starts).max()))


def rolling_mean(values: np.ndarray, rows: int) -> tuple[np.ndarray, str]:
    """Mean of the finite values among the `rows` around each, at most a tenth of all, and a note of it.

    Centred, so that a curve stands where its data do. NaN stays where a value is not finite.
    """
    window = min(rows, len(values) // 10)
    if window < 2:
        return values, "every row"
    finite = np.isfinite(values)
    ends = np.arange(len(values)) + (window + 1) // 2
    begin, end = np.maximum(ends - window, 0), np.minimum(ends, len(values))
    sums, counts = (
        np.concatenate([[0], np.cumsum(x, dtype=float)]) for x in (np.where(finite, values, 0.0), finite)
    )
    means = (sums[end] - sums[begin]) / np.maximum(counts[end] - counts[begin], 1)
    return np.where(finite, means, np.nan), f"rolling mean of {window} rows"


def smooth(values: Thinned) -> tuple[np.ndarray, str]:
    """Rolling mean of the parts' means [n] over about SMOOTH rows; a note of it and of what lies behind."""
    means, note = rolling_mean(values.mean, SMOOTH // values.rows)
    if values.rows > 1:
        rows = "their mean" if means is values.mean else f"rolling mean of {SMOOTH} rows"
        return means, f"pale: least to most of {values.rows:,} rows, line: {rows}"
    return means, note if means is values.mean else f"pale: every row, line: {note}"
