"""Calibration on runs whose distribution is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from scipy.stats import norm

from moe_rules_callback import HistoryError, Predicate, Rulebook, load_rules, parse_rule
from moe_rules_callback.calibration import Calibration, calibrate
from moe_rules_callback.cli import main
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.replay import replay, replay_history
from moe_rules_callback.rulewriter import write_rules

BOOK = Rulebook(
    "test",
    (
        parse_rule("0.75 :: high_queue", "long", kind="risk"),
        parse_rule("0.75 :: low_router_entropy & increasing_loss", "sure", kind="risk"),
        parse_rule("long_queue -> blocked", "axiom"),
    ),
    {"high_queue": Predicate("queue", "high", 9.0), "long_queue": Predicate("queue", "high", 9.0)},
)


def run(seed: int, rows: int = 1000, shift: float = 0.0) -> xr.Dataset:
    rng = np.random.default_rng(seed)
    metrics = {"queue": rng.normal(5 + shift, 1, rows), "loss": rng.random(rows),
               "router_entropy": rng.normal(0.5, 0.01, rows)}  # fmt: skip
    return records_to_dataset(replay(metrics, {"any": "stable_loss"}, signals=list(metrics)))


@pytest.fixture(scope="module")
def many() -> Calibration:
    return calibrate([run(seed) for seed in range(6)], BOOK)


def test_the_tail_is_that_of_the_distribution(many: Calibration) -> None:
    queue, entropy, _ = many.predicates
    assert (queue.name, queue.values, queue.runs) == ("high_queue", 6 * 900, 6)
    tail = norm.ppf(0.99)
    assert queue.low < 5 + tail < queue.high
    assert entropy.low < 0.5 - tail * 0.01 < entropy.high
    assert queue.median == pytest.approx(5, abs=0.05)
    assert queue.after.margin == pytest.approx((queue.high - queue.low) / 2)


def test_truth_is_small_at_the_tail_and_half_beyond(many: Calibration) -> None:
    for each in many.predicates:
        ramp, sign = each.after, 1 if each.after.sense == "high" else -1
        assert ramp.offset is not None
        at = {x: 1 / (1 + np.exp(-ramp.slope * sign * (x - ramp.offset))) for x in (each.tail, ramp.offset)}
        assert at == {each.tail: pytest.approx(0.05, abs=1e-6), ramp.offset: pytest.approx(0.5)}
        assert ramp.sampling == 2.0


def test_as_far_beyond_the_tail_as_that_is_from_the_median(many: Calibration) -> None:
    queue, entropy, _ = many.predicates
    assert queue.after.offset == pytest.approx(queue.tail + queue.high - queue.median)
    # Towards 0, which an entropy cannot pass, as a ratio.
    assert entropy.after.offset == pytest.approx(entropy.tail * entropy.low / entropy.median)


def test_towards_one_a_share_stays_below_it() -> None:
    shares = [
        records_to_dataset(
            replay({"load_cv_normalised": np.linspace(0.6, 0.9, 400)}, {"any": "high_load_cv_normalised"})
        )
    ]
    book = Rulebook("b", (parse_rule("uneven"),), {"uneven": Predicate("load_cv_normalised", "high", 0.95)})
    (share,) = calibrate(shares, book).predicates
    assert share.after.offset is not None
    assert share.high < share.after.offset < 1


def test_what_holds_in_health_or_never_varies_stays() -> None:
    book = Rulebook(
        "b",
        (parse_rule("near & odd"),),
        {"near": Predicate("queue", "low", 9.0), "odd": Predicate("still", "high", 1.0)},
    )
    still = run(0)
    metrics = {"queue": still["signal_value"].sel(signal="queue").values[:, 0], "still": np.zeros(1000)}
    history = records_to_dataset(replay(metrics, {"any": "stable_queue"}, signals=list(metrics)))
    assert calibrate([history], book).skipped == {
        "near": "it holds in these runs; if it should not, give it an offset beyond them first",
        "odd": "its signal does not vary in these runs",
    }


def test_few_runs_that_differ_make_wide_margins(many: Calibration) -> None:
    differing = calibrate([run(seed, shift=seed) for seed in range(3)], BOOK)
    assert differing.predicates[0].after.margin > 3 * many.predicates[0].after.margin


def test_no_alarm_on_runs_left_out_and_alarms_on_others(many: Calibration) -> None:
    assert many.alarms == {"long": 0, "sure": 0, "axiom": 0, "blocked": 0}
    assert many.rows == 6 * 900
    shifted = replay_history(run(9, shift=9.0), many.rules)
    assert (shifted.state[:, 0] == 1).mean() > 0.9
    mixed = calibrate([*(run(seed) for seed in range(4)), run(9, shift=9.0)], BOOK)
    assert mixed.alarms is not None
    assert mixed.alarms["long"] > 500


def test_what_is_not_calibrated_is_said(many: Calibration) -> None:
    assert many.skipped == {"increasing_loss": "it is judged by the trend of its signal"}
    few = calibrate([run(0, rows=150)], BOOK)
    assert few.skipped["high_queue"] == "its signal 'queue' has fewer than 200 values in these runs"
    assert few.alarms is None
    assert str(few).endswith("One run: false alarms on others cannot be told. Give two or more.")
    own = calibrate([run(0)], {"r": "high_queue"})
    assert own.skipped == {"high_queue": "it is judged by the past of its signal"}


def test_the_table(many: Calibration) -> None:
    head, first, *_, last = str(many).splitlines()
    assert head.split() == ["predicate", "median", "tail", "95", "%", "range", "offset"]
    assert first.split()[0] == "high_queue"
    assert last == "On runs left out, 5,400 rows after warm-up: no rule fired."


def test_no_rows() -> None:
    with pytest.raises(HistoryError) as error:
        calibrate([run(0, rows=50)], BOOK)
    assert str(error.value) == (
        "there is nothing to calibrate with: no run has a row from step 100 on. Give longer runs, or a "
        "smaller after= (--after)."
    )


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(2):
        lines = [f'{{"step": {i}, "loss": {x}, "queue": {x}}}' for i, x in
                 enumerate(np.random.default_rng(seed).normal(5, 1, 400))]  # fmt: skip
        (tmp_path / f"{seed}.jsonl").write_text("\n".join(lines))
    rules = tmp_path / "rules.toml"
    book = Rulebook("b", BOOK.rules[:1], {"high_queue": BOOK.predicates["high_queue"]})
    write_rules(book, rules)
    logs = [str(tmp_path / f"{seed}.jsonl") for seed in range(2)]
    out = tmp_path / "mine.toml"
    assert main(["calibrate", *logs, "--rules", str(rules), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == f"wrote {out}"
    after = load_rules(out).predicates["high_queue"]
    assert after.offset is not None
    assert 9 < after.offset < 16
