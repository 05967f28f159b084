"""Fits from runs to a rule file: what is accepted, what is refused, what is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from made import PREDICATES, rows_of

from moe_rules_callback.errors import FitError
from moe_rules_callback.fit import fit, fitting, read_labels
from moe_rules_callback.fit.parameters import LEAST_WEIGHT, parameters, spelled_out, weighed
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.language import parse_rule
from moe_rules_callback.predicates import Predicate
from moe_rules_callback.replay import replay, replay_history
from moe_rules_callback.rulebook import Rulebook, load_rules
from moe_rules_callback.rulewriter import write_rules

RULE = parse_rule("0.75 :: hot & calm", "fault", kind="risk")
BOOK = Rulebook("own", (RULE,), PREDICATES)
ROWS, ONSET = 40, 20


def signals(faulty: bool, seed: int) -> dict[str, np.ndarray]:
    """Heat that rises to 0.42 in a faulty run, and noise that says nothing."""
    random = np.random.default_rng(seed)
    heat = 0.2 + 0.04 * random.normal(size=ROWS)
    heat[ONSET:] += 0.22 * faulty
    return {"heat": heat, "noise": random.random(ROWS)}


def label(faulty: bool) -> list[tuple[int, None]] | None:
    return [(ONSET, None)] if faulty else None


@pytest.mark.slow
def test_from_histories_to_a_rule_file(tmp_path: Path) -> None:
    runs = {f"run{i}": records_to_dataset(replay(signals(i % 2 == 0, i), BOOK)) for i in range(8)}
    fitted = fit(BOOK, runs, {name: label(i % 2 == 0) for i, name in enumerate(runs)})
    assert fitted.accepted
    (of,) = fitted.fits
    assert of.runs == (4, 4)
    assert of.before.accuracy == 0.5
    assert of.after.accuracy > 0.95
    assert of.gain[0] == pytest.approx(of.after.accuracy - of.before.accuracy)

    # What the evaluator says by the new rules is what was found.
    write_rules(fitted.rules, tmp_path / "own.toml")
    book = load_rules(tmp_path / "own.toml")
    assert book == fitted.rules
    heat, noise = book.predicates["hot"], book.predicates["calm"]
    (hot, calm) = (weight for _, _, weight in weighed(book.rules[0].formula))
    assert heat.offset is not None
    assert heat.offset < 0.42
    assert calm == LEAST_WEIGHT
    for i, run in enumerate(runs.values()):
        records = replay_history(run, book)
        assert np.mean(records.state[:, 0] == 1) == pytest.approx(0.5 * (i % 2 == 0), abs=0.1)
        value = {name: run.signal_pooled.sel(signal=name).values for name in ("heat", "noise")}
        x = (value["heat"] - heat.offset, (noise.offset or 0) - value["noise"])
        logits = [
            [each.slope * (feature + sign * each.margin) for sign in (-1, 1)]
            for each, feature in zip((heat, noise), x, strict=True)
        ]
        a, b = (1 / (1 + np.exp(-np.stack(each, -1))) for each in logits)
        expected = np.clip(1 - hot * (1 - a) - calm * (1 - b), 0, 1)
        np.testing.assert_allclose(records.truth[:, 0], expected, atol=1e-5)

    printed = str(fitted)
    assert "fault: accepted\n  4 runs in which it ought to be TRUE, 4 in which it ought not." in printed
    assert "offset of hot" in printed
    without = {each.what: each.outcome.accuracy for each in of.ablations}
    assert list(without) == [
        "weights as shipped", "offsets as shipped", "slopes as shipped",
        "leaving out hot", "leaving out calm",
    ]  # fmt: skip
    assert without["leaving out hot"] == pytest.approx(0.5, abs=0.01)
    assert without["leaving out calm"] > 0.95
    assert without["offsets as shipped"] < of.after.accuracy


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are signals, read without an evaluator."""

    def read_rows(run: Any, name: str, book: Rulebook) -> Any:
        return rows_of(RULE, run["heat"], run["noise"])

    monkeypatch.setattr(fitting, "read_rows", read_rows)


@pytest.mark.slow
@pytest.mark.usefixtures("made")
def test_shuffled_labels_are_not_accepted() -> None:
    """Labels that have nothing to do with the runs: half of the faulty ones have one, half of the others."""
    runs: list[Any] = [signals(i < 4, i) for i in range(8)]
    fitted = fit(BOOK, runs, [label(i % 2 == 0) for i in range(8)])
    assert not fitted.accepted
    assert fitted.rules is BOOK
    assert "fault: not accepted, the old rule stays" in str(fitted)
    assert "it is not surely better than the old rule" in str(fitted)


def test_few_runs_are_refused_with_their_numbers() -> None:
    """Before anything is read."""
    runs: list[Any] = [None] * 6
    with pytest.raises(FitError, match=r"2 in which it ought to be TRUE and 4 in which it ought not\."):
        fit(BOOK, runs, [[(0, 9)], [(3, None)], None, None, None, ()])


RUNS: dict[str, Any] = dict.fromkeys("abcdef")


@pytest.mark.parametrize(
    ("runs", "labels", "message"),
    [
        ([1, 2], [None], "there are 2 runs and 1 labels"),
        ({"run_a": 1}, {"run_b": None}, r"label of 'run_b', which is no run\. Did you mean run_a\?"),
        ([1], [{"falt": None}], r"label of 'falt', which is no rule\. Did you mean fault\?"),
        ([1], [{}], "there are no labels"),
    ],
)
def test_labels_that_fit_no_run_are_refused(runs: Any, labels: Any, message: str) -> None:
    with pytest.raises(FitError, match=message):
        fit(BOOK, runs, labels)


def test_a_label_without_its_rule_is_refused_where_there_are_several() -> None:
    book = Rulebook("two", (RULE, parse_rule("hot", "other")), PREDICATES)
    with pytest.raises(FitError, match=r"this one has 2. Say of which rule they are: \{'fault'"):
        fit(book, [xr.Dataset()], [[(0, 3)]])


@pytest.mark.usefixtures("made")
def test_an_interval_outside_of_the_run_is_refused() -> None:
    runs: list[Any] = [signals(False, i) for i in range(6)]
    with pytest.raises(
        FitError, match=r"'runs\[0\]', rule 'fault': no row lies in the interval from 90 to the end"
    ):
        fit(BOOK, runs, [[(90, None)], [(1, 2)], [(1, 2)], None, None, None])


def test_labels_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("run,rule,start,end,note\na,fault,3,7,x\na,fault,9,,\na,other,,,\nb, fault,,\n")
    assert read_labels(path) == {"a": {"fault": [(3, 7), (9, None)], "other": []}, "b": {"fault": []}}
    for text, message in (
        ("run,rule,start\n", "lacks the column 'end'. Its first line is: run,rule,start,end"),
        ("run,rule,start,end\na,fault,x,\n", "line 2: start and end are steps"),
        ("run,rule,start,end\na,fault,,7\n", "line 2: there is an end and no start"),
    ):
        path.write_text(text)
        with pytest.raises(FitError, match=message):
            read_labels(path)


def test_a_ramp_that_another_rule_reads_is_kept() -> None:
    rows = {"a": rows_of(RULE, np.zeros(3), np.zeros(3))}
    predicates, ramps, notes = fitting._ramps(RULE, {"calm"}, rows)
    assert set(predicates) == {"hot", "calm"}
    assert set(ramps) == {"hot"}
    assert notes == ["the ramp of calm is kept: another rule reads it too"]


def test_ramps_are_spelled_out_where_they_are_one_number() -> None:
    cv = Predicate("load_cv", "high")
    assert spelled_out(cv, [(8, 2), (64, 2)]) is None
    spelled = spelled_out(cv, [(8, 2)])
    assert spelled is not None
    assert spelled.offset is not None
    own = Predicate("my_scalar", "high")
    assert spelled_out(own, [(8, 2), (64, 2)]) == own
    assert [each.group for each in parameters(parse_rule("a", "r"), {"a": own})] == ["slopes"]
    trend = spelled_out(Predicate("loss", "decreasing"), [(1, 1)])
    assert trend is not None
    (offset, _) = parameters(parse_rule("a", "r"), {"a": trend})
    assert (offset.low, offset.start, offset.high) == (0.0, 0.5, 1.0)


def test_values_are_rounded_to_their_scale_and_stay_within_bounds() -> None:
    predicates = {
        "a": Predicate("x", "high", 1000.0, slope=1200.0),
        "b": Predicate("x", "low", 0.1, slope=1e-4),
    }
    weight, _, fine, _, coarse, slope = parameters(parse_rule("0.3*a & b", "r"), predicates)
    assert weight.rounded(0.0) == 0.3
    assert weight.rounded(-0.123456) == 0.177
    assert weight.rounded(weight.bounds[0]) == LEAST_WEIGHT
    assert fine.rounded(0.5) == 1000.00125
    assert coarse.rounded(0.0) == 0.1
    assert coarse.rounded(0.1) == pytest.approx(3000, abs=30)
    assert slope.rounded(1.0) == pytest.approx(2e-4)
