"""Why a conclusion is what it is: the axioms behind it, with their evidence and the signals under it.

    proofs = Proofs(open_history("runs/demo"))        # or a batch of `Records`
    for reason in proofs("collapse", row=-1):
        print(reason)

    starved_by_gradient [0.96, 0.99]: router_gradient_share 0.002, weak (layer block_1)
      small_updates [0.97, 1.00]: router_update 3e-05 (layer block_1)

A conclusion has as many proofs as axioms speak for it; the strongest one makes its lower bound, and of those
against it the strongest makes its upper bound. What is concluded may be evidence in its turn, and is proved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .axioms import Axioms, Role, conjuncts
from .formula import Connective, Formula, Not, Var, variables
from .records import Records, State

if TYPE_CHECKING:
    import xarray as xr

DEEPEST = 8  # premises behind premises that a proof follows
MOST = 256  # reasons of a proof; their number may grow as a power of the rules
LEAST = 0.25  # what an axiom must say of a name to be a reason: an or of several adds them up


class Measured(NamedTuple):
    """A signal, its value in the layer and row, and its unit; "1" for none."""

    signal: str
    value: float
    units: str

    def __str__(self) -> str:
        return f"{self.signal} {self.value:.3g}" + ("" if self.units == "1" else f" {self.units}")


@dataclass(frozen=True)
class Reason:
    """An axiom that bears on what is concluded, in one row and layer.

    Attributes:
        axiom: its name.
        concludes: the name, or its negation such as "~collapse".
        truth: (lower, upper) of its premises. Where the row does not hold that of each of them, as in an
            inference from right to left, the greatest that it can be.
        strength: what follows for what it concludes: that is at least so true.
        signals: what its predicates judge.
        premises: concluded names, or negations of such, among its premises.
        layer: the one that decides.
        reasons: those for the premises, the strongest first.
    """

    axiom: str
    concludes: str
    truth: tuple[float, float]
    strength: float
    signals: tuple[Measured, ...]
    premises: tuple[str, ...]
    layer: str
    reasons: tuple[Reason, ...]

    def __str__(self) -> str:
        against = f" against {self.concludes[1:]}" if self.concludes.startswith("~") else ""
        why = ", ".join([*map(str, self.signals), *self.premises])
        lower, upper = self.truth
        return f"{self.axiom} [{lower:.2f}, {upper:.2f}]{against}: {why} (layer {self.layer})"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; NaN as None."""
        signals = [
            one._asdict() | {"value": one.value if math.isfinite(one.value) else None} for one in self.signals
        ]
        return asdict(self) | {"signals": signals, "reasons": [reason.to_dict() for reason in self.reasons]}


def lines(reasons: Iterable[Reason], indent: str = "") -> Iterator[str]:
    """Reasons, a line each, and below each of them, indented, those for its premises."""
    for reason in reasons:
        yield f"{indent}{reason}"
        yield from lines(reason.reasons, indent + "  ")


class Proofs:
    """The reasons behind the rows of a run.

    Args:
        run: a batch of records, or a history as `open_history` gives it.

    Attributes:
        rules: by name.
        axioms: those among them.
    """

    def __init__(self, run: Records | xr.Dataset) -> None:
        self._run = run
        if isinstance(run, Records):
            rules, self._predicates = run.schema.rules, run.schema.predicates
            names: Sequence[str] = run.schema.rule_names
            self._layers: Sequence[str] = run.schema.layers
            self._units = {signal.name: signal.units for signal in run.schema.signals}
            self._signals: Sequence[str] = run.schema.signal_names
        else:
            from .replay import own_rules

            book = own_rules(run)
            rules, self._predicates = book.rules, book.predicates
            names = run["rule"].values.tolist()
            self._layers, self._signals = run["layer"].values.tolist(), run["signal"].values.tolist()
            self._units = {name: told["units"] for name, told in json.loads(run.attrs["signals"]).items()}
        self.rules = {rule.name: rule for rule in rules}
        told = isinstance(run, Records) or "predicates" in run.attrs  # what does not tell knew no axioms
        self.axioms = Axioms(rules, self._predicates, None if told else ())
        self._number = {name: i for i, name in enumerate(names)}  # of a history, maybe some of the rules
        self._known: list[tuple[frozenset[Formula], int, bool]] = []  # parts, rule, whether it is negated
        for name, i in self._number.items():
            stated = self.axioms.stated(self.rules[name])
            self._known += [(frozenset(conjuncts(stated)), i, False), (frozenset({Not(stated)}), i, True)]

    def role(self, rule: str) -> Role:
        """What a rule is, by its name."""
        return self.axioms.role(self.rules[rule])

    def __call__(self, rule: str, row: int) -> tuple[Reason, ...]:
        """The reasons for what a rule is in one row, the strongest first.

        Those on the side of the bound that decides: for a rule that is TRUE what makes its lower bound, for
        one that is FALSE what makes its upper bound; else both sides. What is said is of this row: of a
        window over conclusions, such as once[8](ill), former rows are not looked through.

        Args:
            rule: its name.
            row: number of the row.

        Returns:
            Nothing for a rule in which no concluded name occurs.
        """
        of, number = self.rules[rule], self._number[rule]
        stated = self.axioms.stated(of)
        if set(self.axioms.names).isdisjoint(variables(stated)):
            return ()
        state, truth, values = self._at(row)
        state = State(int(state[number]))
        layer = deciding_layer(truth[number], state, of.kind == "risk")
        sides = [up for up in (True, False) if state != (State.FALSE if up else State.TRUE)]
        wanted = dict.fromkeys(push for up in sides for push in self.axioms.pushes(stated, up))
        place = _Place(truth[:, layer], values[:, layer], self._layers[layer], iter(range(MOST)))
        return _strongest(self._reasons(push, place, frozenset()) for push in wanted)

    def _at(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """States [R], truth [R, Y, 2] and signals [S, Y] of a row."""
        if isinstance(run := self._run, Records):
            return run.state[row], run.truth_layer[row], run.signal_value[row]
        there = run.isel(step=row)
        return (
            there["state"].values,
            there["truth_layer"].transpose("rule", "layer", "bound").values,
            there["signal_value"].transpose("signal", "layer").values,
        )

    def _reasons(
        self, push: tuple[str, bool], place: _Place, passed: frozenset[tuple[str, bool]]
    ) -> Iterator[Reason]:
        """Those for a name or its negation; nothing is proved by way of itself."""
        name, positive = push
        whole = self._most(Var(name) if positive else Not(Var(name)), place.truth)  # of all axioms together
        for argument in self.axioms.about(name):
            truth = self._most(argument.premises, place.truth)
            strength = float(min(truth[0] / argument.literal.weight, whole[0]))
            told = argument.axiom.name in self._number  # a part of the rules may have been chosen
            if argument.literal.positive != positive or strength < LEAST or not told:
                continue
            if next(place.left, None) is None:
                return
            needs = [need for part, _ in argument.others for need in self.axioms.pushes(part, True)]
            needs = needs if len(passed) < DEEPEST else []
            yield Reason(
                argument.axiom.name,
                name if positive else f"~{name}",
                (float(truth[0]), float(truth[1])),
                strength,
                tuple(self._measured(argument.premises, place)),
                tuple(str(part) for part, _ in argument.others),
                place.layer,
                _strongest(
                    self._reasons(need, place, passed | {push}) for need in needs if need not in passed
                ),
            )

    def _most(self, formula: Formula, truth: np.ndarray) -> np.ndarray:
        """The greatest that the bounds [2] of a formula can be, given the truth [R, 2] of the rules."""
        parts, found = frozenset(conjuncts(formula)), [np.ones(2)]
        for known, rule, negated in self._known:
            if known <= parts:
                found.append(1 - truth[rule, ::-1] if negated else truth[rule])
        if isinstance(formula, Connective) and formula.kind == "and":
            lacking = [
                w * (1 - self._most(o, truth)) for o, w in zip(formula.operands, formula.weights, strict=True)
            ]
            found.append(np.clip(1 - np.sum(lacking, axis=0), 0, 1))
        return np.min(found, axis=0)

    def _measured(self, formula: Formula, place: _Place) -> Iterator[Measured]:
        names = [name for name in variables(formula) if name in self._predicates]
        for signal in dict.fromkeys(self._predicates[name].signal for name in names):
            if signal in self._signals:
                value = float(place.values[self._signals.index(signal)])
                yield Measured(signal, value, self._units[signal])


class _Place(NamedTuple):
    """A layer in a row: truth [R, 2] of the rules, values [S] of the signals, its name; reasons left."""

    truth: np.ndarray
    values: np.ndarray
    layer: str
    left: Iterator[int]


def proofs_of(history: xr.Dataset) -> Proofs | None:
    """The proofs of a history; None where no rule has an arrow, so that nothing can be concluded."""
    rules = json.loads(history.attrs["rules"]).values()
    return Proofs(history) if any("->" in rule["formula"] for rule in rules) else None


def deciding_layer(truth: np.ndarray, state: State, risk: bool) -> int:
    """The layer whose bound makes the headline of truth [Y, 2]; of an UNKNOWN rule the nearest to firing."""
    upper = state == State.FALSE or (state != State.TRUE and not risk)
    bound = truth[:, int(upper)]
    return int(bound.argmax() if risk else bound.argmin())


def _strongest(found: Iterable[Iterable[Reason]]) -> tuple[Reason, ...]:
    return tuple(sorted((reason for each in found for reason in each), key=lambda each: -each.strength))
