"""The axioms among rules, and what each says of a name that it concludes.

    axioms = Axioms(rules, predicates)
    axioms.names                                      # ("starved",)
    axioms.about("starved")[0].premises               # what makes it true, or false
    axioms.role(rule)                                 # "axiom", "conclusion" or "rule"

`deduction` infers from all of them at once, in arrays; this is for those who ask what was inferred from what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from . import logic
from .conclusions import Clause, clauses, concluded, evidence_of, is_axiom
from .conclusions import Literal as Conclusion
from .formula import Connective, Formula, Not, Rule, Var, children, variables
from .predicates import Predicate, is_measured

Role = Literal["conclusion", "rule", "axiom"]


@dataclass(frozen=True)
class Argument:
    """What an axiom says of one name: that is at least as true as the premises, over the literal's weight.

    Attributes:
        axiom: the rule.
        literal: the name or its negation.
        evidence: what is measured, or None.
        others: what must hold beside it of other concluded names, each with its weight.
    """

    axiom: Rule
    literal: Conclusion
    evidence: Formula | None
    others: tuple[tuple[Formula, float], ...]

    @property
    def premises(self) -> Formula:
        """The weighted conjunction of evidence and others."""
        parts = [(part, 1.0) for part in conjuncts(self.evidence)] if self.evidence else []
        parts += self.others
        if len(parts) == 1 and parts[0][1] == 1:
            return parts[0][0]
        operands, weights = zip(*parts, strict=True)
        return Connective("and", operands, weights)


class Axioms:
    """The axioms among rules.

    Args:
        rules: all of a run or a book.
        predicates: those that are defined, by name.
        names: what is concluded; None: what these rules conclude.

    Attributes:
        names: what is concluded.
    """

    def __init__(
        self, rules: Iterable[Rule], predicates: Mapping[str, Predicate], names: Sequence[str] | None = None
    ) -> None:
        rules = list(rules)
        self.names = concluded(rules, partial(is_measured, own=predicates)) if names is None else tuple(names)
        self._arguments: dict[str, list[Argument]] = {name: [] for name in self.names}
        for rule in rules:
            for clause in clauses(rule, self.names) if self.has(rule) else ():
                for literal in clause.literals:
                    self._arguments[literal.name].append(_argument(rule, clause, literal))

    def has(self, rule: Rule) -> bool:
        """Whether a rule is one of them."""
        return is_axiom(rule, self.names)

    def about(self, name: str) -> Sequence[Argument]:
        """What they say of a name; nothing of one that is not concluded."""
        return self._arguments.get(name, ())

    def sides(self, name: str) -> tuple[bool, bool]:
        """Whether any axiom can raise the lower bound of a name, and whether any can cut its upper bound."""
        signs = {argument.literal.positive for argument in self.about(name)}
        return True in signs, False in signs

    def pushes(self, formula: Formula, up: bool) -> Iterator[tuple[str, bool]]:
        """Concluded names, each with whether it or its negation makes a formula true (`up`) or false."""
        return ((name, positive == up) for name, positive in self._raising(formula))

    def _raising(self, formula: Formula) -> dict[tuple[str, bool], None]:
        """`pushes` upwards, each pair once: a chain of n equivalences is no tree of 2^n."""
        match formula:
            case Var(name):
                return {(name, True): None} if name in self.names else {}
            case Not(operand):
                return _flipped(self._raising(operand))
            case Connective("iff" | "xor", operands):
                sides = [self._raising(operand) for operand in operands]
                return _united(each for side in sides for each in (side, _flipped(side)))
            case Connective(kind, operands, weights):
                signs = logic.coefficients(kind, weights)[1]
                found = [self._raising(operand) for operand in operands]
                return _united(one if c > 0 else _flipped(one) for one, c in zip(found, signs, strict=True))
            case _:
                return _united(map(self._raising, children(formula)))

    def stated(self, rule: Rule) -> Formula:
        """The formula whose truth the row of a rule holds: of an axiom its evidence."""
        return evidence_of(rule) if self.has(rule) else rule.formula

    def role(self, rule: Rule) -> Role:
        """An axiom; a conclusion if it is over concluded names; else a rule over what is measured."""
        if self.has(rule):
            return "axiom"
        return "rule" if set(self.names).isdisjoint(variables(rule.formula)) else "conclusion"

    def grounds(self, rule: Rule) -> tuple[Formula, ...]:
        """All formulas on which the row of a rule rests: its own, then the premises of conclusions."""
        found: dict[Formula, None] = {}
        waiting = [self.stated(rule)]
        while waiting:
            formula = waiting.pop(0)
            if formula not in found:
                found[formula] = None
                waiting += [each.premises for name in variables(formula) for each in self.about(name)]
        return tuple(found)

    def measured(self, rule: Rule) -> tuple[str, ...]:
        """The predicates on which the row of a rule rests, be it by way of conclusions."""
        names = (name for formula in self.grounds(rule) for name in variables(formula))
        return tuple(dict.fromkeys(name for name in names if name not in self._arguments))


def _flipped(pairs: Iterable[tuple[str, bool]]) -> dict[tuple[str, bool], None]:
    return {(name, not positive): None for name, positive in pairs}


def _united(parts: Iterable[Iterable[tuple[str, bool]]]) -> dict[tuple[str, bool], None]:
    return dict.fromkeys(pair for part in parts for pair in part)


def _argument(rule: Rule, clause: Clause, literal: Conclusion) -> Argument:
    others = tuple(
        (Not(Var(other.name)) if other.positive else Var(other.name), other.weight)
        for other in clause.literals
        if other is not literal
    )
    return Argument(rule, literal, clause.evidence, others)


def conjuncts(formula: Formula) -> tuple[Formula, ...]:
    """What an unweighted & joins; of any other formula itself."""
    if isinstance(formula, Connective) and formula.kind == "and" and set(formula.weights) == {1.0}:
        return formula.operands
    return (formula,)
