"""An explanation as plain text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..formula import RuleKind
from ..predicates import Sense
from .counterfactual import Change
from .tree import Part, Reading

if TYPE_CHECKING:
    from .explanation import Explanation

ONE, EVERY = "one layer's", "every layer's"
KINDS: dict[RuleKind, str] = {"risk": "A risk", "health": "A health rule", None: "Watched, without a kind"}
TRENDS: dict[Sense, str] = {
    "increasing": "rises",
    "decreasing": "falls",
    "stable": "is stable",
    "high": "is high for its past",
    "low": "is low for its past",
}


def told(of: Explanation) -> str:
    """All of it, in the order in which one asks."""
    return "\n".join([*_head(of), "", *_tree(of), "", *_changes(of), *_notes(of)])


def _head(of: Explanation) -> Iterator[str]:
    yield f"{of.rule} at step {of.step:,}: {of.state.name} {interval(of.truth)}"
    yield f"  {of.text}"
    true, false = (ONE, EVERY) if of.kind == "risk" else (EVERY, ONE)
    yield (
        f"  {KINDS[of.kind]}: TRUE if {true} lower bound is at least {of.threshold:g}, "
        f"FALSE if {false} upper bound is at most {1 - of.threshold:.4g}."
    )


def _tree(of: Explanation) -> Iterator[str]:
    worst = "worst" if of.kind else "lowest"
    among = f", the {worst} of {of.layers}" if of.layers > 1 else ""
    yield f"In layer '{of.layer}'{among}:" if of.layer else "For the whole model:"
    yield from _part(of.tree, 1)
    if of.busiest and of.idlest:
        yield (
            f"  Expert {of.busiest.number} has the largest share there, {of.busiest.share:.1%}, and expert "
            f"{of.idlest.number} the smallest, {of.idlest.share:.1%}; a fair share is {of.fair_share:.1%}."
        )


def _part(part: Part, depth: int) -> Iterator[str]:
    note = f"  ({part.note})" if part.note else ""
    yield f"{interval(part.truth)}{'  ' * depth}{part.text}{note}"
    if part.reading:
        yield f"{' ' * 12}{'  ' * (depth + 1)}{_reading(part.reading)}"
    for operand in part.operands:
        yield from _part(operand, depth + 1)


def _reading(reading: Reading) -> str:
    unit = "" if reading.units == "1" else f" {reading.units}"
    value = f"{reading.signal} = {number(reading.value)}{unit}"
    if (ramp := reading.ramp) is not None:
        side = "below" if reading.sense == "low" else "above"
        return f"{value}; {reading.sense} {side} {ramp.offset:.4g}, over a range of {ramp.scale:.4g}"
    judged = f"whether it {TRENDS[reading.sense]}, over {reading.rows} rows"
    if math.isnan(reading.oldest):
        return f"{value}; {judged}, which have not all been"
    return f"{value}, from {number(reading.oldest)}; {judged}"


def _changes(of: Explanation) -> Iterator[str]:
    if not of.changes:
        yield "None of the values tried for one signal in this row changes the state."
        return
    yield "Smallest change of one signal in this row that would have changed the state, least first:"
    for change in of.changes:
        yield f"  {_change(change)}"


def _change(change: Change) -> str:
    places = [f" in '{layer}'" for layer in change.layers] or [""]
    moves = [
        f"{' -> '.join(apart(before, after))}{place}"
        for place, before, after in zip(places, change.before, change.after, strict=True)
    ]
    together = ", all of them" if len(moves) > 1 else ""
    moved = f"{change.signal} {', '.join(moves)}{together}"
    return f"{moved}: {change.state.name}, by {change.size:.2g} of its range"


def _notes(of: Explanation) -> Iterator[str]:
    if of.notes:
        yield ""
        yield from of.notes


def interval(truth: tuple[float, float]) -> str:
    """[lower, upper]."""
    return f"[{truth[0]:.2f}, {truth[1]:.2f}]"


def number(value: float) -> str:
    """Four digits."""
    return f"{value:.4g}"


def apart(one: float, other: float) -> tuple[str, str]:
    """Two numbers with as many digits as tell them apart, at least four."""
    digits = next((n for n in range(4, 9) if f"{one:.{n}g}" != f"{other:.{n}g}"), 9)
    return f"{one:.{digits}g}", f"{other:.{digits}g}"
