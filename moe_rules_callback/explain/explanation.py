"""Gathers what there is to say of a rule at one step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import HistoryError
from ..formula import Not, Rule, RuleKind, Var, variables
from ..proof import Proofs, deciding_layer
from ..records import State
from ..replay import own_rules
from ..verdicts import verdicts
from .counterfactual import Change, changes
from .moment import Moment
from .tree import Part, Tree, parts_of

if TYPE_CHECKING:
    import xarray as xr

Truth = tuple[float, float]
DIFFERS = 1e-3  # truth that two machines cannot disagree about by rounding


@dataclass(frozen=True)
class Expert:
    """An expert, and its share of the deciding layer's assignments."""

    number: int
    share: float


@dataclass(frozen=True)
class Explanation:
    """A rule in one row.

    Attributes:
        rule, text, kind, threshold: of the rule.
        step: of the row.
        state, truth: of the rule there, over all layers.
        layer: the one that decides, or is nearest to deciding; "" if the rule reads nothing of a layer.
        layers: how many there are.
        tree: the formula, in that layer.
        busiest, idlest: experts of that layer, None if no share was recorded.
        fair_share: 1 / E.
        changes: for each signal the smallest change that would have given another state, least first.
        notes: what else is to be known.
    """

    rule: str
    text: str
    kind: RuleKind
    threshold: float
    step: int
    state: State
    truth: Truth
    layer: str
    layers: int
    tree: Part
    busiest: Expert | None
    idlest: Expert | None
    fair_share: float
    changes: tuple[Change, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; NaN as None."""
        return _plain(asdict(self))

    def __str__(self) -> str:
        from .text import told

        return told(self)


def explain(history: xr.Dataset, rule: str | None = None, step: int | None = None) -> Explanation:
    """Explain a rule at a step.

    Args:
        history: as `open_history` gives it, with the signals that its rules read.
        rule: its name; None: the first that fired.
        step: the nearest recorded one is taken; None: where the rule first fired, else the last.

    Raises:
        HistoryError: no rows, or no rule given and none fired.
        UnknownNameError: no such rule.
        MissingSignalError: the history lacks a signal, so that nothing can be judged again.
    """
    if not history.sizes["step"]:
        raise HistoryError("there is nothing to explain: the history has no rows.")
    rule, step, notes = _which(history, rule, step)
    row = int(np.abs(history["step"].values - step).argmin())
    taken = int(history["step"].values[row])
    if taken != step:
        notes.append(f"Step {step:,} was not recorded; step {taken:,} is the nearest.")
    book = own_rules(history)
    number = [each.name for each in book.rules].index(rule)
    past, found = history.isel(step=slice(row + 1)), book.rules[number]
    if taken < found.warmup:
        notes.append(f"It warms up until step {found.warmup:,} and does not fire before.")
    layer = _deciding(past, number, found)
    proofs = Proofs(past)
    axioms, stated = proofs.axioms, proofs.axioms.stated(found)
    if axioms.has(found):
        notes.append("An axiom: what is judged here is its evidence, from which the rest is taken to follow.")
    parts = parts_of(*axioms.grounds(found))
    # ~~: a part such as evidence -> name must not become an axiom itself.
    rules = (*book.rules, *(Rule(f"part {i}", Not(Not(part))) for part, i in parts.items()))
    moment = Moment(past, replace(book, rules=rules), layer)
    state, truth = moment.verdict(number, moment.now[number])
    notes += _doubts(past, number, state, truth)
    ours = np.concatenate([moment.past, moment.now[None, :, layer]])[:, len(book.rules) :]
    trees = Tree(past, book.predicates, axioms, parts, ours, layer)
    busiest, idlest, fair = _experts(past, layer)
    measured = axioms.measured(found)
    local = any(trees.per_layer(name) for name in measured)
    found_changes = changes(moment, number, measured, not set(axioms.names).isdisjoint(variables(stated)))
    if not found_changes:
        notes += _held_by_several(proofs, found)
    return Explanation(
        rule=rule,
        text=" ".join(found.text.split()),
        kind=found.kind,
        threshold=found.threshold,
        step=taken,
        state=state,
        truth=truth,
        layer=past["layer"].values.tolist()[layer] if local else "",
        layers=past.sizes["layer"],
        tree=trees.of(stated),
        busiest=busiest if local else None,
        idlest=idlest if local else None,
        fair_share=fair,
        changes=tuple(found_changes),
        notes=tuple(notes + trees.notes()),
    )


def _doubts(past: xr.Dataset, number: int, state: State, truth: Truth) -> list[str]:
    """Whether the record of the last row is what its signals give."""
    recorded = past["truth"].transpose("step", "rule", "bound").values[-1, number]
    same = int(past["state"].transpose("step", "rule").values[-1, number]) == state
    if same and np.allclose(recorded, truth, rtol=0, atol=DIFFERS):
        return []
    return [
        f"The record of this step says [{recorded[0]:.2f}, {recorded[1]:.2f}], which its signals do not "
        "give: rows before it are missing, or another version wrote it. What is told here was judged anew."
    ]


def _which(history: xr.Dataset, rule: str | None, step: int | None) -> tuple[str, int, list[str]]:
    """The rule and the step to explain, and how they were chosen."""
    found = {verdict.rule: verdict for verdict in verdicts(history)}
    notes = []
    if rule is None:
        fired = sorted((v for v in found.values() if v.fired), key=lambda v: v.first_step or 0)
        if not fired:
            raise HistoryError(
                f"no rule fired in this run, so which one is to be explained? Name one: {', '.join(found)}."
            )
        rule = fired[0].rule
        listed = ", ".join(f"{v.rule} (step {v.first_step:,})" for v in fired)
        notes.append(f"Rules that fired, by the step where they first did: {listed}.")
    history.moe_rules[rule]  # raises if there is none
    if step is None:
        first, last = found[rule].first_step, int(history["step"].values[-1])
        notes.append("This is where it first fired." if first is not None else "It never fired; last row.")
        step = last if first is None else first
    return rule, step, notes


def _held_by_several(proofs: Proofs, rule: Rule) -> list[str]:
    """That no one signal carries a conclusion, where several axioms do, each for itself."""
    reasons = proofs(rule.name, -1) if isinstance(rule.formula, Var) else ()
    enough = [reason.axiom for reason in reasons if reason.strength >= rule.threshold]
    if len(enough) < 2:
        return []
    return [f"Each of {len(enough)} axioms is enough for this state by itself: {', '.join(enough)}."]


def _deciding(past: xr.Dataset, number: int, rule: Rule) -> int:
    """The layer whose bound makes the headline; if that is UNKNOWN, the one nearest to firing."""
    truth = past["truth_layer"].isel(step=-1).transpose("rule", "layer", "bound").values[number]
    state = State(int(past["state"].transpose("step", "rule").values[-1, number]))
    return deciding_layer(truth, state, rule.kind == "risk")


def _experts(past: xr.Dataset, layer: int) -> tuple[Expert | None, Expert | None, float]:
    """The busiest and the idlest expert of a layer, and what would be fair."""
    if "expert_share" not in past:
        return None, None, float("nan")
    share = past["expert_share"].isel(step=-1).transpose("layer", "expert").values[layer]
    sizes: Sequence[Any] = json.loads(past.attrs["routers"])
    experts = sizes[layer][0] if sizes else int(np.isfinite(share).sum())
    if not np.isfinite(share).any():
        return None, None, 1 / max(experts, 1)
    high, low = int(np.nanargmax(share)), int(np.nanargmin(share))
    return Expert(high, float(share[high])), Expert(low, float(share[low])), 1 / experts


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    match value:
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case State():
            return value.name.lower()
        case float():
            return value if np.isfinite(value) else None
        case _:
            return value
