"""Learning on made-up runs whose rule is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made import PREDICATES, rows_of, truth

from moe_rules_callback.fit.learner import Learner
from moe_rules_callback.fit.parameters import LEAST_WEIGHT, Parameter, parameters
from moe_rules_callback.language import parse_rule

RULE = parse_rule("0.75 :: hot & calm", "fault", kind="risk")
RANDOM = np.random.default_rng(0)
SIGNALS = [(RANDOM.random(50), RANDOM.random(50)) for _ in range(24)]  # heat, noise


def learner_of(says, rule=RULE, predicates=PREDICATES) -> tuple[Learner, tuple[Parameter, ...]]:
    """A learner on runs in which the rule ought to be TRUE where says(heat, noise)."""
    rows = {str(i): rows_of(rule, *signals, predicates) for i, signals in enumerate(SIGNALS)}
    truths = {str(i): says(*signals) for i, signals in enumerate(SIGNALS)}
    learnable = parameters(rule, predicates)
    return Learner(rule, predicates, learnable, rows, truths), learnable


def learnt(learner: Learner, learnable: tuple[Parameter, ...], *labels: str, runs: int = 24) -> list[float]:
    """Parameters fitted on some runs, with all others as shipped."""
    free = np.array([each.label in labels for each in learnable])
    assert free.sum() == len(labels)
    theta = learner.fit(np.arange(24) < runs, free)
    assert not theta[~free].any()
    return [float(p.value(x)) for p, x in zip(learnable, theta, strict=True) if p.label in labels]


def test_truth_is_that_of_the_rule() -> None:
    learner, learnable = learner_of(lambda heat, noise: heat > 2)
    found = learner.truths(np.zeros(len(learnable)))
    for one, signals in zip(found, SIGNALS, strict=True):
        np.testing.assert_allclose(one, truth(*signals), atol=1e-5)


def test_it_recovers_offsets_and_few_runs_move_them_little() -> None:
    learner, learnable = learner_of(lambda *x: truth(*x, hot=0.3, calm=0.65)[:, 0] >= 0.75)
    hot, calm = learnt(learner, learnable, "offset of hot", "offset of calm")
    assert hot == pytest.approx(0.3, abs=0.03)
    assert calm == pytest.approx(0.65, abs=0.03)
    of_one, _ = learnt(learner, learnable, "offset of hot", "offset of calm", runs=1)
    assert hot < of_one < 0.5


def test_it_recovers_an_offset_from_where_the_ramp_is_flat() -> None:
    predicates = {**PREDICATES, "hot": replace(PREDICATES["hot"], offset=1.25)}
    rule = parse_rule("hot", "fault", kind="risk")
    says = lambda heat, noise: heat > 0.64  # noqa: E731
    learner, learnable = learner_of(says, rule, predicates)
    (offset,) = learnt(learner, learnable, "offset of hot")
    edge = np.log(3) / 12 + 0.05  # from the offset to where the lower bound is 0.75
    assert offset + edge == pytest.approx(0.64, abs=0.05)


def test_it_recovers_weights() -> None:
    """A heavy one falls short: beyond the threshold there is little room, and the prior holds it back."""
    learner, learnable = learner_of(lambda *x: truth(*x, weights=(3.0, 0.5))[:, 0] >= 0.75)
    hot, calm = learnt(learner, learnable, "weight of hot", "weight of calm")
    assert calm == pytest.approx(0.5, rel=0.15)
    assert 1.3 < hot < 3.0


def test_an_operand_against_the_labels_has_the_least_weight_and_none_below() -> None:
    """`calm` ought to be negated; a weight cannot say so."""
    learner, learnable = learner_of(lambda heat, noise: (heat > 0.6) & (noise > 0.4))
    hot, calm = learnt(learner, learnable, "weight of hot", "weight of calm")
    assert calm == pytest.approx(LEAST_WEIGHT)
    assert hot > 0.5


def test_a_health_rule_learns_when_to_be_false() -> None:
    learner, learnable = learner_of(lambda *x: truth(*x, hot=0.3)[:, 1] > 0.25, replace(RULE, kind="health"))
    (hot,) = learnt(learner, learnable, "offset of hot")
    assert hot == pytest.approx(0.3, abs=0.03)


def test_outcomes_count_runs_and_not_rows() -> None:
    """A run of 50 rows and one of 5: what a rule does in either counts the same."""
    rule = parse_rule("hot", "fault", kind="risk")
    rows = {
        "long": rows_of(rule, np.full(50, 0.9), np.zeros(50)),
        "short": rows_of(rule, np.array([0.9, 0.9, 0.1, 0.1, 0.1]), np.zeros(5)),
    }
    truths = {"long": np.arange(50) < 25, "short": np.ones(5, bool)}
    outcome = Learner(rule, PREDICATES, (), rows, truths).outcome(np.zeros(0))
    np.testing.assert_allclose(outcome.caught, [1, 0.4])
    np.testing.assert_allclose(outcome.quiet, [0, np.nan])
    assert outcome.accuracy == pytest.approx((0.7 + 0) / 2)


def test_rows_before_the_warm_up_do_not_count() -> None:
    rule = parse_rule("hot", "fault", kind="risk", warmup=10)
    rows = {"a": rows_of(rule, np.r_[np.full(10, 0.9), np.zeros(10)], np.zeros(20))}
    outcome = Learner(rule, PREDICATES, (), rows, {"a": np.zeros(20, bool)}).outcome(np.zeros(0))
    assert outcome.quiet.tolist() == [1.0]
