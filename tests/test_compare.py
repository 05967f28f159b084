"""Two runs side by side, of states and signals that were made to part at known rows."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from fake_records import RULES, make_records, make_schema

from moe_rules_callback import Predicate, Rulebook, State, parse_rule
from moe_rules_callback.compare import compare
from moe_rules_callback.compare.partings import part_signals, part_states
from moe_rules_callback.errors import HistoryError
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.replay import replay

TRUE, FALSE, UNKNOWN = State.TRUE, State.FALSE, State.UNKNOWN


def steps(rows: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(rows), 10 * np.arange(rows)


def book(text: str = "0.75 :: up") -> Rulebook:
    return Rulebook("book", (parse_rule(text, "r", kind="risk"),), {"up": Predicate("x", "high", 0.5)})


def test_states_part_where_they_differ_for_long() -> None:
    one, other = np.full(100, FALSE), np.full(100, FALSE)
    other[10:30] = TRUE  # 20 rows: not for long
    other[60:] = TRUE
    other[70:76] = FALSE  # a flicker
    parting = part_states((one, other), steps(100), 32)
    assert parting is not None
    assert (parting.row, parting.steps, parting.values) == (60, (60, 600), ("false", "true"))
    assert part_states((one, other), steps(100), 16) is not None
    assert part_states((one, other[:1].repeat(100)), steps(100), 32) is None
    assert part_states((one[:20], 1 - one[:20]), steps(20), 32) is None


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_signals_part_where_they_leave_their_noise(noise: float) -> None:
    random = np.random.default_rng(0)
    trend = np.linspace(3, 2, 300)
    one, other = (trend + noise * random.normal(size=300) for _ in range(2))
    assert part_signals((one, other), steps(300), 32) is None
    other[200:] += 1.0
    one[150:155] = np.nan
    parting = part_signals((one, other), steps(300), 32)
    assert parting is not None
    assert 190 <= parting.row <= 200
    assert parting.values[1] > parting.values[0]
    assert part_signals((one * np.nan, other), steps(300), 32) is None


def test_the_first_rule_and_the_signals_before_it() -> None:
    random = np.random.default_rng(0)
    noise = 0.02 * random.normal(size=(2, 200))
    fall = np.where(np.arange(200) < 120, 0.9, 0.1)
    a = records_to_dataset(replay({"x": 0.9 + noise[0], "y": 1 + noise[1]}, book(), signals=("y",)))
    b = records_to_dataset(replay({"x": fall + noise[1], "y": 1 + noise[0]}, book(), signals=("y",)))
    found = compare(a, b)
    assert found.first is not None
    assert found.first.parting is not None
    assert found.first.parting.row == 120
    assert found.first.parting.values == ("true", "false")
    ((signal, at),) = found.first.before
    assert signal == "x"
    assert at.row == 120
    assert found.first.shares[1]["true"] == 0.6
    assert found.first.difference == pytest.approx(0.4 * (0.0082 - 0.9918), abs=0.01)  # sigmoid(12 * .4)
    mirror = compare(b, a).rules[0]
    assert mirror.difference == -found.first.difference
    assert mirror.shares == found.first.shares[::-1]


def test_a_run_does_not_part_from_itself() -> None:
    history = records_to_dataset(make_records(200))
    found = compare(history, history)
    assert found.first is None
    assert found.rows == 200
    assert all(rule.difference == 0 and rule.same for rule in found.rules)
    assert "No rule parts ways: no states differ in most of 32 rows in succession." in str(found)


def test_other_lengths_and_spacings() -> None:
    """Every third step, and a run that goes on: rows of the sparser one, each with the nearest."""
    x = np.linspace(0, 1, 300)
    dense = records_to_dataset(replay({"x": x}, book(), steps=np.arange(300)))
    sparse = records_to_dataset(replay({"x": x[30::3]}, book(), steps=np.arange(31, 301, 3)))
    found = compare(dense, sparse, patience=8)
    assert found.rows == 90
    assert found.steps == ((31, 298), (31, 298))
    assert found.first is None


def test_by_fraction_of_the_schedule() -> None:
    x = np.repeat([0.0, 1.0], 100)
    a = records_to_dataset(replay({"x": x}, book(), steps=np.arange(1, 201)))
    b = records_to_dataset(replay({"x": x}, book(), steps=10 * np.arange(1, 201)))
    assert compare(a, b, "fraction").first is None
    first = compare(a, b, "step", patience=4).first
    assert first is not None
    assert first.parting is not None
    assert first.parting.steps == (110, 110)


def test_rows_before_the_warm_up_do_not_count() -> None:
    late = replace(book(), rules=(replace(book().rules[0], warmup=40),))
    x = np.where(np.arange(100) < 50, 1.0, 0.0)
    a, b = (records_to_dataset(replay({"x": x}, late)) for x in (x, 1 - x))
    (rule,) = compare(a, b).rules
    assert rule.rows == 60
    assert rule.parting is not None
    assert (rule.parting.row, rule.parting.steps, rule.parting.values) == (40, (40, 40), ("false", "true"))
    assert rule.shares[0]["true"] == 10 / 60
    (early,) = compare(a.isel(step=slice(40)), b.isel(step=slice(40))).rules
    assert (early.rows, early.parting, early.difference) == (0, None, 0)
    assert "not judged: it warms up" in str(compare(a.isel(step=slice(40)), b))


def test_rules_that_differ() -> None:
    schema = make_schema(rules=RULES[:3])
    other = records_to_dataset(make_records(60, make_schema(rules=RULES[1:])))
    found = compare(records_to_dataset(make_records(60, schema)), other, patience=8)
    assert [rule.rule for rule in found.rules] == ["load_imbalance", "routing_stability"]
    assert found.only == (("expert_specialization",), tuple(rule.name for rule in RULES[3:]))
    assert "Only in A: expert_specialization." in str(found)
    a, b = (
        records_to_dataset(replay({"x": np.ones(60)}, book(text))) for text in ("0.75 :: up", "0.8 :: up")
    )
    changed = compare(a, b)
    assert not changed.rules[0].same
    assert "r*" in str(changed)
    assert "* not the same rule: formula, threshold or kind differ." in str(changed)


def test_what_cannot_be_compared() -> None:
    rows = np.arange(40)
    a, b = (records_to_dataset(replay({"x": np.ones(40)}, book(), steps=s)) for s in (rows, rows + 100))
    with pytest.raises(
        HistoryError,
        match=r"no steps in common: old has 40 rows from 0 to 39; new has 40 rows from 100 to 139\. Align",
    ):
        compare(a, b, names=("old", "new"))
    with pytest.raises(HistoryError, match="there is nothing to compare: b has no rows"):
        compare(a, b.isel(step=slice(0)))
    with pytest.raises(
        HistoryError, match="the runs have no rule in common: a has r; b has expert_specialization"
    ):
        compare(a, records_to_dataset(make_records(40)))
    short = compare(a.isel(step=slice(5)), a)
    assert "5 rows are too few to tell what parts ways for 32 rows." in str(short)


def test_as_text_and_as_json() -> None:
    fall = np.where(np.arange(100) < 60, 1.0, 0.0)
    a, b = (records_to_dataset(replay({"x": x}, book())) for x in (np.ones(100), fall))
    found = compare(a, b, names=("old", "new"))
    assert (
        str(found)
        == """\
A: old, steps 0 to 99
B: new, steps 0 to 99
100 rows aligned by step: shares of each state in A and B, truth of B less A's

rule        TRUE       FALSE     UNKNOWN     truth  parts at step
r      100%  60%     0%  40%     0%   0%     -0.40  60

First to part ways: r at step 60, from where it is mostly TRUE in A and FALSE in B.
  By then x had parted, at step 60: on average 1 in A and 0 in B."""
    )
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["first"] == "r"
    assert data["rules"][0]["parting"]["steps"] == [60, 60]
