"""What is wrong with axioms and conclusions together, beyond what is wrong with any rule.

misnamed         a rule has the name of a conclusion, and is about something else
can-contradict   two axioms, one for and one against a name, can both speak
unjudged         a name is concluded, and nothing is made of it
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..axioms import Argument
from ..formula import variables
from .decide import TOLERANCE, Decision, Demand
from .findings import Finding
from .reading import Reading


def conclusion_findings(reading: Reading, decision: Decision) -> Iterator[Finding]:
    """All of them, name by name."""
    axioms, lines = reading.axioms, {rule.name: line for rule, line in reading.rules}
    for name in axioms.names:
        about = axioms.about(name)
        if name in lines:
            yield from _misnamed(reading, name)
        yield from _contradictions(reading, decision, name, lines)
        if about and not _is_used(reading, name):
            line = min(lines[argument.axiom.name] for argument in about)
            message = f"'{name}' is concluded, and no rule with a kind is about it, so that it never fires."
            remedy = f"Say how it is judged: a rule '{name}' with the text '0.8 :: {name}' and its kind."
            yield Finding(reading.file, line, "note", "unjudged", name, message, remedy)


def _misnamed(reading: Reading, name: str) -> Iterator[Finding]:
    for rule, line in reading.rules:
        if rule.name == name and (reading.axioms.has(rule) or name not in variables(rule.formula)):
            message = f"'{name}' is what a rule concludes, and the name of another thing: {rule.formula}."
            remedy = "Rename the rule: the conclusion has a row of its own under this name."
            yield Finding(reading.file, line, "error", "misnamed", name, message, remedy)


def _contradictions(
    reading: Reading, decision: Decision, name: str, lines: dict[str, int]
) -> Iterator[Finding]:
    """Of each axiom against a name, which for it can speak at once. Those that rest on other conclusions,
    whose truth is not known here, are not asked."""
    direct = [argument for argument in reading.axioms.about(name) if not argument.others]
    for against in direct:
        if against.literal.positive:
            continue
        both = [each for each in direct if each.literal.positive and _together(decision, each, against)]
        if both:
            told = ", ".join(f"'{each.axiom.name}' (line {lines[each.axiom.name]})" for each in both)
            message = (
                f"'{name}' can be CONTRADICTORY: the evidence of '{against.axiom.name}' against it and "
                f"that of {told} for it can be TRUE together."
            )
            line = lines[against.axiom.name]
            yield Finding(reading.file, line, "note", "can-contradict", against.axiom.name, message)


def _together(decision: Decision, one: Argument, other: Argument) -> bool:
    """Whether there is a point at which the premises of both are TRUE."""
    rules = [replace(each.axiom, formula=each.premises) for each in (one, other)]
    return decision.reach([Demand(rule, "TRUE") for rule in rules]).found >= -TOLERANCE


def _is_used(reading: Reading, name: str) -> bool:
    """Whether a rule with a kind judges a name, or an axiom takes it for evidence."""
    for rule, _ in reading.rules:
        if name in variables(reading.axioms.stated(rule)) and (rule.kind or reading.axioms.has(rule)):
            return True
    return False
