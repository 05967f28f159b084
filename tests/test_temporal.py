"""The past operators against brute force over every window, and against rtamt."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from test_program import intervals, run, twin

from moe_rules_callback.language import parse_formula
from moe_rules_callback.program import Program

WINDOWS = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return intervals((80, 3, 2), 0)


@pytest.fixture(scope="module")
def bad() -> np.ndarray:
    """A fifth of the rows are left out, among them the first two and ten in a row."""
    bad = np.random.default_rng(1).random((80, 3, 2)) < 0.2
    bad[:2], bad[40:50, 0] = True, True
    return bad


def check(texts: list[str], rows: np.ndarray, bad: np.ndarray | None) -> None:
    got = run(texts, rows, bad)
    for i, text in enumerate(texts):
        np.testing.assert_allclose(got[:, i], twin(text, rows, bad), rtol=0, atol=1e-6, err_msg=text)


@pytest.mark.parametrize("gaps", [False, True], ids=["every row", "rows left out"])
def test_every_window(rows: np.ndarray, bad: np.ndarray, gaps: bool) -> None:
    texts = [text for n in WINDOWS for text in (f"always[{n}](a)", f"once[{n}](a)", f"a since[{n}] b")]
    check([*texts, "always(a)", "once(a)", "a since b"], rows, bad if gaps else None)


@pytest.mark.parametrize("gaps", [False, True], ids=["every row", "rows left out"])
def test_the_others_and_nesting(rows: np.ndarray, bad: np.ndarray, gaps: bool) -> None:
    texts = [
        "previously(a)",
        "previously(previously(a))",
        "previously(once[3](a))",
        "once[5](always[3](a))",
        "always(once[4](a) | ~b)",
        "always[4](a since[3] b)",
        "(once[2](a)) since[7] (always[2](b & c))",
        "once(a & previously(~b))",
        "after[10](a)",
        "always[4](after[10](a))",
        "after[10](always[4](a))",
        "~once[6](~a) -> always[6](a)",
    ]
    check(texts, rows, bad if gaps else None)


def test_contradictions_go_through_bound_by_bound() -> None:
    rows = intervals((20, 3, 1), 3)
    rows[::3] = rows[::3, ..., ::-1]
    check(["always[3](a)", "once[5](a)", "a since[4] b", "a since b"], rows, None)


def truths(text: str, values: list[tuple[float, float] | None]) -> list[tuple[float, float]]:
    rows = np.array([[[v or (0.5, 0.5)]] * 3 for v in values], np.float32)
    bad = np.array([[[v is None]] * 3 for v in values])
    return [tuple(np.round(x, 6).tolist()) for x in run([text], rows, bad)[:, 0, 0]]


YES, NO, MAYBE = (1.0, 1.0), (0.0, 0.0), (0.0, 1.0)


def test_rows_before_the_start_are_unknown_but_certainty_is_reported() -> None:
    assert truths("always[3](a)", [YES, YES, YES, NO]) == [MAYBE, MAYBE, YES, NO]
    assert truths("always[3](a)", [NO, YES, YES, YES]) == [NO, NO, NO, YES]
    assert truths("once[3](a)", [NO, NO, NO, YES]) == [MAYBE, MAYBE, NO, YES]
    assert truths("always(a)", [YES, YES, NO, YES]) == [YES, YES, NO, NO]
    assert truths("once(a)", [NO, NO, YES, NO]) == [NO, NO, YES, YES]


def test_a_row_left_out_is_unknown_itself_and_passed_over_later() -> None:
    assert truths("always[2](a)", [YES, YES, None, YES, NO]) == [MAYBE, YES, MAYBE, YES, NO]
    assert truths("once(a)", [None, NO, None, NO]) == [MAYBE, NO, MAYBE, NO]
    assert truths("always[2](a)", [YES, None, None, YES])[-1] == YES
    assert truths("previously(a)", [NO, None, YES, YES]) == [MAYBE, MAYBE, NO, YES]


def test_since() -> None:
    """b held once, and a has held ever since: `right` needs no `left` at its own row."""
    rows = np.array([[[x], [y], [(0, 0)]] for x, y in [(NO, NO), (NO, YES), (YES, NO), (YES, NO), (NO, NO)]])
    got = run(["a since b"], rows.astype(np.float32))[:, 0, 0]
    np.testing.assert_array_equal(got, [NO, YES, YES, YES, NO])


def test_after_counts_steps_not_rows() -> None:
    program = Program([parse_formula("after[100](a)")])
    atoms, bad = jnp.full((1, 1, 2), 0.5), jnp.zeros((1, 1), bool)
    for step, expected in ((99, [0, 1]), (100, [0.5, 0.5]), (5_000, [0.5, 0.5])):
        _, truth = program.update(program.init(1), atoms, bad, jnp.int32(0), jnp.int32(step))
        np.testing.assert_array_equal(truth[0, 0], expected)


def test_a_window_costs_memory_like_its_length_and_work_like_its_logarithm() -> None:
    state = Program([parse_formula("always[1000](a)")]).init(1)
    assert sum(x.size for stage in state for x in stage) < 1024 * 4 + 100
    assert [x.shape for x in state[0]] == [(2**10 - 1, 1, 2, 2)]  # 10 doublings
