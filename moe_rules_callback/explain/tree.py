"""The tree of a formula: what each part says in one layer, what predicates read, what windows rest on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..axioms import Argument, Axioms
from ..conclusions import evidence_of
from ..formula import Always, Connective, Formula, Once, Previously, Since, Var, children, variables
from ..predicates import Predicate, Sense
from ..proof import DEEPEST, LEAST, MOST
from .readings import Ramp, judged, ramp, rows_back

if TYPE_CHECKING:
    import xarray as xr


@dataclass(frozen=True)
class Reading:
    """What a predicate reads.

    Attributes:
        signal, value, units: of the deciding layer in this row; NaN if it was not finite.
        sense: what about it is judged.
        ramp: over the value itself; None where a window of rows is judged.
        rows: of that window, the current one included.
        oldest: the value at its begin; NaN if the window has not filled.
    """

    signal: str
    value: float
    units: str
    sense: Sense
    ramp: Ramp | None
    rows: int
    oldest: float


@dataclass(frozen=True)
class Part:
    """A sub-formula in the deciding layer, or an axiom below the name that it concludes.

    Attributes:
        text: the formula; of an axiom its name and formula.
        truth: its interval (lower, upper); of an axiom that of its premises.
        operands: the parts that it is made of; of a concluded name the axioms about it, the strongest first.
        reading: of a predicate.
        note: what the window of a past operator says, on which side an axiom is, or "".
    """

    text: str
    truth: tuple[float, float]
    operands: tuple[Part, ...]
    reading: Reading | None
    note: str


def parts_of(*formulas: Formula) -> dict[Formula, int]:
    """All sub-formulas of some formulas, with a number each."""
    found: dict[Formula, int] = {}

    def visit(node: Formula) -> None:
        found.setdefault(node, len(found))
        for child in children(node):
            visit(child)

    for formula in formulas:
        visit(formula)
    return found


class Tree:
    """Makes the tree of a formula in one layer."""

    def __init__(
        self,
        past: xr.Dataset,
        predicates: Mapping[str, Predicate],
        axioms: Axioms,
        parts: dict[Formula, int],
        truth: np.ndarray,
        layer: int,
    ) -> None:
        self._axioms, self._parts, self._truth, self._axioms_told = axioms, parts, truth, 0
        measured = {part.name for part in parts if isinstance(part, Var)}.difference(axioms.names)
        self._predicates = {name: predicate for name, predicate in predicates.items() if name in measured}
        self._told = json.loads(past.attrs["signals"])
        self._size = (json.loads(past.attrs["routers"]) or [(1, 1)])[layer]
        self._steps = past["step"].values
        read = dict.fromkeys(judged(predicate)[0] for predicate in self._predicates.values())
        values = past["signal_value"].isel(layer=layer).transpose("step", "signal")
        self._values = {name: values.sel(signal=name).values for name in read}

    def of(self, node: Formula, above: frozenset[str] = frozenset()) -> Part:
        """A part and those below; concluded names and axioms above it are not followed again."""
        lower, upper = self._truth[-1, self._parts[node]].tolist()
        if isinstance(node, Var) and node.name in self._axioms.names:
            if node.name in above:
                return Part(node.name, (lower, upper), (), None, "see above")
            if len(above) > 2 * DEEPEST or self._axioms_told >= MOST:
                return Part(node.name, (lower, upper), (), None, "not followed further")
            found = [self._axiom(each, above | {node.name}) for each in self._about(node.name, above)]
            found.sort(key=lambda part: -part.truth[0])
            return Part(node.name, (lower, upper), tuple(found), None, "")
        reading = self._reading(self._predicates[node.name]) if isinstance(node, Var) else None
        operands = tuple(self.of(child, above) for child in children(node))
        return Part(str(node), (lower, upper), operands, reading, self._window(node))

    def _about(self, name: str, above: frozenset[str]) -> Iterator[Argument]:
        """The axioms that conclude a name, and those that say something of it from right to left."""
        for argument in self._axioms.about(name):
            says = self._truth[-1, self._parts[argument.premises], 0] >= LEAST
            if argument.axiom.name not in above and (says or not _backwards(argument)):
                yield argument

    def _axiom(self, argument: Argument, above: frozenset[str]) -> Part:
        """An axiom under a name, its premises as operands."""
        self._axioms_told += 1
        premises, axiom = argument.premises, argument.axiom
        lower, upper = self._truth[-1, self._parts[premises]].tolist()
        operands = children(premises) if isinstance(premises, Connective) else (premises,)
        below = tuple(self.of(operand, above | {axiom.name}) for operand in operands)
        note = "for it" if argument.literal.positive else "against it"
        note += ", from right to left" if _backwards(argument) else ""
        return Part(f"{axiom.name}: {axiom.formula}", (lower, upper), below, None, note)

    def per_layer(self, predicate: str) -> bool:
        """Whether a predicate rests on something that each layer has for itself."""
        return self._told[judged(self._predicates[predicate])[0]]["per_layer"]

    def notes(self) -> list[str]:
        """Of what looks back, and of signals that were not finite."""
        found = []
        odd = [name for name, values in self._values.items() if not np.isfinite(values[-1])]
        if odd:
            found.append(f"Not finite in this row: {', '.join(odd)}. What rests on it is unknown, [0, 1].")
        looks = any(ramp(predicate, self._size) is None for predicate in self._predicates.values())
        if looks or any(isinstance(part, Always | Once | Previously | Since) for part in self._parts):
            found.append(
                "The rule looks back. Only this row was varied; what former rows left behind stayed."
            )
        if looks:
            found.append("The range of a signal that is judged by its past is 6 standard deviations of it.")
        return found

    def _reading(self, predicate: Predicate) -> Reading:
        name, _ = judged(predicate)
        values, over, rows = self._values[name], ramp(predicate, self._size), rows_back(predicate)
        oldest = float(values[-rows]) if len(values) >= rows else float("nan")
        return Reading(
            name, float(values[-1]), self._told[name]["units"], predicate.sense, over, rows, oldest
        )

    def _window(self, node: Formula) -> str:
        """Which row of its window a past operator rests on."""
        if not isinstance(node, Always | Once | Previously | Since):
            return ""
        rows = len(self._steps)
        finite = np.ones(rows, bool)  # the others are passed over
        for name in self._predicates.keys() & set(variables(node)):
            finite &= np.isfinite(self._values[judged(self._predicates[name])[0]])
        if isinstance(node, Previously):
            before = np.flatnonzero(finite[:-1])
            return f"as it was at step {self._steps[before[-1]]:,}" if len(before) else "no row before"
        begin = 0 if node.rows is None else max(rows - node.rows, 0)
        since = f"rows since step {self._steps[begin]:,}"
        if node.rows is not None and node.rows > rows:
            since += f", and {node.rows - rows} before the run that count as unknown"
        if isinstance(node, Since) or not finite[begin:].any():
            return since
        lower, lowest = self._truth[begin:, self._parts[node.operand], 0], isinstance(node, Always)
        lower = np.where(finite[begin:], lower, 2 if lowest else -1)
        step = self._steps[begin + int(lower.argmin() if lowest else lower.argmax())]
        return f"{since}; lower bound {'lowest' if lowest else 'highest'} at step {step:,}"


def _backwards(argument: Argument) -> bool:
    """Whether an axiom has the name among what it concludes from."""
    return argument.literal.name in variables(evidence_of(argument.axiom))
