"""What ties predicates together: those over one signal move along one curve.

    high_router_entropy and low_router_entropy        one feature, the signal itself
    increasing_loss and decreasing_loss               one feature, how surely the loss rises
    high_load_cv and high_router_entropy              two features, taken as independent

The bounds of a predicate are sigmoid(scale z + shift -+ width), where z is the feature in units of the
first predicate's slope. In these units ramps that stretch with the number of experts stay where they
are; a predicate whose place against the others does depend on it is a feature of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..judges import TRENDS, looks_back, ramp_of
from ..predicates import Predicate
from ..signals import Signal

# Signals that lie in 0..1 by their definition.
UNIT = {
    "router_entropy", "routing_confidence", "routing_margin", "router_mutual_information",
    "expert_imbalance", "dead_expert_fraction", "load_gini", "expert_coactivation",
    "router_gradient_share", "expert_gradient_min_share",
}  # fmt: skip
SIZES = ((2, 1), (8, 2), (64, 8), (256, 1))  # (E, k) at which ramps are compared
SATURATED = 20.0  # sigmoid(20) is 1 in float32


class Line(NamedTuple):
    """A predicate: its bounds are sigmoid(scale z + shift -+ width) of the feature z."""

    feature: int
    scale: float
    shift: float
    width: float

    def bounds(self, z: np.ndarray) -> np.ndarray:
        """Truth [.., 2] at z [..]."""
        return sigmoid(np.stack([self.logit(z, upper=False), self.logit(z, upper=True)], axis=-1))

    def logit(self, z: np.ndarray, upper: bool) -> np.ndarray:
        """The logit of one bound."""
        return self.scale * z + self.shift + (self.width if upper else -self.width)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Float64, and exact in both tails."""
    return np.exp(-np.logaddexp(0, -x))


class Features:
    """The features under some predicates.

    Args:
        predicates: by name.
        signals: what they are about, by name.
        concluded: of other names: whether their lower bound can be above 0, and their upper one below 1.

    Attributes:
        concluded: as given.
        lines: of each predicate, by name.
        ranges: of each feature: the z that can occur and are not saturated for all its predicates.
    """

    def __init__(
        self,
        predicates: Mapping[str, Predicate],
        signals: Mapping[str, Signal],
        concluded: Mapping[str, tuple[bool, bool]] | None = None,
    ) -> None:
        self.concluded = concluded or {}
        self.lines: dict[str, Line] = {}
        known: list[tuple[object, np.ndarray]] = []  # of each feature: what it is, its first ramp
        limits: list[tuple[float, float]] = []
        for name, predicate in predicates.items():
            signal = signals[predicate.signal]
            look = looks_back(predicate, signal)
            ramps = np.array([ramp_of(predicate, signal, *size) for size in SIZES])
            key = (predicate.signal, look)
            for feature, (other, first) in enumerate(known):
                if other == key and (line := _line(feature, ramps, first)) is not None:
                    self.lines[name] = line
                    break
            else:
                unit = predicate.sense in TRENDS or (look is None and predicate.signal in UNIT)
                limits.append(_limits(ramps, unit))
                self.lines[name] = Line(len(known), 1.0, 0.0, float(np.abs(ramps[0, 0]) * ramps[0, 2]))
                known.append((key, ramps))
        self.ranges = [self._range(feature, *limit) for feature, limit in enumerate(limits)]

    def _range(self, feature: int, low: float, high: float) -> tuple[float, float]:
        ends = [
            (sign * (SATURATED + line.width) - line.shift) / line.scale
            for line in self.lines.values()
            if line.feature == feature
            for sign in (-1, 1)
        ]
        return min(max(low, min(ends)), high), max(min(high, max(ends)), low)


def _line(feature: int, ramps: np.ndarray, first: np.ndarray) -> Line | None:
    """Ramps [sizes, (slope, offset, margin)] seen from the first of the feature; None: it depends."""
    slope, offset, margin = ramps.T
    lines = np.stack([slope / first[:, 0], slope * (first[:, 1] - offset), np.abs(slope) * margin], axis=-1)
    if not np.allclose(lines, lines[0], rtol=1e-6, atol=1e-9):
        return None
    return Line(feature, *(float(x) for x in lines[0]))


def _limits(ramps: np.ndarray, unit: bool) -> tuple[float, float]:
    """z at the ends of the feature, where these are 0 and 1 and the ramp is always the same."""
    if not unit or not np.allclose(ramps, ramps[0], rtol=1e-6):
        return -np.inf, np.inf
    slope, offset, _ = ramps[0]
    ends = -slope * offset, slope * (1 - offset)
    return float(min(ends)), float(max(ends))
