"""The decision procedure against histories drawn at random, which the NumPy twins judge."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe_rules_callback import evaluate
from moe_rules_callback.formula import Connective, Formula, Not, Rule, Since, Var, variables
from moe_rules_callback.language import parse_formula
from moe_rules_callback.lint.decide import TOLERANCE, Decision, Demand, Wanted
from moe_rules_callback.lint.features import Features
from moe_rules_callback.predicates import Predicate
from moe_rules_callback.records import State
from moe_rules_callback.signals import scalar, shipped

PREDICATES = {
    "high": Predicate("expert_imbalance", "high"),
    "higher": Predicate("expert_imbalance", "high", 0.6, slope=24.0, margin=0.02),
    "low": Predicate("expert_imbalance", "low"),
    "up": Predicate("loss", "increasing"),
    "down": Predicate("loss", "decreasing", 0.4),
}
FREE = ("a", "b", "c")
RAMPS = {  # of the twin: offset, slope, margin; the slope falls for low and decreasing
    "high": (0.2, 12.0, 0.05),
    "higher": (0.6, 24.0, 0.02),
    "low": (0.5, -12.0, 0.05),
    "up": (0.5, 12.0, 0.05),
    "down": (1 - 0.4, -12.0, 0.05),
}
PAST = (
    "always[3](a)",
    "once[3](a)",
    "previously(a)",
    "always(a)",
    "once(a)",
    "after[2](a)",
    "a since[3] a",
    "a since a",
)
WANTED: tuple[Wanted, ...] = ("TRUE", "FALSE", "not TRUE", "not FALSE")

weights = st.sampled_from([0.3, 0.5, 1.0, 2.0])
thresholds = st.sampled_from([0.55, 0.75, 0.9, 1.0])


def formulas(names: tuple[str, ...], past: bool = False) -> st.SearchStrategy[Formula]:
    def grow(inner: st.SearchStrategy[Formula]) -> st.SearchStrategy[Formula]:
        kinds = st.sampled_from(["and", "or", "nand", "nor"])
        grown = [
            inner.map(Not),
            st.builds(
                lambda k, x, w: Connective(k, x, w),
                kinds,
                st.tuples(inner, inner),
                st.tuples(weights, weights),
            ),
            st.builds(lambda x, w: Connective("implies", x, (1.0, w)), st.tuples(inner, inner), weights),
            st.builds(Connective, st.sampled_from(["iff", "xor"]), st.tuples(inner, inner)),
        ]
        if past:
            shapes = st.sampled_from([parse_formula(text) for text in PAST])
            grown.append(st.builds(_fill, shapes, inner, inner))
        return st.one_of(grown)

    return st.recursive(st.sampled_from(names).map(Var), grow, max_leaves=5)


def _fill(shape: Any, first: Formula, second: Formula) -> Formula:
    if isinstance(shape, Since):
        return replace(shape, left=first, right=second)
    return replace(shape, operand=first)


PASTS = formulas(("a", "b", "high", "low"), past=True)


@pytest.fixture(scope="module")
def features() -> Features:
    return Features(PREDICATES, shipped() | {"loss": scalar("loss")})


def drawn(seed: int, rows: int) -> list[dict[str, tuple[float, float]]]:
    """A history: every predicate, from signals that go their own ways between the corners."""
    rng = np.random.default_rng(seed)
    corner = rng.random() < 0.5
    history = []
    for _ in range(rows):
        x = {signal: rng.integers(0, 3) / 2 if corner else rng.random() for signal in ("imbalance", "rising")}
        row: dict[str, tuple[float, float]] = {}
        for name, (offset, slope, margin) in RAMPS.items():
            value = x["imbalance" if name in ("high", "higher", "low") else "rising"]
            sign = np.sign(slope)
            row[name] = naive.ramp(sign * value, sign * offset, abs(slope), margin)
        for name in FREE:
            ends = rng.integers(0, 2, 2) if corner else rng.random(2)
            row[name] = (float(min(ends)), float(max(ends)))
        history.append(row)
    return history


def meets(interval: tuple[float, float], threshold: float, wanted: Wanted, by: float) -> bool:
    state = {"TRUE": interval[0] - threshold, "FALSE": 1 - interval[1] - threshold}
    return -state[wanted[4:]] >= by if wanted.startswith("not") else state[wanted] >= by


def check(features: Features, parts: list[tuple[Formula, float, Wanted]], rows: int) -> None:
    """What one of 60 histories shows must be judged possible, and goes no further than is said."""
    demands = [Demand(Rule("r", formula, threshold), wanted) for formula, threshold, wanted in parts]
    answer = Decision(features).reach(demands)
    for seed in range(60):
        history = drawn(seed, rows)
        for start in (0, 1, 2) if rows > 1 else (0,):  # `after[2]` is early and late
            steps = range(start, start + rows)
            shown = [naive.truth(formula, history, steps)[-1] for formula, _, _ in parts]
            if all(meets(x, t, w, TOLERANCE) for x, (_, t, w) in zip(shown, parts, strict=True)):
                assert answer.possible, (seed, shown)
            worst = min(float(d.met_by(np.array(x))) for d, x in zip(demands, shown, strict=True))
            assert worst <= answer.proven + 1e-6
            assert answer.found <= answer.proven + 1e-6


@settings(max_examples=60)
@given(formulas((*FREE, *PREDICATES)), thresholds, st.sampled_from(WANTED))
@example(parse_formula("a & ~a"), 0.75, "TRUE")
@example(parse_formula(".5*a | .3*b"), 0.9, "TRUE")
def test_what_a_sample_shows_is_possible(features, formula, threshold, wanted):
    check(features, [(formula, threshold, wanted)], rows=1)


@settings(max_examples=40)
@given(
    formulas((*FREE, *PREDICATES)), formulas((*FREE, *PREDICATES)), thresholds, thresholds,
    st.sampled_from(WANTED), st.sampled_from(WANTED),
)  # fmt: skip
def test_what_a_sample_shows_of_two_is_possible(features, one, two, first, second, here, there):
    check(features, [(one, first, here), (two, second, there)], rows=1)


@pytest.mark.slow
@settings(max_examples=40)
@given(PASTS, PASTS, thresholds, st.sampled_from(WANTED), st.sampled_from(WANTED))
def test_what_a_history_shows_is_possible(features, one, two, threshold, here, there):
    check(features, [(one, threshold, here), (two, threshold, there)], rows=7)


@pytest.mark.slow
@settings(max_examples=40)
@given(formulas((*FREE, *PREDICATES)), thresholds, st.sampled_from(["TRUE", "FALSE"]))
def test_every_witness_is_one(features, formula, threshold, wanted):
    """`evaluate`, which compiles rules for JAX, gives the state at the point that is shown."""
    rule = Rule("r", formula, threshold)
    answer = Decision(features).reach([Demand(rule, wanted)], least=1e-4)
    if answer.found < 1e-4:
        return
    at = evaluate(rule, {name: answer.point[name] for name in variables(formula)})
    assert at.state is State[wanted]


@pytest.mark.parametrize(
    ("text", "threshold", "wanted", "proven"),
    [
        ("0.5*a | 0.3*b", 0.9, "TRUE", 0.8 - 0.9),
        ("a & ~a", 0.75, "TRUE", 0 - 0.75),
        ("a | ~a", 0.75, "FALSE", 0.25 - 1),
        ("0.2*a & 0.2*b", 0.75, "FALSE", 0.25 - 0.6),
        ("a & b & (~a | ~b)", 0.75, "TRUE", 0 - 0.75),
        ("always[8](a) & ~a", 0.75, "TRUE", 0 - 0.75),
        ("always(a) & previously(~a)", 0.75, "TRUE", 0 - 0.75),
        ("(a since[9] b) & ~once[9](b)", 0.75, "TRUE", 0 - 0.75),
        ("once[3](always[2](a)) & always[4](~a)", 0.75, "TRUE", 0 - 0.75),
        ("after[9](a & ~a)", 0.75, "TRUE", 0 - 0.75),
    ],
)
def test_impossible(features, text, threshold, wanted, proven):
    answer = Decision(features).reach([Demand(Rule("r", parse_formula(text), threshold), wanted)], close=1e-6)
    assert not answer.possible
    assert answer.proven == pytest.approx(proven, abs=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "(a ^ b) & (a <-> b)",
        "a & previously(~a)",
        "once[8](a) & ~a",
        "a ^ b",
        "always[9](a) & once[32](~a)",
        "~a since[3] a",
    ],
)
def test_possible(features, text):
    answer = Decision(features).reach([Demand(Rule("r", parse_formula(text)), "TRUE")])
    assert answer.possible
    assert answer.found >= 0


def test_ramps_over_one_signal_meet_where_they_cross(features):
    """high turns at .2 and low at .5: both are at most sigmoid(12 (.15 - .05)) where they cross."""
    rule = Rule("r", parse_formula("high & low"))
    answer = Decision(features).reach([Demand(rule, "TRUE")], close=1e-4)
    assert 0.75 + answer.found == pytest.approx(2 * naive.sigmoid(12 * 0.1) - 1, abs=1e-3)
    assert answer.found <= answer.proven <= answer.found + 1e-4


@pytest.mark.parametrize(
    ("little", "great", "implied"),
    [
        ("always[32](a)", "always[8](a)", True),
        ("always[8](a)", "always[32](a)", False),
        ("always[8](a & b)", "always[8](a)", True),
        ("once[8](a)", "once[32](a)", True),
        ("a since[8] b", "a | b", True),
        ("higher", "high", True),
        ("high", "higher", False),
        ("higher", "~low", True),
        ("high", "~low", False),
        ("after[200](a)", "after[100](a)", True),
        ("after[100](a)", "after[200](a)", False),
    ],
)
def test_one_rule_brings_the_other(features, little, great, implied):
    demands = [
        Demand(Rule("r", parse_formula(little)), "TRUE"),
        Demand(Rule("r", parse_formula(great)), "not TRUE"),
    ]
    assert Decision(features).reach(demands, TOLERANCE).possible is not implied
