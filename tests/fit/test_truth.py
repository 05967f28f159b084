"""Formulas over all rows at once: what the evaluator says row by row, and its slope."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback.fit.parameters import weighed, with_weights
from moe_rules_callback.fit.truth import Place, Table, clamp, evaluate, sigmoid
from moe_rules_callback.language import parse_formula
from moe_rules_callback.program import Program

ROWS, COLUMNS = 40, 3
TEXTS = [
    "a",
    "~~a",
    "2*a & ~b & 0.5*c",
    "0.3*a | ~(b & 2*c)",
    "a !& 2*b",
    "0.5*a !| b",
    "a ->[0.4] b",
    "a <-> ~b",
    "a ^ (b & 3*c)",
    "always[5](a | 0.5*b) & c",
    "once[100](a) & always(b)",
    "once(a & 2*b)",
    "2*(a since[6] ~b) & c",
    "a since previously(b | c)",
    "previously(previously(a))",
    "after[7](a & 0.7*b)",
]


@pytest.fixture(scope="module")
def table() -> Table:
    random = np.random.default_rng(0)
    bounds = np.sort(random.random((3, ROWS, COLUMNS, 2)).astype(np.float32))
    bad = random.random((3, ROWS, COLUMNS)) < 0.2
    bounds[bad] = (0, 1)
    steps = np.broadcast_to(np.arange(ROWS)[:, None], (ROWS, COLUMNS))
    arrays = map(jnp.asarray, bounds)
    wrong = map(jnp.asarray, bad)
    return Table(
        dict(zip("abc", arrays, strict=True)), dict(zip("abc", wrong, strict=True)), jnp.asarray(steps)
    )


def by_row(text: str, table: Table) -> np.ndarray:
    program = Program([parse_formula(text)])
    atoms = jnp.stack([table.atoms[name] for name in program.atoms], 1)
    bad = jnp.stack([table.bad[name] for name in program.atoms], 1)

    def update(state, row):
        return program.update(state, row[0], row[1], row[2], row[2])

    rows = (atoms, bad, jnp.arange(ROWS))
    return np.asarray(jax.lax.scan(update, program.init(COLUMNS), rows)[1][:, 0])


def at_once(text: str, table: Table, weights: dict[Place, float]) -> np.ndarray:
    return np.asarray(jax.jit(lambda table: evaluate(parse_formula(text), table, weights))(table))


@pytest.mark.parametrize("text", TEXTS)
def test_it_says_what_the_evaluator_says(text: str, table: Table) -> None:
    found = at_once(text, table, {})
    np.testing.assert_allclose(found, by_row(text, table), atol=1e-6)


@pytest.mark.parametrize("text", ["2*a & ~b & 0.5*c", "always[5](a | 0.5*b) & c", "2*(a since[6] ~b) & c"])
def test_weights_as_arguments_are_weights_of_the_formula(text: str, table: Table) -> None:
    formula = parse_formula(text)
    weights = {place: 0.25 + 0.5 * i for i, (place, _, _) in enumerate(weighed(formula))}
    changed = with_weights(formula, weights)
    assert changed != formula
    assert with_weights(formula, {}) == formula
    found = at_once(text, table, weights)
    np.testing.assert_allclose(found, by_row(str(changed), table), atol=1e-6)


@pytest.mark.parametrize("leak", [0.0, 0.1])
def test_slopes_in_weights_are_those_of_differences(leak: float, table: Table) -> None:
    formula = parse_formula("once[3](0.3*a | 0.2*~b) & 0.4*c")
    places = [place for place, _, _ in weighed(formula)]
    start = np.array([weight for _, _, weight in weighed(formula)], np.float32)

    @jax.jit
    def total(weights: jax.Array) -> jax.Array:
        return evaluate(formula, table, dict(zip(places, weights, strict=True)), leak).mean()

    found = jax.grad(total)(start)
    for i, slope in enumerate(found.tolist()):
        change = np.zeros_like(start)
        change[i] = 1e-2
        expected = (total(start + change) - total(start - change)) / 2e-2
        assert slope == pytest.approx(float(expected), abs=2e-3)
        assert abs(slope) > 1e-2


def test_a_leak_leaves_a_slope_where_truth_has_none() -> None:
    far = jnp.array([-300.0, 300.0])
    for function, leak, flat in ((sigmoid, 0.1, 0.0), (clamp, 0.1, 0.0)):
        assert jax.vmap(jax.grad(function), (0, None))(far, 0.0).tolist() == [flat, flat]
        assert (jax.vmap(jax.grad(function), (0, None))(far, leak) > 0).all()
