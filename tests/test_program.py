"""Compiled rules against the twin that walks their trees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import golden_table as golden
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_rules_callback.formula import Connective, Formula, Not, Var
from moe_rules_callback.language import parse_formula
from moe_rules_callback.program import Program

NAMES = ("a", "b", "c")
UNARY = ("~{}", "always({})", "always[3]({})", "once({})", "once[4]({})", "previously({})", "after[2]({})")
BINARY = ("{} & {}", "{} | {}", "{} !& {}", "{} !| {}", "{} -> {}", "{} ->[.5] {}", "{} <-> {}", "{} ^ {}",
          "2*{} & {}", "{} | .3*{}", "{} since {}", "{} since[3] {}")  # fmt: skip


def run(texts: Sequence[str | Formula], rows: np.ndarray, bad: np.ndarray | None = None) -> np.ndarray:
    """Truth [T, rules, layers, 2] over rows [T, atoms, layers, 2] of a, b, c, scanned."""
    program = Program([parse_formula(x) if isinstance(x, str) else x for x in texts])
    used = np.array([NAMES.index(name) for name in program.atoms], int)
    bad = np.zeros(rows.shape[:3], bool) if bad is None else bad

    def body(carry, given):
        state, row = carry
        state, truth = program.update(state, given[0][used], given[1][used], row, row)
        return (state, row + 1), truth

    start = program.init(rows.shape[2]), jnp.int32(0)
    _, truth = jax.jit(lambda xs: jax.lax.scan(body, start, xs))((jnp.asarray(rows), jnp.asarray(bad)))
    return np.asarray(truth)


def intervals(shape: tuple[int, ...], seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).random((*shape, 2)).astype(np.float32)
    return np.sort(x, axis=-1)


def twin(text: str | Formula, rows: np.ndarray, bad: np.ndarray | None = None) -> np.ndarray:
    """[T, layers, 2] by `naive.truth`."""
    formula = parse_formula(text) if isinstance(text, str) else text
    layers = []
    for layer in range(rows.shape[2]):
        series: list[dict[str, Any]] = [
            {
                name: None if bad is not None and bad[t, i, layer] else tuple(row[i, layer].tolist())
                for i, name in enumerate(NAMES)
            }
            for t, row in enumerate(rows)
        ]
        layers.append(naive.truth(formula, series))
    return np.moveaxis(np.array(layers), 0, 1)


def test_golden_table_all_rules_at_once() -> None:
    """The whole table in one program; the sets of inputs stand for layers."""
    formulas = [golden.read(case["ast"]) for case in golden.CASES]
    program = Program(formulas)
    sets = list(golden.INPUTS)
    atoms = jnp.array([[golden.INPUTS[s][name] for s in sets] for name in program.atoms], jnp.float32)
    bad = jnp.zeros(atoms.shape[:2], bool)
    zero = jnp.int32(0)
    _, truth = jax.jit(program.update)(program.init(len(sets)), atoms, bad, zero, zero)
    expected = [[case["expected"][s] for s in sets] for case in golden.CASES]
    np.testing.assert_allclose(truth, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_formulas_drawn_at_random(seed: int) -> None:
    """40 formulas in one program: nested, sharing parts, with the past and with rows left out."""
    rng = np.random.default_rng(seed)

    def draw(depth: int) -> str:
        if depth == 0 or rng.random() < 0.15:
            return str(rng.choice(NAMES))
        if rng.random() < 0.4:
            return f"({rng.choice(UNARY).format(draw(depth - 1))})"
        return f"({rng.choice(BINARY).format(draw(depth - 1), draw(depth - 1))})"

    texts = [draw(4) for _ in range(40)]
    rows, bad = intervals((12, 3, 2), seed), rng.random((12, 3, 2)) < 0.15
    got = run(texts, rows, bad)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(got[:, i], twin(text, rows, bad), rtol=0, atol=3e-6, err_msg=text)


def test_atoms_in_order_of_first_occurrence() -> None:
    program = Program([parse_formula("once(c) -> a"), parse_formula("b & a")])
    assert program.atoms == ("c", "a", "b")


def test_a_rule_may_be_an_atom_and_rules_may_repeat() -> None:
    rows = intervals((2, 3, 1), 0)
    got = run(["a", "a", "~~a", "b & a", "b & a"], rows)
    np.testing.assert_array_equal(got[:, 0], rows[:, 0])
    np.testing.assert_array_equal(got[:, 1], got[:, 2])
    np.testing.assert_array_equal(got[:, 3], got[:, 4])


def test_no_rules() -> None:
    program = Program([])
    atoms, bad = jnp.zeros((0, 3, 2)), jnp.zeros((0, 3), bool)
    _, truth = program.update(program.init(3), atoms, bad, jnp.int32(0), jnp.int32(0))
    assert truth.shape == (0, 3, 2)


def test_what_rests_on_a_bad_metric_is_unknown_and_nothing_else() -> None:
    rows, bad = np.ones((1, 3, 2, 2), np.float32), np.zeros((1, 3, 2), bool)
    bad[0, 1, 0] = True  # b, in the first layer
    got = run(["a", "a & b", "a | b", "~b", "once(b)", "previously(b) | a"], rows, bad)
    expected = np.array([[1, 1], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1]])
    np.testing.assert_array_equal(got[0, :, 0], expected)
    np.testing.assert_array_equal(got[0, :, 1], [[1, 1], [1, 1], [1, 1], [0, 0], [1, 1], [1, 1]])


degree = st.floats(0, 1, width=32)
rows_of_points = st.lists(st.tuples(degree, degree, degree), min_size=3, max_size=3)


@settings(max_examples=50)
@given(rows_of_points)
def test_points_stay_points(points: list) -> None:
    """Rounding alone never makes a contradiction, in no rule of many."""
    atoms = np.repeat(np.array(points, np.float32).T[..., None], 2, axis=-1)  # [atoms, layers, 2]
    truth = np.asarray(_many(atoms))
    np.testing.assert_array_equal(truth[..., 0], truth[..., 1])


_texts = [
    b.format(f"({c.format('a', 'b')})", n) for b in BINARY[:10] for c in BINARY[:10] for n in ("c", "~c")
]
_program = Program([parse_formula(text) for text in _texts])


@jax.jit
def _many(atoms):
    used = atoms[np.array([NAMES.index(name) for name in _program.atoms])]
    bad = jnp.zeros(used.shape[:2], bool)
    return _program.update(_program.init(3), used, bad, jnp.int32(0), jnp.int32(0))[1]


def test_weights_near_the_threshold_of_one() -> None:
    """Certain operands make a certain rule, whatever their weights: `1.0 ::` can be reached."""
    texts = [f"{x}*a & {y}*~b & {z}*c" for x, y, z in np.random.default_rng(0).uniform(0, 9, (40, 3))]
    rows = np.array([[[[1, 1]], [[0, 0]], [[1, 1]]]], np.float32)
    assert (run(texts, rows) == 1).all()


def test_many_rules_cost_hardly_more_equations_than_few() -> None:
    shapes = ["a & b", "~a | c", "always[8](a & b)", "a -> (b & ~c)", "once[3](c) ^ a", "previously(b)"]

    def equations(texts: list[str]) -> int:
        program = Program([parse_formula(text) for text in texts])
        atoms, bad = jnp.zeros((3, 1, 2)), jnp.zeros((3, 1), bool)
        zero = jnp.int32(0)
        return len(jax.make_jaxpr(program.update)(program.init(1), atoms, bad, zero, zero).jaxpr.eqns)

    few = equations(shapes)
    many = equations(shapes + [f"{w}*a & {x}" for w in range(2, 49) for x in ("b", "c")])
    assert many <= few + 2


@pytest.mark.parametrize("kind", ["xor", "iff"])
def test_long_chains_compile(kind: Literal["xor", "iff"]) -> None:
    """Written out with the other connectives, 30 of these would be 2^30 nodes."""
    formula: Formula = Var("a")
    for _ in range(30):
        formula = Connective(kind, (formula, Not(Var("b"))))
    rows = np.array([[[[1, 1]], [[0, 0]], [[0, 0]]]], np.float32)
    assert run([formula], rows)[0, 0, 0, 0] == 1  # flipped 30 times, or never
