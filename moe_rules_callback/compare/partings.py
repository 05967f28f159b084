"""Where two runs part ways.

States part at the first row in which they differ and from which they differ in at least 3 of 4 rows, over
`patience` rows. A signal parts at the first row in which, and from which over as many rows in the mean, the
runs differ by more than 3 standard deviations of their noise: of what changes from one row to the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..records import State

Steps = tuple[np.ndarray, np.ndarray]
MOST = 0.75  # of the rows: a state near its threshold flickers
DEVIATIONS = 3.0  # of the noise, which a mean difference exceeds
ROUNDING = 1e-6  # relative size of a difference that is none


@dataclass(frozen=True)
class Parting:
    """Where two runs part ways.

    Attributes:
        row: number of the aligned row.
        steps: of that row in either run.
        values: there: names of states, or of a signal the means over the `patience` rows that follow.
    """

    row: int
    steps: tuple[int, int]
    values: tuple[Any, Any]


def part_states(
    states: tuple[np.ndarray, np.ndarray], steps: Steps, patience: int, begin: int = 0
) -> Parting | None:
    """Where the states [n] of a rule part; the values are those that it has most often from there on.

    Args:
        states: of either run, in n aligned rows.
        steps: of all aligned rows in either run.
        patience: rows for which a difference must last.
        begin: number of the row of the first states.
    """
    if len(states[0]) < patience:
        return None
    differ = states[0] != states[1]
    parted = differ[: len(differ) - patience + 1] & (windowed(differ, patience) >= MOST * patience)
    if not parted.any():
        return None
    row = int(parted.argmax())
    usual = [int(np.bincount(state[row : row + patience]).argmax()) for state in states]
    return _at(begin + row, steps, *(State(state).name.lower() for state in usual))


def part_signals(values: tuple[np.ndarray, np.ndarray], steps: Steps, patience: int) -> Parting | None:
    """Where the values [n] of a signal part; the values are the means from there on. See `part_states`."""
    one, other = (each.astype(float) for each in values)
    if len(one) < patience:
        return None
    known = np.isfinite(one) & np.isfinite(other)
    counted = windowed(known, patience)
    means = [windowed(np.where(known, x, 0), patience) / np.maximum(counted, 1) for x in (one, other)]
    noise = np.sqrt(_variance(one, patience) + _variance(other, patience))
    least = DEVIATIONS * noise + ROUNDING * np.maximum(np.abs(means[0]), np.abs(means[1]))
    mean, here = means[1] - means[0], (other - one)[: len(means[0])]
    parted = (np.abs(mean) > least) & (here * np.sign(mean) > least) & (counted > patience / 2)
    if not parted.any():
        return None
    row = int(parted.argmax())
    return _at(row, steps, float(means[0][row]), float(means[1][row]))


def windowed(values: np.ndarray, rows: int) -> np.ndarray:
    """Sums over each `rows` values in succession."""
    return np.convolve(values.astype(float), np.ones(max(rows, 1)), "valid")


def _variance(values: np.ndarray, rows: int) -> np.ndarray:
    """Variance of single rows in each window, from the change between neighbours: trends hardly count."""
    change = np.square(np.diff(values))
    known = np.isfinite(change)
    total, counted = windowed(np.where(known, change, 0), rows - 1), windowed(known, rows - 1)
    return total[: len(values) - rows + 1] / np.maximum(counted, 1)[: len(values) - rows + 1] / 2


def _at(row: int, steps: Steps, one: Any, other: Any) -> Parting:
    return Parting(row, (int(steps[0][row]), int(steps[1][row])), (one, other))
