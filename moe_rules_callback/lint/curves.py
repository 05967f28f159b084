"""The sigmoids of predicates as linear constraints, and how well a solution keeps to them.

A feature lies between points z_k, with shares s_k >= 0 that sum to 1; a bound of a predicate over it then
lies within

    sum_k s_k (sigmoid(x_k) - error_k)  ..  sum_k s_k (sigmoid(x_k) + error_k)

where x_k is its logit at z_k and error_k what the chords beside it miss. That holds for all points of the
feature and for some that are none. The fewer of these, the shorter its range: so ranges are cut.
"""

from __future__ import annotations

import numpy as np

from .features import Features, Line, sigmoid
from .milp import Linear, Program, constant

GRID = np.array([0, 1, 2, 3, 4.5, 7, 20])  # logits at which the chords of a sigmoid meet
TOLD_WELL = 1e-6  # a predicate this close to its sigmoid is on it

Box = dict[tuple[int, int], tuple[float, float]]  # range of a feature, some rows ago


class Curves:
    """Predicates as columns of a program, tied to their features.

    Args:
        program: gathers the columns.
        features: under the predicates; one that is not among them is free.
        box: ranges of features; the others have all of theirs.

    Attributes:
        atoms: lower and upper bound of each predicate, by (name, rows ago).
        places: of each (feature, rows ago): points, and the share of each.
    """

    def __init__(self, program: Program, features: Features, box: Box) -> None:
        self._program, self.features, self._box = program, features, box
        self.atoms: dict[tuple[str, int], tuple[Linear, Linear]] = {}
        self.places: dict[tuple[int, int], tuple[np.ndarray, list[Linear]]] = {}
        self._bounds: dict[tuple[Line, bool, int], Linear] = {}

    def atom(self, name: str, lag: int) -> tuple[Linear, Linear]:
        key = name, lag
        if key not in self.atoms:
            if (line := self.features.lines.get(name)) is None:
                rises, falls = self.features.concluded.get(name, (True, True))
                lower = self._program.column() if rises else constant(0.0)
                upper = self._program.column() if falls else constant(1.0)
                if rises and falls:
                    self._program.require(upper.plus(lower.times(-1)))
            else:
                lower, upper = self._bound(line, False, lag), self._bound(line, True, lag)
            self.atoms[key] = lower, upper
        return self.atoms[key]

    def range(self, place: tuple[int, int]) -> tuple[float, float]:
        return self._box.get(place, self.features.ranges[place[0]])

    def _bound(self, line: Line, upper: bool, lag: int) -> Linear:
        """A column within the error of the chords through the points of the feature."""
        key = line, upper, lag
        if key not in self._bounds:
            z, shares = self._place((line.feature, lag))
            x = line.logit(z, upper)
            y = sigmoid(x)
            # A chord misses by at most max |f''| h^2 / 8, and by no more than f changes.
            steps, changes = np.abs(np.diff(x)), np.abs(np.diff(y))
            errors = np.minimum(0.0963 * steps**2 / 8, changes) if len(z) > 1 else np.zeros(1)
            error = np.maximum(np.append(errors, 0), np.append(0, errors))[: len(z)]
            v = self._program.column(float(y.min()), float(y.max()))
            for sign in (-1, 1):
                terms = {k: c for s, value in zip(shares, y + sign * error, strict=True)
                         for k, c in s.times(float(value)).terms.items()}  # fmt: skip
                chord = Linear(0.0, terms, 0.0, 1.0)
                self._program.require(chord.plus(v.times(-1)).times(sign))
            self._bounds[key] = v
        return self._bounds[key]

    def _place(self, place: tuple[int, int]) -> tuple[np.ndarray, list[Linear]]:
        """Points of a feature and the share of each: the feature lies somewhere between them."""
        if place not in self.places:
            low, high = self.range(place)
            z = [low, (low + high) / 2, high]
            for line in self.features.lines.values():
                if line.feature == place[0]:
                    logits = np.concatenate([-GRID, GRID])
                    z += [*((logits - line.shift) / line.scale)]
            z = np.unique([x for x in z if low <= x <= high])
            shares = [self._program.column() for _ in z]
            total = Linear(-1.0, {k: c for s in shares for k, c in s.terms.items()}, -1.0, float(len(z)))
            self._program.require(total)
            self._program.require(total.times(-1))
            self.places[place] = z, shares
        return self.places[place]


class Solved:
    """A solution: where each feature lies, and what its predicates are there."""

    def __init__(self, curves: Curves, columns: np.ndarray) -> None:
        self._curves = curves
        lines = curves.features.lines
        self._z = {
            place: float(np.clip(sum(s.at(columns) * x for x, s in zip(z, shares, strict=True)), z[0], z[-1]))
            for place, (z, shares) in curves.places.items()
        }
        self.truths: dict[tuple[str, int], np.ndarray] = {}
        self._gaps = dict.fromkeys(curves.places, 0.0)
        for (name, lag), pair in curves.atoms.items():
            told = np.array([x.at(columns) for x in pair])
            if (line := lines.get(name)) is None:
                self.truths[name, lag] = np.clip(np.sort(told), 0, 1)
                continue
            place = line.feature, lag
            self.truths[name, lag] = real = line.bounds(np.array(self._z[place]))
            self._gaps[place] = max(self._gaps[place], float(np.abs(real - told).max()))

    def halves(self, box: Box) -> list[Box]:
        """The box cut where a feature is told worst; none where all are told well."""
        place = max(self._gaps, key=self._gaps.__getitem__, default=None)
        if place is None or self._gaps[place] < TOLD_WELL:
            return []
        low, high = self._curves.range(place)
        at = min(max(self._z[place], low + 0.1 * (high - low)), high - 0.1 * (high - low))
        return [box | {place: (low, at)}, box | {place: (at, high)}]
