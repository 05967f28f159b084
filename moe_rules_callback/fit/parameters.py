"""What of a rule can be learnt: weights of operands, and offsets and slopes of predicates.

A fit moves coordinates that are 0 at the shipped values and 1 at one prior standard deviation from them:

    weight   start + theta               kept at 0.01 or more
    offset   start + theta width / 4     width: over which the ramp turns
    slope    start 2^theta               within a factor of 16
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..formula import Connective, Formula, Rule, children
from ..judges import TRENDS, ramp_of
from ..predicates import SLOPE, Predicate
from .rows import Size, signal_of
from .truth import Place

Group = Literal["weights", "offsets", "slopes"]
GROUPS: tuple[Group, ...] = ("weights", "offsets", "slopes")
LEAST_WEIGHT = 0.01  # a rule cannot be written with a weight of 0
FURTHEST = 4.0  # coordinates of slopes


@dataclass(frozen=True)
class Parameter:
    """One number of a rule.

    Attributes:
        group: what it is.
        of: the place of an operand, or the name of a predicate.
        label: for people.
        start: the shipped value.
        scale: one prior standard deviation; for slopes they are factors of 2.
        low, high: bounds of the value.
    """

    group: Group
    of: Place | str
    label: str
    start: float
    scale: float
    low: float
    high: float

    def value(self, theta: Any) -> Any:
        """Of a coordinate, which may be traced."""
        return self.start * 2.0**theta if self.group == "slopes" else self.start + self.scale * theta

    def theta(self, value: float) -> float:
        if self.group == "slopes":
            return math.log2(value / self.start)
        return (value - self.start) / self.scale

    @property
    def bounds(self) -> tuple[float, float]:
        """Of the coordinate."""
        return self.theta(self.low), self.theta(self.high)

    def rounded(self, theta: float) -> float:
        """The value to about a thousandth of its scale, and the start itself where nothing has moved it."""
        if theta == 0:
            return self.start
        value = float(self.value(theta))
        scale = value if self.group == "slopes" else self.scale
        digits = 3 - math.floor(math.log10(scale))
        return min(max(round(value, digits), self.low), self.high)


def parameters(rule: Rule, ramps: Mapping[str, Predicate]) -> tuple[Parameter, ...]:
    """Those of a rule.

    Args:
        ramps: predicates whose ramps may be learnt, as `spelled_out` gives them.
    """
    found = [
        Parameter("weights", place, f"weight of {operand}", weight, 1.0, LEAST_WEIGHT, math.inf)
        for place, operand, weight in weighed(rule.formula)
    ]
    for name, predicate in ramps.items():
        if predicate.offset is not None:
            low, high = (0.0, 1.0) if predicate.sense in TRENDS else (-math.inf, math.inf)
            width = SLOPE / predicate.slope
            found.append(
                Parameter("offsets", name, f"offset of {name}", predicate.offset, width / 4, low, high)
            )
        slope = predicate.slope
        low, high = slope * 2.0**-FURTHEST, slope * 2.0**FURTHEST
        found.append(Parameter("slopes", name, f"slope of {name}", slope, 1.0, low, high))
    return tuple(found)


def weighed(node: Formula, path: tuple[int, ...] = ()) -> Iterator[tuple[Place, Formula, float]]:
    """The operands that the language can give a weight, from the root downwards, with their weights."""
    if isinstance(node, Connective):
        for i, (operand, weight) in enumerate(zip(node.operands, node.weights, strict=True)):
            if node.kind in ("and", "or", "nand", "nor") or (node.kind == "implies" and i == 1):
                yield (path, i), operand, weight
    for i, child in enumerate(children(node)):
        yield from weighed(child, (*path, i))


def with_weights(node: Formula, weights: Mapping[Place, float], path: tuple[int, ...] = ()) -> Formula:
    """The formula with other weights."""
    below = tuple(with_weights(child, weights, (*path, i)) for i, child in enumerate(children(node)))
    if isinstance(node, Connective):
        own = tuple(weights.get((path, i), weight) for i, weight in enumerate(node.weights))
        return replace(node, operands=below, weights=own)
    fields = ("left", "right") if len(below) == 2 else ("operand",) if below else ()
    return replace(node, **dict(zip(fields, below, strict=True)))


def spelled_out(predicate: Predicate, sizes: Sequence[Size]) -> Predicate | None:
    """The predicate with its ramp in units of the signal.

    Where a signal is judged against its own last rows, the offset stays None: it is no value of the signal.

    Args:
        sizes: (experts, experts per token) of all layers of all runs.

    Returns:
        None where the shipped ramp is not the same for all sizes: as one number it would not follow them.
    """
    signal = signal_of(predicate)
    if predicate.offset is not None or (predicate.sense not in TRENDS and signal.ramps is None):
        return predicate
    if predicate.sense in TRENDS:
        return replace(predicate, offset=0.5)
    ramps = {ramp_of(predicate, signal, *size) for size in sizes}
    if len(ramps) > 1:
        return None
    ((slope, offset, margin),) = ramps
    return replace(predicate, slope=abs(slope), offset=offset, margin=margin)
