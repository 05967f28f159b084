"""What rules say of two runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..axioms import Axioms
from ..errors import HistoryError
from ..explain.readings import judged
from ..formula import Rule
from ..proof import Proofs
from ..records import State
from ..replay import own_rules
from ..rulebook import Rulebook
from .partings import Parting, part_signals, part_states

if TYPE_CHECKING:
    import xarray as xr

By = Literal["step", "fraction"]
PATIENCE = 32


@dataclass(frozen=True)
class RuleComparison:
    """What a rule says of both runs.

    Attributes:
        rule: its name.
        rows: aligned rows in which it was judged: from its warm-up on, in both runs.
        shares: of each run, state -> share of these rows.
        difference: mean truth of the second run less that of the first; of the middles of the intervals.
        parting: of the states, or None.
        before: signals of the rule that had parted by then, the first first.
        same: whether formula, threshold and kind are the same in both runs.
    """

    rule: str
    rows: int
    shares: tuple[Mapping[str, float], Mapping[str, float]]
    difference: float
    parting: Parting | None
    before: tuple[tuple[str, Parting], ...]
    same: bool


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes:
        names: of the runs.
        by: what the rows were aligned by.
        patience: rows for which a difference must last.
        steps: of either run, first and last of the rows that are compared.
        rows: number of the aligned rows.
        rules: those in both runs, in the order of the first.
        only: names of the rules that the first, the second run has alone.
    """

    names: tuple[str, str]
    by: By
    patience: int
    steps: tuple[tuple[int, int], tuple[int, int]]
    rows: int
    rules: tuple[RuleComparison, ...]
    only: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def first(self) -> RuleComparison | None:
        """The first rule that parts ways."""
        return min(self.parted, key=lambda rule: rule.parting.row if rule.parting else 0, default=None)

    @property
    def parted(self) -> tuple[RuleComparison, ...]:
        """The rules that part ways."""
        return tuple(rule for rule in self.rules if rule.parting)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self) | {"first": self.first.rule if self.first else None}

    def __str__(self) -> str:
        from .text import told

        return told(self)


def compare(
    a: xr.Dataset,
    b: xr.Dataset,
    by: By = "step",
    *,
    patience: int = PATIENCE,
    names: tuple[str, str] = ("a", "b"),
) -> Comparison:
    """Compare what rules of the same name say of two runs.

    Where the runs overlap, each row of the one that has fewer there goes with the nearest of the other.

    Args:
        a, b: as `open_history` gives them.
        by: align rows by "step", or by "fraction": the step over the last step of the run.
        patience: rows for which a difference must last.
        names: of the runs, for messages.

    Raises:
        HistoryError: a run without rows, or no rule or no steps in common.
    """
    a, b = _aligned(a, b, by, names)
    books = own_rules(a), own_rules(b)
    axioms = Proofs(a).axioms
    rules = [{rule.name: rule for rule in book.rules} for book in books]
    common = [name for name in rules[0] if name in rules[1]]
    if not common:
        raise HistoryError(
            f"the runs have no rule in common: {names[0]} has {', '.join(rules[0])}; {names[1]} has "
            f"{', '.join(rules[1])}. Judge both by the same rules (moe-rules compare --rules RULES)."
        )
    steps = a["step"].values, b["step"].values
    signals = _parted_signals(a, b, patience)
    read = [run[["state", "truth"]].sel(rule=common).compute() for run in (a, b)]
    states = [run["state"].transpose("rule", "step").values for run in read]
    truth = [run["truth"].transpose("rule", "step", "bound").values for run in read]
    found = []
    for i, name in enumerate(common):
        one, other = rules[0][name], rules[1][name]
        begin = int(((steps[0] < one.warmup) | (steps[1] < other.warmup)).sum())
        judged_a, judged_b = states[0][i, begin:], states[1][i, begin:]
        parting = part_states((judged_a, judged_b), steps, patience, begin)
        read = _reads(books[0], axioms, one)
        earlier = [
            (signal, at)
            for signal, at in signals.items()
            if parting and at.row <= parting.row and (not read or signal in read)
        ]
        means = [each[i, begin:].mean(dtype=float) if len(judged_a) else 0.0 for each in truth]
        compared = RuleComparison(
            rule=name,
            rows=len(judged_a),
            shares=(_shares(judged_a), _shares(judged_b)),
            difference=float(means[1] - means[0]),
            parting=parting,
            before=tuple(sorted(earlier, key=lambda each: each[1].row)),
            same=(one.formula, one.threshold, one.kind) == (other.formula, other.threshold, other.kind),
        )
        found.append(compared)
    return Comparison(
        names=names,
        by=by,
        patience=patience,
        steps=(_ends(steps[0]), _ends(steps[1])),
        rows=len(steps[0]),
        rules=tuple(found),
        only=(_without(rules[0], common), _without(rules[1], common)),
    )


def _ends(steps: np.ndarray) -> tuple[int, int]:
    return int(steps[0]), int(steps[-1])


def _aligned(a: xr.Dataset, b: xr.Dataset, by: By, names: tuple[str, str]) -> tuple[xr.Dataset, xr.Dataset]:
    """The rows of both runs that belong together."""
    at = []
    for run, name in zip((a, b), names, strict=True):
        step = run["step"].values
        if not len(step):
            raise HistoryError(f"there is nothing to compare: {name} has no rows.")
        at.append(step / max(int(step[-1]), 1) if by == "fraction" else step)
    low, high = max(at[0][0], at[1][0]), min(at[0][-1], at[1][-1])
    inside = [np.flatnonzero((each >= low) & (each <= high)) for each in at]
    if not (len(inside[0]) and len(inside[1])):
        spans = [
            f"{name} has {len(x):,} rows from {x[0]:,} to {x[-1]:,}"
            for name, x in zip(names, at, strict=True)
        ]
        raise HistoryError(
            f"the runs have no steps in common: {'; '.join(spans)}. Align them by the fraction of their "
            "schedule instead: by='fraction' (--by fraction)."
        )
    if len(inside[0]) <= len(inside[1]):
        return a.isel(step=inside[0]), b.isel(step=_nearest(at[1], at[0][inside[0]]))
    return a.isel(step=_nearest(at[0], at[1][inside[1]])), b.isel(step=inside[1])


def _nearest(among: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Numbers of the elements of a rising array that are nearest to some points."""
    right = np.searchsorted(among, points).clip(1, max(len(among) - 1, 1))
    if len(among) == 1:
        return np.zeros(len(points), int)
    return right - (points - among[right - 1] <= among[right] - points)


def _without(rules: Mapping[str, Rule], common: list[str]) -> tuple[str, ...]:
    return tuple(name for name in rules if name not in common)


def _shares(states: np.ndarray) -> dict[str, float]:
    return {
        state.name.lower(): float((states == state).sum() / max(len(states), 1))
        for state in State
        if state >= 0
    }


def _parted_signals(a: xr.Dataset, b: xr.Dataset, patience: int) -> dict[str, Parting]:
    """Where the signals that both runs recorded part, as means over the layers."""
    names = [name for name in a["signal"].values.tolist() if name in b["signal"].values]
    one, other = (
        run["signal_value"].sel(signal=names).mean("layer").compute().transpose("signal", "step").values
        for run in (a, b)
    )
    steps = a["step"].values, b["step"].values
    found = {n: part_signals((one[i], other[i]), steps, patience) for i, n in enumerate(names)}
    return {name: parting for name, parting in found.items() if parting}


def _reads(book: Rulebook, axioms: Axioms, rule: Rule) -> set[str]:
    """The signals on which a rule rests; empty if the history does not tell."""
    predicates = [book.predicates[name] for name in axioms.measured(rule) if name in book.predicates]
    return {name for predicate in predicates for name in (judged(predicate)[0], predicate.signal)}
