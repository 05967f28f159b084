"""One rule on given intervals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import golden_table as golden
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback import evaluate
from moe_rules_callback.errors import MetricsError, RuleSyntaxError, UnknownNameError
from moe_rules_callback.formula import Not, Rule, Var
from moe_rules_callback.records import State


@pytest.mark.parametrize("case", golden.CASES, ids=golden.TEXTS)
def test_golden_table_from_text(case: dict[str, Any]) -> None:
    for name, expected in case["expected"].items():
        got = evaluate(case["formula"], golden.INPUTS[name]).interval
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "truth", "interval", "state"),
    [
        ("0.85 :: a & ~b", {"a": (0.9, 0.95), "b": (0.2, 0.3)}, (0.6, 0.75), State.UNKNOWN),
        ("0.6 :: a", {"a": (0.6, 0.7)}, (0.6, 0.7), State.TRUE),
        ("0.6 :: a", {"a": (0.3, 0.4)}, (0.3, 0.4), State.FALSE),
        ("a", {"a": (0.8, 0.7)}, (0.8, 0.7), State.CONTRADICTORY),
        ("2*a & b", {"a": 0.9, "b": 1.0}, (0.8, 0.8), State.TRUE),
        ("a ->[0.5] b", {"a": 1, "b": 0.5}, (0.25, 0.25), State.FALSE),
        ("always[5](a)", {"a": 1.0}, (0.0, 1.0), State.UNKNOWN),
        ("after[1](a)", {"a": 1.0}, (0.0, 1.0), State.UNKNOWN),
        ("after[0](a)", {"a": 1.0}, (1.0, 1.0), State.TRUE),
        ("once(a)", {"a": 1.0}, (1.0, 1.0), State.TRUE),
    ],
)
def test_intervals_and_states(text: str, truth: dict, interval: tuple, state: State) -> None:
    result = evaluate(text, truth)
    np.testing.assert_allclose(result.interval, interval, rtol=0, atol=1e-6)
    assert result.state is state


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.25, (0.25, 0.25)),
        ([0.25, 0.5], (0.25, 0.5)),
        (np.float32(0.25), (0.25, 0.25)),
        (jnp.array([[0.25, 0.5]]), (0.25, 0.5)),
        (np.array([0.25]), (0.25, 0.25)),
        (SimpleNamespace(value=0.25), (0.25, 0.25)),
        (SimpleNamespace(output=SimpleNamespace(value=(0.25, 0.5))), (0.25, 0.5)),
        (True, (1.0, 1.0)),
    ],
)
def test_forms_of_an_interval(given: Any, expected: tuple[float, float]) -> None:
    assert evaluate("a", {"a": given}).interval == expected


def test_a_rule_object() -> None:
    result = evaluate(Rule("r", Not(Var("a")), 0.6), {"a": 0.25, "unused": 3})
    assert result == ((0.75, 0.75), State.TRUE)
    assert result.interval.lower == result.interval.upper == 0.75


@pytest.mark.parametrize(
    "given", [1.5, (-0.1, 0.5), (0.1, 0.2, 0.3), float("nan"), "much", None, [], (0.5, float("inf"))]
)
def test_what_is_no_truth_is_refused(given: Any) -> None:
    with pytest.raises(MetricsError) as error:
        evaluate("a", {"a": given})
    assert str(error.value) == (
        f"the truth of 'a' is {given!r}; expected (lower, upper) with both in 0..1, or one number."
    )


def test_absent_predicates() -> None:
    with pytest.raises(UnknownNameError) as error:
        evaluate("high_load & b", {"hihg_load": 1, "b": 0})
    assert str(error.value) == (
        "the rule uses 'high_load', for which no interval was given. Did you mean hihg_load? "
        "Pass one for each of: high_load, b."
    )


def test_unreadable_text() -> None:
    with pytest.raises(RuleSyntaxError):
        evaluate("a &", {"a": 1})
