"""What a run says about each rule, against counts made row by row."""

from __future__ import annotations

import json
from dataclasses import replace

import fake_records as fake
import numpy as np
import pytest
import xarray as xr

from moe_rules_callback import verdicts as module
from moe_rules_callback.errors import HistoryError
from moe_rules_callback.formula import Rule
from moe_rules_callback.history import open_history, records_to_dataset
from moe_rules_callback.records import Records, Schema, State
from moe_rules_callback.sinks.zarr import ZarrSink
from moe_rules_callback.verdicts import Verdict, summary, verdicts

RISK = Rule(
    "collapse",
    fake.IMBALANCED,
    0.75,
    "0.75 :: high_expert_imbalance  # one expert takes all",
    kind="risk",
    warmup=2,
    severity="error",
    description="One expert takes all.",
    cause="No balancing loss.",
    next_step="Add one.",
)
HEALTH = replace(RISK, name="decided", kind="health", warmup=0, severity="info", cause="", next_step="")
WATCHED = Rule("watched", fake.CONFIDENT)


def run(*rules: tuple[Rule, list[int]], lower: np.ndarray | None = None) -> xr.Dataset:
    """A run whose states are given, at steps 0, 10, 20, ..; `lower` [n, R, Y] are lower bounds by layer."""
    states = np.array([state for _, state in rules], np.int8).T
    rows = len(states)
    schema = Schema(tuple(rule for rule, _ in rules), fake.SIGNALS, ("block_0", "block_1"), 0)
    whole = fake.make_records(rows, schema)
    truth = whole.truth_layer.copy()
    if lower is not None:
        truth[..., 0], truth[..., 1] = lower, 1
    arrays = {"step": whole.step * 10, "state": states, "truth_layer": truth}
    return records_to_dataset(replace(whole, **arrays))


def only(dataset: xr.Dataset) -> Verdict:
    (verdict,) = verdicts(dataset)
    return verdict


def test_a_risk_fires_where_it_is_true_from_its_warm_up_on():
    verdict = only(run((RISK, [1, 1, 0, 1, 1, 2])))  # warm from step 10 on: the warm-up is 2
    assert (verdict.rows, verdict.rows_fired, verdict.share) == (5, 3, 0.6)
    assert (verdict.first_step, verdict.last_step, verdict.end) == (10, 40, 50)
    assert (verdict.state, verdict.since) == (State.UNKNOWN, 50)
    assert verdict.fired
    assert not verdict.fires_now
    assert verdict.counts == {State.FALSE: 1, State.TRUE: 3, State.UNKNOWN: 1, State.CONTRADICTORY: 0}


def test_a_health_rule_fires_where_it_is_false():
    verdict = only(run((HEALTH, [1, 0, 0])))
    assert (verdict.rows_fired, verdict.first_step, verdict.since) == (2, 10, 10)
    assert verdict.fires_now


def test_a_rule_without_a_kind_never_fires():
    verdict = only(run((WATCHED, [1, 0, 1, 1])))
    assert not verdict.fired
    assert verdict.first_step is None
    assert verdict.sentence.startswith(
        "TRUE in 75 % of 4 rows (watched only: it has no kind); TRUE at the end"
    )


def test_counts_agree_with_a_count_row_by_row():
    records = fake.make_records(500)
    for verdict, rule in zip(verdicts(records_to_dataset(records)), records.schema.rules, strict=True):
        number = records.schema.rules.index(rule)
        rows = [i for i in range(500) if records.step[i] >= rule.warmup]
        states = [State(int(records.state[i, number])) for i in rows]
        assert verdict.counts == {s: states.count(s) for s in State if s >= 0}
        fires = {"risk": State.TRUE, "health": State.FALSE, None: None}[rule.kind]
        at = [int(records.step[i]) for i, state in zip(rows, states, strict=True) if state == fires]
        assert (verdict.first_step, verdict.last_step) == ((at[0], at[-1]) if at else (None, None))
        assert verdict.truth == tuple(records.truth[-1, number].tolist())


@pytest.mark.parametrize("rows_at_once", [1, 3, 2**16])
def test_the_worst_layer_is_that_of_the_rows_in_which_it_fired(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "ROWS", rows_at_once)
    fires_in_1 = np.array([[[0.9, 0.1]], [[0.9, 0.1]], [[0.1, 0.8]], [[0.9, 0.1]]])
    assert only(run((replace(RISK, warmup=0), [0, 0, 1, 0]), lower=fires_in_1)).layer == "block_1"
    assert only(run((replace(RISK, warmup=0), [0, 0, 0, 0]), lower=fires_in_1)).layer == "block_0"


def test_the_worst_layer_of_a_health_rule_has_the_lowest_upper_bound():
    dataset = run((HEALTH, [0, 0]))
    dataset["truth_layer"][:] = np.array([[0.0, 0.4], [0.1, 0.2]])
    assert only(dataset).layer == "block_1"


def test_it_says_why_and_what_to_do():
    lower = np.array([[[0.9, 0.1]]] * 3)
    assert str(only(run((RISK, [2, 1, 1]), lower=lower))) == (
        "collapse: fired in 2 of 2 rows (100 %), first at step 10, last at 20, worst in layer 'block_0'; "
        "TRUE at the end [0.90, 1.00], since step 10.\n"
        "  Why:  0.75 :: high_expert_imbalance. One expert takes all. Likely cause: No balancing loss.\n"
        "  Next: Add one."
    )


@pytest.mark.parametrize(
    ("rule", "states", "sentence"),
    [
        (replace(RISK, warmup=99), [1, 1], "not judged: it warms up until step 99, and the run ends at 10."),
        (RISK, [2, 2, 2], "never decided in 2 rows; UNKNOWN at the end"),
        (RISK, [0, 0, 0], "did not fire in 2 rows; FALSE at the end"),
        (RISK, [0] * 299 + [1], "fired in 1 of 299 rows (under 1 %), first at step 2,990, worst in layer"),
        (
            RISK,
            [1] * 299 + [0],
            "fired in 298 of 299 rows (over 99 %), first at step 10, last at 2,980, worst",
        ),
    ],
)
def test_sentences(rule: Rule, states: list[int], sentence: str):
    assert only(run((rule, states))).sentence.startswith(sentence)


def test_a_rule_that_was_not_judged_has_no_worst_layer():
    assert only(run((replace(RISK, warmup=99), [1, 1]))).layer == ""


def test_a_run_without_rows():
    empty: Records = fake.make_records(3)[:0]
    for verdict in verdicts(records_to_dataset(empty)):
        assert verdict.sentence == "not judged: the run has no rows."
        assert (verdict.state, verdict.truth, verdict.layer) == (State.NOT_WRITTEN, (0.0, 1.0), "")
        assert not verdict.fires_now
    assert "2 not judged" in summary(verdicts(records_to_dataset(empty)))


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (
            ([1, 1], [0, 0]),
            "2 of 3 rules fired, and all of them at the end: collapse (error), decided (info).",
        ),
        (([1, 0], [0, 0]), "2 of 3 rules fired, 1 of them at the end: collapse (error), decided (info)."),
        (([1, 0], [0, 1]), "2 of 3 rules fired, none of them at the end: collapse (error), decided (info)."),
        (([0, 0], [1, 0]), "1 of 3 rules fired, still at the end: decided (info)."),
        (([0, 1], [1, 1]), "1 of 3 rules fired, still at the end: collapse (error)."),
        (([1, 0], [1, 1]), "1 of 3 rules fired, not at the end: collapse (error)."),
        (([0, 0], [1, 2]), "None of 3 rules fired."),
        (([2, 2], [1, 1]), "None of 3 rules fired; 1 never decided."),
    ],
)
def test_one_sentence_about_all(states: tuple[list[int], list[int]], expected: str):
    risk, other = replace(RISK, warmup=0), replace(RISK, warmup=0, name="other")
    dataset = run((HEALTH, states[1]), (risk, states[0]), (other, [0, 0]), (WATCHED, [1, 1]))
    assert summary(verdicts(dataset)) == expected


def test_rules_that_were_not_judged_are_counted():
    dataset = run((replace(RISK, warmup=99), [1, 1]), (replace(RISK, warmup=0, name="other"), [1, 1]))
    assert summary(verdicts(dataset)) == "1 of 2 rules fired, still at the end: other (error); 1 not judged."
    watched = summary(verdicts(run((WATCHED, [1, 1]))))
    assert watched == "1 rule watched; none has a kind, so none can fire."


def test_it_reads_the_same_from_disk_and_as_json(tmp_path):
    records = fake.make_records(150)
    fake.feed(ZarrSink(), records, fake.make_run(tmp_path))
    found = verdicts(open_history(tmp_path))
    assert found == verdicts(records_to_dataset(records))
    told = json.loads(json.dumps([verdict.to_dict() for verdict in found]))
    assert told[4]["rule"] == "underutilized_experts"
    assert (told[4]["fired"], told[4]["rows_fired"]) == (True, found[4].rows_fired)
    assert told[4]["counts"].keys() == {"false", "true", "unknown", "contradictory"}
    assert told[4]["state"] == found[4].state.name.lower()


def test_a_dataset_without_attributes_says_what_took_them():
    with pytest.raises(HistoryError, match=r"its attributes are gone\. Usual cause: arithmetic"):
        verdicts(records_to_dataset(fake.make_records(3)).drop_attrs())
