"""Rules some of which conclude, compiled: what is measured, then what follows, then rules over that.

    deduction = Deduction(rules, ["collapse"])        # a `Program`, with the names that are concluded
    deduction.atoms                                   # the predicates that are measured

The row of an axiom holds the truth of its evidence: how far it speaks. The row of a rule over a concluded
name holds what follows for that name from all axioms together.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .conclusions import Clause, clauses, evidence_of, is_axiom
from .formula import Formula, Rule, variables
from .program import Program, States
from .temporal import UNKNOWN

ROUNDING = 1e-6  # by which bounds may cross without a contradiction


class Deduction:
    """Rules evaluated together, as `Program` does, with names inferred from axioms.

    Args:
        rules: axioms and others.
        names: those that axioms conclude.

    Attributes:
        atoms: the predicates that occur, without the concluded names.

    Raises:
        RulebookError: an axiom of another form than `conclusions` describes.
    """

    def __init__(self, rules: Sequence[Rule], names: Sequence[str]) -> None:
        axioms = [rule for rule in rules if is_axiom(rule, names)]
        self._inference = Inference([clause for rule in axioms for clause in clauses(rule, names)], names)
        wanted = [evidence_of(rule) if rule in axioms else rule.formula for rule in rules]
        later = np.array([not set(names).isdisjoint(variables(formula)) for formula in wanted], bool)
        now = [formula for formula, late in zip(wanted, later, strict=True) if not late]
        self._now = Program([*now, *self._inference.evidence])
        self._later = Program([formula for formula, late in zip(wanted, later, strict=True) if late])
        more = [a for a in self._later.atoms if a not in names and a not in self._now.atoms]
        self.atoms = (*self._now.atoms, *more)
        known = (*self.atoms, *names)
        self._taken = np.array([known.index(atom) for atom in self._later.atoms], int)
        self._rows = np.argsort(np.argsort(later, kind="stable"))
        self._direct, self._names = len(now), len(names)

    def init(self, layers: int) -> States:
        """State before the first row."""
        return (*self._now.init(layers), *self._later.init(layers))

    def update(
        self, states: States, atoms: jax.Array, bad: jax.Array, row: jax.Array, step: jax.Array
    ) -> tuple[States, jax.Array]:
        """Take in one row, see `Program.update`."""
        measured, stages = len(self._now.atoms), self._now.stages
        first, truth = self._now.update(states[:stages], atoms[:measured], bad[:measured], row, step)
        inferred = self._inference(truth[self._direct :])
        known = jnp.concatenate([atoms, inferred])[self._taken]
        unknown = jnp.concatenate([bad, jnp.zeros(inferred.shape[:2], bool)])[self._taken]
        second, over = self._later.update(states[stages:], known, unknown, row, step)
        return (*first, *second), jnp.concatenate([truth[: self._direct], over])[self._rows]


class Inference:
    """Bounds of N concluded names from K clauses.

    A clause with literals l_i of weights w_i and evidence e is the linear inequality sum_i w_i l_i >= e: the
    root of the axiom is true, and a clamp at 1 does not matter below it. Each literal is at least what the
    others cannot reach, w_i l_i >= e - sum_(j != i) w_j max l_j. Where clauses join several names this is
    done once for each name, so that what follows from one reaches all.

    Args:
        clauses: K of them.
        names: N of them.

    Attributes:
        evidence: the formulas whose truth the call is given.
    """

    def __init__(self, clauses: Sequence[Clause], names: Sequence[str]) -> None:
        formulas = [clause.evidence for clause in clauses if clause.evidence is not None]
        self.evidence: tuple[Formula, ...] = tuple(dict.fromkeys(formulas))
        always = len(self.evidence)  # a row of its own: true
        self._evidence = np.array(
            [always if c.evidence is None else self.evidence.index(c.evidence) for c in clauses], int
        )
        self._weight = np.zeros((len(clauses), len(names), 1), np.float32)
        self._sign = np.zeros_like(self._weight)
        for k, clause in enumerate(clauses):
            for literal in clause.literals:
                self._weight[k, names.index(literal.name)] = literal.weight
                self._sign[k, names.index(literal.name)] = 1 if literal.positive else -1
        joined = any(len(clause.literals) > 1 for clause in clauses)
        self._passes = len(names) if joined else 1

    def __call__(self, evidence: jax.Array) -> jax.Array:
        """Truth intervals of the names [N, layers, 2], of those of the evidence [evidence, layers, 2]."""
        true = jnp.ones_like(evidence[:1, :, 0]) if len(evidence) else jnp.ones((1, evidence.shape[1]))
        least = jnp.concatenate([evidence[..., 0], true])[self._evidence][:, None]  # [K, 1, layers]
        weight, sign = self._weight, self._sign

        def tighten(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            lower, upper = bounds
            reach = weight * jnp.where(sign > 0, upper, 1 - lower)
            others = reach.sum(1, keepdims=True) - reach
            need = jnp.clip((least - others) / np.where(weight > 0, weight, 1), 0, 1)
            lower = jnp.maximum(lower, jnp.where(sign > 0, need, 0).max(0))
            upper = jnp.minimum(upper, jnp.where(sign < 0, 1 - need, 1).min(0))
            return lower, upper

        start = jnp.broadcast_to(UNKNOWN, (weight.shape[1], evidence.shape[1], 2))
        bounds = start[..., 0], start[..., 1]
        if self._passes > 1:
            bounds = jax.lax.fori_loop(0, self._passes, tighten, bounds)
        else:
            bounds = tighten(0, bounds)
        lower, upper = bounds
        rounding = (lower > upper) & (lower - upper < ROUNDING)
        return jnp.stack([jnp.where(rounding, upper, lower), upper], axis=-1)
