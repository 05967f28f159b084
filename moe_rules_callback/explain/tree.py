"""The tree of a formula: what each part says in one layer, what predicates read, what windows rest on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..formula import Always, Formula, Once, Previously, Since, Var, children, variables
from ..predicates import Predicate, Sense
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
    """A sub-formula in the deciding layer.

    Attributes:
        text: the formula.
        truth: its interval (lower, upper).
        operands: the parts that it is made of.
        reading: of a predicate.
        note: what the window of a past operator says, or "".
    """

    text: str
    truth: tuple[float, float]
    operands: tuple[Part, ...]
    reading: Reading | None
    note: str


def parts_of(formula: Formula) -> dict[Formula, int]:
    """All sub-formulas of a formula, with a number each."""
    found: dict[Formula, int] = {}

    def visit(node: Formula) -> None:
        found.setdefault(node, len(found))
        for child in children(node):
            visit(child)

    visit(formula)
    return found


class Tree:
    """Makes the tree of a formula in one layer."""

    def __init__(
        self,
        past: xr.Dataset,
        predicates: Mapping[str, Predicate],
        parts: dict[Formula, int],
        truth: np.ndarray,
        layer: int,
    ) -> None:
        self._predicates, self._parts, self._truth = predicates, parts, truth
        self._told = json.loads(past.attrs["signals"])
        self._size = (json.loads(past.attrs["routers"]) or [(1, 1)])[layer]
        self._steps = past["step"].values
        read = dict.fromkeys(judged(predicates[name])[0] for part in parts for name in variables(part))
        values = past["signal_value"].isel(layer=layer).transpose("step", "signal")
        self._values = {name: values.sel(signal=name).values for name in read}

    def of(self, node: Formula) -> Part:
        """A part and those below."""
        lower, upper = self._truth[-1, self._parts[node]].tolist()
        reading = self._reading(self._predicates[node.name]) if isinstance(node, Var) else None
        return Part(
            str(node), (lower, upper), tuple(map(self.of, children(node))), reading, self._window(node)
        )

    def per_layer(self, predicate: str) -> bool:
        """Whether a predicate rests on something that each layer has for itself."""
        return self._told[judged(self._predicates[predicate])[0]]["per_layer"]

    def notes(self) -> list[str]:
        """Of what looks back, and of signals that were not finite."""
        found = []
        odd = [name for name, values in self._values.items() if not np.isfinite(values[-1])]
        if odd:
            found.append(f"Not finite in this row: {', '.join(odd)}. What rests on it is unknown, [0, 1].")
        predicates = [self._predicates[part.name] for part in self._parts if isinstance(part, Var)]
        looks = any(ramp(predicate, self._size) is None for predicate in predicates)
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
        for name in variables(node):
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
