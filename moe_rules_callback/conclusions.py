"""Rules that conclude: `evidence -> illness`, where nothing measures the illness.

    loads:    always[16](high_load_cv) -> collapse
    pupils:   high_router_mutual_information -> ~collapse

Such rules are axioms: what they say is taken for true, and the truth of the name on the right follows. This
is the downward inference of Logical Neural Networks (Riegel et al. 2020, arXiv 2006.13155): of x -> y, which
is certain, with x in [L, U] follows y >= L; of x -> ~y follows y <= 1 - L. Several axioms tighten the same
name together, and where they disagree its lower bound comes to stand above its upper: a contradiction.

An axiom is brought into clauses: its literals' weighted disjunction is at least as true as the evidence,

    evidence & a -> b | 2*~c        sum(1 - a, b, 2 (1 - c)) >= evidence

so that `deduction` can infer from all of them with a few array operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .errors import RulebookError
from .formula import Connective, Formula, Not, Rule, Var, variables


@dataclass(frozen=True)
class Literal:
    """A concluded name or its negation, with its weight > 0."""

    name: str
    positive: bool
    weight: float = 1.0


@dataclass(frozen=True)
class Clause:
    """The literals' weighted disjunction is at least as true as the evidence; without evidence it is true.

    Attributes:
        evidence: a formula over what is measured, or None.
        literals: of different names, at least one.
    """

    evidence: Formula | None
    literals: tuple[Literal, ...]


def concluded(rules: Iterable[Rule], measured: Callable[[str], bool]) -> tuple[str, ...]:
    """The names that rules conclude: on the right of a top-level `->` or `<->`, and not measured."""
    names = (
        name
        for rule in rules
        if (sides := _sides(rule.formula))
        for name in variables(sides[1])
        if not measured(name)
    )
    return tuple(dict.fromkeys(names))


def is_axiom(rule: Rule, names: Iterable[str]) -> bool:
    """Whether a rule concludes one of the names."""
    sides = _sides(rule.formula)
    return sides is not None and not set(names).isdisjoint(variables(sides[1]))


def evidence_of(rule: Rule) -> Formula:
    """The left side of an axiom."""
    sides = _sides(rule.formula)
    assert sides is not None
    return sides[0]


def clauses(rule: Rule, names: Sequence[str]) -> tuple[Clause, ...]:
    """The clauses of an axiom.

    Raises:
        RulebookError: its sides are neither literals nor what clauses can be made of.
    """
    formula = rule.formula
    assert isinstance(formula, Connective)
    left, right = formula.operands
    if formula.kind == "implies":
        return _implied(rule, left, right, formula.weights[1], frozenset(names))
    if not isinstance(_bare(right), Var):
        raise _refused(rule, "on the right of <-> stands one name or its negation")
    known = frozenset(names)
    return (*_implied(rule, left, right, 1.0, known), *_implied(rule, Not(left), _negated(right), 1.0, known))


def _implied(
    rule: Rule, left: Formula, right: Formula, weight: float, names: frozenset[str]
) -> tuple[Clause, ...]:
    if isinstance(right, Connective) and right.kind == "and" and not _measured(right, names):
        if weight != 1 or set(right.weights) != {1.0}:
            raise _refused(rule, "names that are concluded together with & have no weights")
        return tuple(_clause(rule, left, [(operand, 1.0)], names) for operand in right.operands)
    if isinstance(right, Connective) and right.kind == "or" and not _measured(right, names):
        weights = (weight * own for own in right.weights)
        return (_clause(rule, left, list(zip(right.operands, weights, strict=True)), names),)
    return (_clause(rule, left, [(right, weight)], names),)


def _clause(
    rule: Rule, left: Formula, alternatives: list[tuple[Formula, float]], names: frozenset[str]
) -> Clause:
    premises: list[Formula] = []
    literals: list[Literal] = []
    for part in _conjuncts(left, names):
        if _measured(part, names):
            premises.append(part)
        else:
            literals.append(_literal(rule, _negated(part), 1.0, names))
    for part, weight in alternatives:
        if not _measured(part, names):
            literals.append(_literal(rule, part, weight, names))
        elif weight == 1:
            premises.append(_negated(part))
        else:
            raise _refused(rule, "what is measured and stands on the right has no weight")
    if len({literal.name for literal in literals}) < len(literals):
        raise _refused(rule, "each concluded name stands there once")
    if len(premises) > 1:
        return Clause(Connective("and", tuple(premises)), tuple(literals))
    return Clause(premises[0] if premises else None, tuple(literals))


def _conjuncts(left: Formula, names: frozenset[str]) -> tuple[Formula, ...]:
    """Parts of a left side: its operands where it joins concluded names with others by an unweighted &."""
    if isinstance(left, Connective) and left.kind == "and" and set(left.weights) == {1.0}:
        return (left,) if _measured(left, names) else left.operands
    return (left,)


def _literal(rule: Rule, part: Formula, weight: float, names: frozenset[str]) -> Literal:
    bare = _bare(part)
    if not isinstance(bare, Var):
        raise _refused(rule, "a concluded name stands alone, negated with ~, joined on the left by & only")
    return Literal(bare.name, part == bare, weight)


def _bare(part: Formula) -> Formula:
    return part.operand if isinstance(part, Not) else part


def _negated(part: Formula) -> Formula:
    return part.operand if isinstance(part, Not) else Not(part)


def _measured(part: Formula, names: frozenset[str]) -> bool:
    return names.isdisjoint(variables(part))


def _sides(formula: Formula) -> tuple[Formula, ...] | None:
    """Left and right of a top-level implication or equivalence."""
    if isinstance(formula, Connective) and formula.kind in ("implies", "iff"):
        return formula.operands
    return None


def _refused(rule: Rule, why: str) -> RulebookError:
    return RulebookError(
        f"rule '{rule.name}' concludes what nothing measures, and {why}: {rule.formula}. Write it as several "
        f"rules, evidence -> name or evidence -> ~name; a window or warm-up goes into the evidence, or into "
        f"a rule over the name."
    )
