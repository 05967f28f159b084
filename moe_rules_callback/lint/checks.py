"""What is wrong with rules that can be read: alone, and two by two.

A rule is well when a health rule is TRUE and a risk is FALSE, and fires when a risk is TRUE and a health
rule is FALSE. Of two rules it is asked

    contradictory   can both be well?
    subsumed        can the one fire, or without a kind be TRUE, while the other does not?

A rule that fires only when another one fires is fine where it says more: it is more severe, or it warms
up sooner. Of an axiom its evidence is asked after; `concluding` asks the rest about conclusions. What is
asked holds for one row of one layer, and thereby for the headline over layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from ..formula import SEVERITIES, Rule, variables
from .concluding import conclusion_findings
from .decide import TOLERANCE, Answer, Decision, Demand, Wanted, shared
from .features import Features
from .findings import Finding, Level
from .reading import Placed, Reading
from .truth import truth

Samples = dict[Wanted, np.ndarray]  # by how much a rule meets each demand at points drawn at random
CLOSE = 1e-3  # how well the largest truth of a rule is told
SAMPLES = 512  # points that spare most pairs a decision

STATES: tuple[Wanted, ...] = ("TRUE", "FALSE")
FIRES: dict[str | None, Wanted] = {"health": "FALSE", "risk": "TRUE", None: "TRUE"}
IS_WELL: dict[str | None, Wanted] = {"health": "TRUE", "risk": "FALSE"}
NOT: dict[Wanted, Wanted] = {"TRUE": "not TRUE", "FALSE": "not FALSE"}


class Checks:
    """Findings about the rules of a reading."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._axioms = reading.axioms
        sides = {name: self._axioms.sides(name) for name in self._axioms.names}
        whole = all(finding.code != "axiom" for finding in reading.findings)  # what was refused may say more
        self._features = Features(reading.predicates, reading.signals, sides if whole else {})
        self._decision = Decision(self._features)

    def findings(self) -> Iterator[Finding]:
        """All of them, rule by rule."""
        rules = [
            Placed(replace(rule, formula=self._axioms.stated(rule)), line)
            for rule, line in self._reading.rules
        ]
        sound: list[tuple[Placed, Samples]] = []
        for placed, samples in zip(rules, self._sampled([placed.rule for placed in rules]), strict=True):
            found = list(self._alone(placed, samples))
            yield from found
            if not found and not self._is_axiom(placed.rule):
                sound.append((placed, samples))
        yield from conclusion_findings(self._reading, self._decision)
        for (first, a), (second, b) in itertools.combinations(sound, 2):
            if shared(first.rule, second.rule, self._features):
                yield from self._pair(first, second, a, b)

    def _alone(self, placed: Placed, samples: Samples) -> Iterator[Finding]:
        rule = placed.rule
        if all((samples[wanted] >= 0).any() for wanted in STATES):
            return
        answers: dict[Wanted, Answer] = {
            wanted: self._decision.reach([Demand(rule, wanted)], close=CLOSE) for wanted in STATES
        }
        never: dict[Wanted, bool] = {wanted: not answer.possible for wanted, answer in answers.items()}
        if not any(never.values()):
            return
        only: dict[Wanted, bool] = {
            wanted: not self._decision.reach([Demand(rule, NOT[wanted])], TOLERANCE).possible
            for wanted in STATES
        }
        if only["TRUE"] or only["FALSE"] or all(never.values()):
            yield self._constant(placed, only, answers)
            return
        for wanted in STATES:
            if never[wanted] and self._matters(rule, wanted):
                yield self._never(placed, wanted, answers[wanted])

    def _is_axiom(self, rule: Rule) -> bool:
        return any(self._axioms.has(each) for each, _ in self._reading.rules if each.name == rule.name)

    def _matters(self, rule: Rule, wanted: Wanted) -> bool:
        """Whether a state is missed. Without evidence a conclusion is unknown: one state is enough for it."""
        concludes = not set(self._axioms.names).isdisjoint(variables(rule.formula))
        return not (concludes or self._is_axiom(rule)) or wanted == FIRES[rule.kind]

    def _subject(self, rule: Rule) -> str:
        return f"the evidence of axiom '{rule.name}'" if self._is_axiom(rule) else f"rule '{rule.name}'"

    def _remedy(self, rule: Rule, wanted: Wanted, remedy: str) -> str:
        """What to do about a state that is never reached: first of all, conclude what no axiom does."""
        pushes = self._axioms.pushes(rule.formula, wanted == "TRUE")
        lacking = [
            name if positive else f"~{name}"
            for name, positive in dict.fromkeys(pushes)
            if not self._features.concluded.get(name, (True, True))[0 if positive else 1]
        ]
        if not lacking:
            return remedy
        names = ", ".join(f"'{name}'" for name in lacking)
        return f"No axiom concludes {names}: write one, evidence -> {lacking[0]}."

    def _constant(self, placed: Placed, only: dict[Wanted, bool], answers: dict[Wanted, Answer]) -> Finding:
        rule = placed.rule
        state = next((state for state, holds in only.items() if holds), "UNKNOWN")
        ending = ""
        if rule.kind:
            ending = f", so that it {'always' if state == FIRES[rule.kind] else 'never'} fires"
        nearest = max(answer.proven for answer in answers.values())
        remedy = _reachable(rule.threshold + nearest) if state == "UNKNOWN" else _LOOK
        if state == "UNKNOWN":
            remedy = self._remedy(rule, FIRES[rule.kind], remedy)
        message = f"{self._subject(rule)} is {state} whatever its predicates say{ending}."
        return self._finding(placed, "error" if rule.kind else "warning", "constant", message, remedy)

    def _never(self, placed: Placed, wanted: Wanted, answer: Answer) -> Finding:
        rule = placed.rule
        fires = rule.kind is not None and FIRES[rule.kind] == wanted
        level: Level = "error" if fires else "warning" if wanted == "TRUE" or rule.kind else "note"
        ending = ", so that it never fires" if fires else ""
        demand = Demand(rule, wanted)
        if wanted == "TRUE":
            reach = math.ceil((demand.border + answer.proven) * 1e3 - 1e-6) / 1e3
            told = f"its lower bound reaches at most {reach:g}, and TRUE begins at {demand.border:g}"
        else:
            reach = math.floor((demand.border - answer.proven) * 1e3 + 1e-6) / 1e3
            told = f"its upper bound is {reach:g} at least, and FALSE begins at {demand.border:g}"
        witness = self._constant_witness(demand, answer)
        shown = f" (at {_told(witness)})" if witness else ""
        message = f"{self._subject(rule)} can never be {wanted}{ending}: {told}{shown}."
        remedy = self._remedy(rule, wanted, _reachable(rule.threshold + answer.proven))
        return self._finding(placed, level, f"never-{wanted.lower()}", message, remedy, witness)

    def _constant_witness(self, demand: Demand, answer: Answer) -> dict[str, tuple[float, float]]:
        """The point of an answer, where it alone and always shows what is told."""
        used = set(variables(demand.rule.formula))
        point = {name: interval for name, interval in answer.point.items() if name in used}
        alone = {(name, 0): interval for name, interval in point.items()}
        if not alone or demand.met_by(truth(demand.rule.formula, alone)) < answer.proven - CLOSE:
            return {}
        return {name: (float(interval[0]), float(interval[1])) for name, interval in point.items()}

    def _sampled(self, rules: list[Rule]) -> list[Samples]:
        rng = np.random.default_rng(0)
        z = [rng.uniform(low, high, SAMPLES) for low, high in self._features.ranges]
        atoms: dict[tuple[str, int], np.ndarray] = {}
        for name in dict.fromkeys(name for rule in rules for name in variables(rule.formula)):
            if (line := self._features.lines.get(name)) is not None:
                atoms[name, 0] = line.bounds(z[line.feature])
            else:
                rises, falls = self._features.concluded.get(name, (True, True))
                atoms[name, 0] = np.sort(rng.beta(0.3, 0.3, (SAMPLES, 2)), axis=-1)
                atoms[name, 0] = np.where([rises, falls], atoms[name, 0], [0.0, 1.0])
        truths = [truth(rule.formula, atoms) for rule in rules]
        return [
            {state: Demand(rule, state).met_by(interval) for state in (*STATES, *NOT.values())}
            for rule, interval in zip(rules, truths, strict=True)
        ]

    def _pair(self, first: Placed, second: Placed, a: Samples, b: Samples) -> Iterator[Finding]:
        one, two = first.rule, second.rule
        if one.kind and two.kind and self._excluded(one, IS_WELL[one.kind], two, IS_WELL[two.kind], a, b):
            message = (
                f"rule '{two.name}' ({two.kind}) can never be {IS_WELL[two.kind]} while '{one.name}' "
                f"({one.kind}, line {first.line}) is {IS_WELL[one.kind]}."
            )
            remedy = "They contradict each other, and no run can satisfy both: change or drop one."
            yield self._finding(second, "warning", "contradictory", message, remedy)
        if one.kind != two.kind:
            return
        forth = self._adds_nothing(one, two, a, b)
        back = self._adds_nothing(two, one, b, a)
        verb, again = ("fires", "does") if one.kind else ("is TRUE", "is")
        level: Level = "warning" if one.kind else "note"
        if forth and back:
            message = f"rule '{two.name}' {verb} exactly when '{one.name}' (line {first.line}) {again}."
            yield self._finding(second, "warning", "duplicate", message, "One of them is enough.")
        elif forth or back:
            (little, great), place = ((one, second), first) if forth else ((two, first), second)
            message = (
                f"rule '{little.name}' {verb} only when '{great.rule.name}' (line {great.line}) {verb} too."
            )
            remedy = "If it is stricter on purpose, give it a higher severity; else one of them is enough."
            yield self._finding(place, level, "subsumed", message, remedy if one.kind else "")

    def _adds_nothing(self, little: Rule, great: Rule, a: Samples, b: Samples) -> bool:
        """Whether `little` fires only when `great` fires, no sooner and no louder."""
        if little.kind and (great.warmup > little.warmup or _loudness(great) < _loudness(little)):
            return False
        fires = FIRES[little.kind]
        return self._excluded(little, fires, great, NOT[fires], a, b)

    def _excluded(
        self,
        one: Rule,
        wanted: Wanted,
        two: Rule,
        other: Wanted,
        a: Samples,
        b: Samples,
    ) -> bool:
        """Whether two rules can never be in these states together."""
        least = TOLERANCE if other.startswith("not") else -TOLERANCE
        if np.any(np.minimum(a[wanted], b[other]) >= least):
            return False
        return not self._decision.reach([Demand(one, wanted), Demand(two, other)], least).possible

    def _finding(
        self,
        placed: Placed,
        level: Level,
        code: str,
        message: str,
        remedy: str,
        witness: dict[str, tuple[float, float]] | None = None,
    ) -> Finding:
        line, name = placed.line, placed.rule.name
        return Finding(self._reading.file, line, level, code, name, message, remedy, witness or {})


_LOOK = "Look at its operators, weights and ramps."


def _reachable(threshold: float) -> str:
    """What to do about a threshold that is too high, when one a little below this is not."""
    return f"A threshold a little below {threshold:.3g} can be reached." if threshold > 0.51 else _LOOK


def _loudness(rule: Rule) -> int:
    return SEVERITIES.index(rule.severity)


def _told(witness: dict[str, tuple[float, float]]) -> str:
    def interval(lower: float, upper: float) -> str:
        return f"{lower:.3g}" if f"{lower:.3g}" == f"{upper:.3g}" else f"[{lower:.3g}, {upper:.3g}]"

    shown = [f"{name} = {interval(*bounds)}" for name, bounds in list(witness.items())[:4]]
    return ", ".join(shown + ["..."] * (len(witness) > 4))
