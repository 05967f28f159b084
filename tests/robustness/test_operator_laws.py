"""Laws of every operator over every run of intervals: bounds stay in order, and knowing more never says less.

The weighted connectives alone are in `test_logic`; here are whole formulas, the past operators among them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moe_rules_callback import logic
from moe_rules_callback.language import parse_formula
from moe_rules_callback.program import Program

ROWS = 7
TEXTS = (
    "~a", "a & b", "a | b", "a !& b", "a !| b", "a -> b", "a ->[.5] b", "a <-> b", "a ^ b", "3*a & .2*b",
    "always(a)", "always[3](a)", "once(a)", "once[2](a)", "a since b", "a since[4] b", "previously(a)",
    "after[3](a)", "always[3](a ^ previously(b)) -> once[4](~a <-> b)",
)  # fmt: skip
# Where no operand is seen negated, a formula that is given more truth says more.
RISING = [TEXTS.index(text) for text in TEXTS if not set("~!^") & set(text) and "->" not in text]
PROGRAM = Program([parse_formula(text) for text in TEXTS])
USED = np.array(["ab".index(name) for name in PROGRAM.atoms])


@jax.jit
def run(rows: jax.Array, bad: jax.Array) -> jax.Array:
    """Truth [ROWS, formulas, 2] over rows [ROWS, atoms, 2] of a and b."""

    def body(carry: Any, given: Any) -> Any:
        state, row = carry
        state, truth = PROGRAM.update(state, given[0][USED, None], given[1][USED, None], row, row)
        return (state, row + 1), truth[:, 0]

    return jax.lax.scan(body, (PROGRAM.init(1), jnp.int32(0)), (rows, bad))[1]


degrees = st.one_of(st.floats(0, 1, width=32, allow_subnormal=False), st.sampled_from([0.0, 0.5, 1.0]))
points = arrays.arrays(np.float32, (ROWS, 2, 2), elements=degrees)
gaps = arrays.arrays(bool, (ROWS, 2))


@given(points, gaps)
def test_bounds_stay_in_order_and_are_numbers(rows: np.ndarray, bad: np.ndarray) -> None:
    truth = np.asarray(run(np.sort(rows, axis=-1), bad))
    assert (truth[..., 0] >= 0).all()
    assert (truth[..., 0] <= truth[..., 1]).all()
    assert (truth[..., 1] <= 1).all()


@given(points, gaps)
def test_contradictions_stay_numbers(rows: np.ndarray, bad: np.ndarray) -> None:
    truth = np.asarray(run(rows, bad))
    assert ((truth >= 0) & (truth <= 1)).all()
    states = np.asarray(logic.classify(jnp.asarray(truth), 0.75))
    np.testing.assert_array_equal(states == 3, truth[..., 0] > truth[..., 1])


@given(points, points, gaps)
def test_narrower_intervals_never_give_wider_ones(
    rows: np.ndarray, inside: np.ndarray, bad: np.ndarray
) -> None:
    wide = np.sort(rows, axis=-1)
    low, high = wide[..., :1], wide[..., 1:]
    narrow = np.clip(np.sort(inside, axis=-1), low, high)
    outer, inner = (np.asarray(run(given, bad)) for given in (wide, narrow))
    assert (inner[..., 0] >= outer[..., 0] - 1e-6).all()
    assert (inner[..., 1] <= outer[..., 1] + 1e-6).all()


@given(points, points, gaps)
def test_more_truth_in_more_truth_out(rows: np.ndarray, other: np.ndarray, bad: np.ndarray) -> None:
    one, two = (np.sort(each, axis=-1) for each in (rows, other))
    less, more = (
        np.asarray(run(given, bad))[:, RISING] for given in (np.minimum(one, two), np.maximum(one, two))
    )
    assert (less <= more + 1e-6).all()


@given(points, gaps)
def test_a_row_left_out_is_unknown_to_what_rests_on_it(rows: np.ndarray, bad: np.ndarray) -> None:
    truth = np.asarray(run(np.sort(rows, axis=-1), bad))
    for i, text in enumerate(TEXTS):
        rests = [
            PROGRAM.atoms.index(name)
            for name in "ab"
            if name in text.replace("always", "").replace("after", "")
        ]
        left_out = bad[:, USED[rests]].any(-1)
        assert (truth[left_out, i] == [0, 1]).all(), text
