"""`fit`: learn, score on runs held out, and keep the old rule unless the new one is better there."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from ..errors import FitError
from ..formula import Rule, variables
from ..predicates import Predicate
from ..rulebook import Rulebook, Source, load_rules
from .labels import Intervals, Label, by_name, inside, require_enough
from .learner import Learner, Outcome
from .parameters import GROUPS, Parameter, parameters, spelled_out, with_weights
from .rows import Rows, read_rows, replayed

if TYPE_CHECKING:
    from .rows import Run

FOLDS = 10
DOUBT = 0.01  # chance, one-sided, at which a rule that is no better is accepted
SAME = 1e-5  # truth that the evaluator and a fit may differ by, from rounding


@dataclass(frozen=True)
class Change:
    """A parameter: what it is, its shipped and its learnt value."""

    label: str
    before: float
    after: float


@dataclass(frozen=True)
class Ablation:
    """What a rule reaches on held-out runs without a part of what was learnt, or without an operand."""

    what: str
    outcome: Outcome


@dataclass(frozen=True)
class RuleFit:
    """A rule that was fitted.

    Attributes:
        rule: the new one, whether accepted or not.
        predicates: learnt ones that it reads, by name.
        accepted: on held-out runs it is better than the old one, and than one that always or never fires, by
            more than chance gives in 1 of 100 fits (Student's t over runs).
        runs: in how many it ought to be TRUE, and in how many not.
        before, after: on held-out runs.
        gain: of balanced accuracy, and its standard error over runs.
        changes: of its parameters, fitted on all runs.
        ablations: first of groups of parameters, then of operands.
        notes: what was not learnt, and why.
    """

    rule: Rule
    predicates: Mapping[str, Predicate]
    accepted: bool
    runs: tuple[int, int]
    before: Outcome
    after: Outcome
    gain: tuple[float, float]
    changes: tuple[Change, ...]
    ablations: tuple[Ablation, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Fitted:
    """What `fit` gives; printing it shows the scores.

    Attributes:
        rules: the book, with the rules that were accepted in the place of the old ones.
        fits: one for each rule that has labels.
    """

    rules: Rulebook
    fits: tuple[RuleFit, ...]

    @property
    def accepted(self) -> bool:
        """Whether any rule was."""
        return any(each.accepted for each in self.fits)

    def __str__(self) -> str:
        from .text import told

        return told(self)


def fit(
    rules: Source, runs: Mapping[str, Run] | Sequence[Run], labels: Mapping[str, Label] | Sequence[Label]
) -> Fitted:
    """Learns the weights of operands and the offsets and slopes of predicates from labelled runs.

    Each rule with labels is fitted by itself. A predicate that another rule of the book reads too keeps its
    ramp, so that no rule changes that nobody labelled.

    Args:
        rules: as for `load_rules`.
        runs: by name, or in a list: histories of `open_history`, paths of histories or logs, or recordings of
            `runs.read_recording`.
        labels: of each run the steps in which the rule ought to be TRUE, as (first, last), both included,
            last None for the end; None where it never ought to be. Where the book has several rules, a
            mapping from the name of a rule to that.

    Raises:
        FitError: fewer than 3 runs of one kind, or labels that do not belong to the runs.
        MissingSignalError: a run lacks the signals of a rule that is labelled in it.
    """
    book = load_rules(rules)
    runs, intervals = by_name(runs, labels, book)
    if not intervals:
        raise FitError("there are no labels: say for each run in which steps a rule ought to be TRUE.")
    for name, of in intervals.items():
        require_enough(name, of.values())
    rows = {
        name: read_rows(run, name, _labelled(book, name, intervals))
        for name, run in runs.items()
        if any(name in of for of in intervals.values())
    }
    fits = tuple(
        _fit_rule(rule, book, rows, intervals[rule.name]) for rule in book.rules if rule.name in intervals
    )
    fitted = _updated(book, [each for each in fits if each.accepted])
    for each in fits:
        if each.accepted:
            _check(each, fitted, runs, rows, intervals[each.rule.name])
    return Fitted(fitted, fits)


def _fit_rule(
    rule: Rule, book: Rulebook, rows: Mapping[str, Rows], labels: Mapping[str, Intervals]
) -> RuleFit:
    rows = {name: rows[name] for name in labels}
    truths = _truths(rule.name, rows, labels)
    others = {name for other in book.rules if other is not rule for name in variables(other.formula)}
    predicates, ramps, notes = _ramps(rule, others, rows)
    learnable = parameters(rule, ramps)
    if not learnable:
        raise FitError(f"rule '{rule.name}' has nothing to learn: {'; '.join(notes)}.")
    learner = Learner(rule, predicates | ramps, learnable, rows, truths)
    shipped = np.zeros(len(learnable))
    _compare(rule.name, learner.truths(shipped), rows)

    folds = _folds([bool(labels[name]) for name in rows])
    free = np.ones(len(learnable), bool)
    thetas, after = _held_out(learner, folds, free)
    before = learner.outcome(shipped)
    gain = after.accuracy - before.accuracy
    error = _error(after.caught - before.caught, after.quiet - before.quiet)
    positive = sum(map(bool, labels.values()))
    counts = positive, len(labels) - positive
    sure = float(stdtrit(min(counts) - 1, 1 - DOUBT))  # Student's t: so many standard errors
    ablations = []
    for group in GROUPS:
        members = np.array([each.group == group for each in learnable])
        if members.any():
            ablations.append(Ablation(f"{group} as shipped", _held_out(learner, folds, free & ~members)[1]))
    for i, each in enumerate(learnable):
        if each.group == "weights":
            without = [np.where(np.arange(len(theta)) == i, each.theta(0.0), theta) for theta in thetas]
            what = each.label.removeprefix("weight of ")
            ablations.append(Ablation(f"leaving out {what}", _joined(learner, folds, without)))

    theta = learner.fit(np.ones(len(rows), bool), free)
    values = [each.rounded(x) for each, x in zip(learnable, theta.tolist(), strict=True)]
    return RuleFit(
        *_with(rule, ramps, learnable, values),
        accepted=gain > sure * error and after.accuracy - 0.5 > sure * _error(after.caught, after.quiet),
        runs=counts,
        before=before,
        after=after,
        gain=(gain, error),
        changes=tuple(Change(p.label, p.start, value) for p, value in zip(learnable, values, strict=True)),
        ablations=tuple(ablations),
        notes=tuple(notes),
    )


def _truths(rule: str, rows: Mapping[str, Rows], labels: Mapping[str, Intervals]) -> dict[str, np.ndarray]:
    return {
        name: inside(labels[name], each.steps, f"run '{name}', rule '{rule}'") for name, each in rows.items()
    }


def _ramps(
    rule: Rule, others: Collection[str], rows: Mapping[str, Rows]
) -> tuple[dict[str, Predicate], dict[str, Predicate], list[str]]:
    """All predicates of a rule, those whose ramps can be learnt, and why the others cannot."""
    known = next(iter(rows.values())).predicates
    sizes = sorted({size for each in rows.values() for size in each.sizes})
    predicates, ramps, notes = {}, {}, []
    for name in dict.fromkeys(variables(rule.formula)):
        predicates[name] = known[name]
        if name in others:
            notes.append(f"the ramp of {name} is kept: another rule reads it too")
        elif (spelled := spelled_out(known[name], sizes)) is None:
            notes.append(
                f"the ramp of {name} is kept: it follows the number of experts, and runs differ in it"
            )
        else:
            ramps[name] = spelled
            if spelled.offset is None:
                notes.append(f"{name} has no offset: its signal is judged against its own last rows")
    return predicates, ramps, notes


def _with(
    rule: Rule, ramps: Mapping[str, Predicate], learnable: Sequence[Parameter], values: Sequence[float]
) -> tuple[Rule, dict[str, Predicate]]:
    """The rule and its predicates with learnt values."""
    pairs = list(zip(learnable, values, strict=True))
    weights = {p.of: value for p, value in pairs if not isinstance(p.of, str)}
    formula = with_weights(rule.formula, weights)
    changed = dict(ramps)
    for p, value in pairs:
        if isinstance(p.of, str):
            changed[p.of] = replace(changed[p.of], **{p.group.removesuffix("s"): value})
    return replace(rule, formula=formula, text=f"{rule.threshold} :: {formula}"), changed


def _folds(positive: Sequence[bool]) -> list[np.ndarray]:
    """bool [R] of each fold: the runs held out, of both kinds in turn; one run each where there are few."""
    order = np.argsort(~np.array(positive), kind="stable")
    fold = np.empty(len(positive), int)
    fold[order] = np.arange(len(positive)) % FOLDS
    return [fold == i for i in range(min(FOLDS, len(positive)))]


def _held_out(
    learner: Learner, folds: Sequence[np.ndarray], free: np.ndarray
) -> tuple[list[np.ndarray], Outcome]:
    """Coordinates fitted without each fold, and the outcome there."""
    thetas = [learner.fit(~fold, free) for fold in folds]
    return thetas, _joined(learner, folds, thetas)


def _joined(learner: Learner, folds: Sequence[np.ndarray], thetas: Sequence[np.ndarray]) -> Outcome:
    outcomes = [learner.outcome(theta) for theta in thetas]
    own = np.argmax(folds, axis=0)  # of each run the fold that it was held out in
    runs = np.arange(len(own))
    return Outcome(
        np.stack([each.caught for each in outcomes])[own, runs],
        np.stack([each.quiet for each in outcomes])[own, runs],
        np.stack([each.cross_entropy for each in outcomes])[own, :, runs].T,
    )


def _error(caught: np.ndarray, quiet: np.ndarray) -> float:
    """Standard error, over runs, of half the sum of two means; NaN stands for no value."""
    known = [x[np.isfinite(x)] for x in (caught, quiet)]
    return float(np.sqrt(sum(x.var(ddof=1) / len(x) for x in known))) / 2


def _labelled(book: Rulebook, run: str, intervals: Mapping[str, Mapping[str, Intervals]]) -> Rulebook:
    """The rules of a book that have labels in a run."""
    rules = tuple(rule for rule in book.rules if run in intervals.get(rule.name, ()))
    return replace(book, rules=rules, shipped=False, complete=True)


def _updated(book: Rulebook, fits: Sequence[RuleFit]) -> Rulebook:
    if not fits:
        return book
    new = {each.rule.name: each.rule for each in fits}
    learnt = {name: predicate for each in fits for name, predicate in each.predicates.items()}
    rules = tuple(new.get(rule.name, rule) for rule in book.rules)
    return replace(book, rules=rules, predicates={**book.predicates, **learnt}, shipped=False)


def _check(
    fitted: RuleFit,
    book: Rulebook,
    runs: Mapping[str, Run],
    rows: Mapping[str, Rows],
    labels: Mapping[str, Intervals],
) -> None:
    """The evaluator, given the new rule, says what the fit says, in the first run with an interval."""
    rule = fitted.rule
    name = next(name for name in labels if labels[name])
    only = replace(book, rules=(rule,), complete=True)
    judged = replace(rows[name], truth={rule.name: replayed(runs[name], name, only).truth[:, 0]})
    predicates = dict(judged.predicates) | dict(fitted.predicates)
    learner = Learner(rule, predicates, (), {name: judged}, _truths(rule.name, {name: judged}, labels))
    _compare(rule.name, learner.truths(np.zeros(0)), {name: judged})


def _compare(rule: str, truths: Sequence[np.ndarray], rows: Mapping[str, Rows]) -> None:
    for found, (name, each) in zip(truths, rows.items(), strict=True):
        if not np.allclose(found, each.truth[rule], rtol=0, atol=SAME):
            raise FitError(
                f"rule '{rule}' cannot be fitted: in run '{name}' its truth rests on more than its weights "
                "and the ramps of its predicates. Set its thresholds yourself, and please report this."
            )
