"""Interval operators against their twins, the golden table, and the laws that they must keep."""

from __future__ import annotations

from typing import Any

import golden_table as golden
import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rules_callback import logic
from moe_rules_callback.formula import Connective, Not, Var

TOLERANCE = {"rtol": 0, "atol": 1e-6}
OPERATORS = {
    "and": logic.conjunction, "or": logic.disjunction, "nand": logic.negated_conjunction,
    "nor": logic.negated_disjunction, "implies": logic.implication, "iff": logic.equivalence,
    "xor": logic.exclusive_disjunction,
}  # fmt: skip
MONOTONE = ("and", "or")

degree = st.floats(0, 1, width=32, allow_subnormal=False)  # which XLA takes for 0
interval = st.tuples(degree, degree).map(sorted).map(tuple)
weight = st.floats(0, 8, width=32)


def close(got: Any, expected: Any) -> None:
    np.testing.assert_allclose(np.asarray(got), np.asarray(expected, np.float32), **TOLERANCE)


def arrays(seed: int, count: int) -> list[np.ndarray]:
    """float32 [3, 4, 2] intervals, some of them points, certain or contradictory."""
    x = np.random.default_rng(seed).random((count, 3, 4, 2)).astype(np.float32)
    x = np.sort(x, axis=-1)
    x[:, 0, 0], x[:, 0, 1], x[:, 0, 2] = 0, 1, (0, 1)
    x[:, 1, 0] = x[:, 1, 0, ::-1]
    x[:, 1, 1, 1] = x[:, 1, 1, 0]
    return list(x)


@pytest.mark.parametrize("kind", OPERATORS)
def test_operators_on_arrays(kind: str) -> None:
    a, b = arrays(0, 2)
    expected = [
        [getattr(naive, OPERATORS[kind].__name__)(x, y) for x, y in zip(*rows, strict=True)]
        for rows in zip(a, b, strict=True)
    ]
    close(OPERATORS[kind](a, b), expected)


def test_negation_on_arrays() -> None:
    (a,) = arrays(1, 1)
    close(logic.negation(a), [[naive.negation(x) for x in row] for row in a])


@pytest.mark.parametrize("kind", ["and", "or", "nand", "nor"])
@pytest.mark.parametrize("weights", [(2.0, 1.0, 0.5), (0.0, 0.3, 0.7), (10.0, 0.1, 0.0)])
def test_weighted_chains(kind: str, weights: tuple[float, ...]) -> None:
    operands = arrays(2, 3)
    expected = [
        [naive.connect(kind, list(xs), weights) for xs in zip(*rows, strict=True)]
        for rows in zip(*operands, strict=True)
    ]
    close(OPERATORS[kind](*operands, weights=weights), expected)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0, 3.0])
def test_weighted_implication(weight: float) -> None:
    a, b = arrays(3, 2)
    expected = [
        [naive.implication(x, y, weight) for x, y in zip(*rows, strict=True)]
        for rows in zip(a, b, strict=True)
    ]
    close(logic.implication(a, b, weight), expected)


def test_operands_broadcast() -> None:
    (a,) = arrays(4, 1)
    close(logic.conjunction(a, np.ones(2)), a)
    close(logic.disjunction(a, np.zeros(2, np.float16)), a)
    close(logic.conjunction(np.array([1, 1]), np.array([0, 1])), (0, 1))


@pytest.mark.parametrize("case", golden.CASES, ids=golden.TEXTS)
def test_golden_table(case: dict[str, Any]) -> None:
    def evaluate(node, values):
        match node:
            case Var(name):
                return jnp.array(values[name])
            case Not(operand):
                return logic.negation(evaluate(operand, values))
            case Connective(kind, operands):
                return OPERATORS[kind](*(evaluate(x, values) for x in operands))

    for name, expected in case["expected"].items():
        close(evaluate(golden.read(case["ast"]), golden.INPUTS[name]), expected)


def connected(kind: str, operands: list[tuple[float, float]], weights: list[float]) -> np.ndarray:
    bias, *rows = logic.coefficients(kind, weights)
    return np.asarray(_affine(np.float32(bias), *np.array(rows, np.float32), np.array(operands, np.float32)))


_affine = jax.jit(logic.affine)
weighted = st.sampled_from(["and", "or", "nand", "nor"])
operands3 = st.lists(interval, min_size=3, max_size=3)
weights3 = st.lists(weight, min_size=3, max_size=3)


@given(weighted, operands3, weights3)
def test_interval_order_is_kept(kind: str, operands: list, weights: list) -> None:
    lower, upper = connected(kind, operands, weights)
    assert 0 <= lower <= upper <= 1


@given(weighted, st.lists(degree, min_size=3, max_size=3), weights3)
def test_a_point_stays_a_point(kind: str, degrees: list, weights: list) -> None:
    """A bound that differed by rounding alone would read as a contradiction."""
    lower, upper = connected(kind, [(x, x) for x in degrees], weights)
    assert lower == upper


@given(weighted, operands3, operands3, weights3)
def test_monotone(kind: str, one: list, other: list, weights: list) -> None:
    low = np.minimum(one, other)
    high = np.maximum(one, other)
    first, second = connected(kind, list(low), weights), connected(kind, list(high), weights)
    assert (first <= second).all() if kind in MONOTONE else (first >= second).all()


@given(interval)
def test_negation_is_an_involution(a: tuple[float, float]) -> None:
    close(logic.negation(logic.negation(np.array(a))), a)


@given(operands3, weights3)
def test_de_morgan(operands: list, weights: list) -> None:
    negated = [(1 - u, 1 - l) for l, u in operands]  # noqa: E741
    left = naive.negation(tuple(connected("and", operands, weights)))
    np.testing.assert_allclose(left, connected("or", negated, weights), rtol=0, atol=1e-5)


@given(interval, interval, weight)
def test_a_weight_of_zero_takes_an_operand_out(a: tuple, b: tuple, w: float) -> None:
    for kind in ("and", "or"):
        with_it, without = connected(kind, [a, b, a], [w, 0.0, 0.0]), naive.connect(kind, [a], [w])
        np.testing.assert_allclose(with_it, without, rtol=0, atol=1e-5)


@given(interval, interval, st.floats(1, 8, width=32))
def test_a_weight_makes_an_operand_count_for_more(a: tuple, b: tuple, w: float) -> None:
    assert (connected("and", [a, b, b], [w, 1, 0]) <= connected("and", [a, b, b], [1, 1, 0]) + 1e-6).all()
    assert (connected("or", [a, b, b], [w, 1, 0]) >= connected("or", [a, b, b], [1, 1, 0]) - 1e-6).all()


def test_classical_truth_is_exact_whatever_the_weights() -> None:
    rng = np.random.default_rng(0)
    for weights in rng.uniform(0, 5, (50, 3)):
        assert (connected("and", [(1, 1)] * 3, list(weights)) == 1).all()


@pytest.mark.parametrize(
    ("truth", "threshold", "state"),
    [
        ((0.9, 0.95), 0.9, 1),  # reached, not passed
        ((0.0, 0.1), 0.9, 0),
        ((0.89, 0.95), 0.9, 2),
        ((0.0, 1.0), 0.75, 2),
        ((0.95, 0.9), 0.6, 3),  # a contradiction comes before truth
        ((0.2, 0.1), 0.75, 3),
        ((1.0, 1.0), 1.0, 1),
        ((0.0, 0.0), 1.0, 0),
        ((0.51, 0.52), 0.51, 1),
    ],
)
def test_states(truth: tuple[float, float], threshold: float, state: int) -> None:
    got = logic.classify(jnp.array(truth, jnp.float32), threshold)
    assert got == state == naive.classify(truth, threshold)
    assert got.dtype == jnp.int8


@given(degree, degree, st.floats(0.5, 1, exclude_min=True))
def test_states_are_decided_in_float32(lower: float, upper: float, threshold: float) -> None:
    assert int(_classify(np.array([lower, upper], np.float32), threshold)) == naive.classify(
        (lower, upper), threshold
    )


_classify = jax.jit(logic.classify)


def test_unknown_connectives_are_refused() -> None:
    with pytest.raises(ValueError, match="no connective is called 'because'"):
        logic.coefficients("because", (1.0, 1.0))
