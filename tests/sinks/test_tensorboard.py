"""What is written is read back by TensorBoard itself."""

from __future__ import annotations

import importlib
import itertools
import time
from pathlib import Path
from typing import Any

import fake_records as fake
import numpy as np
import pytest

from moe_rules_callback.errors import HistoryError
from moe_rules_callback.sinks import TensorBoardSink
from moe_rules_callback.sinks.scalars import ScalarTable

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

layout_pb2: Any = importlib.import_module("tensorboard.plugins.custom_scalar.layout_pb2")


def read(logdir: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(logdir), size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


def layout_of(accumulator: EventAccumulator) -> Any:
    (event,) = accumulator.Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def test_every_value_comes_back(tmp_path):
    records = fake.make_records(100)
    fake.feed(TensorBoardSink(), records, fake.make_run(tmp_path))
    accumulator = read(tmp_path)
    table = ScalarTable(records.schema)
    of_flushes = {
        *(f"rules/{rule.name}/threshold" for rule in fake.RULES),
        *(f"{what}/{rule.name}" for what in ("final", "fired") for rule in fake.RULES),
    }
    assert set(accumulator.Tags()["scalars"]) == {*table.tags, *of_flushes}
    for tag, values in zip(table.tags, table.values(records).T, strict=True):
        events = accumulator.Scalars(tag)
        assert [event.step for event in events] == records.step.tolist()
        np.testing.assert_array_equal(np.array([event.value for event in events], np.float32), values)
        np.testing.assert_array_equal([event.wall_time for event in events], records.wall_time)


def test_values_are_there_after_every_flush(tmp_path):
    sink, run = TensorBoardSink(), fake.make_run(tmp_path)
    fake.feed(sink, fake.make_records(100), run, batch=50, end=False)
    assert len(read(tmp_path).Scalars("signals/loss")) == 100
    sink.on_train_end(run)


def test_layout_draws_a_band_and_a_threshold_for_every_rule(tmp_path):
    odd = fake.Rule("an odd/name!", fake.CONFIDENT, 0.6, kind="health")
    schema = fake.make_schema(rules=(*fake.RULES, odd))
    fake.feed(TensorBoardSink(), fake.make_records(3, schema), fake.make_run(tmp_path, schema))
    accumulator = read(tmp_path)
    categories = {each.title: each.chart for each in layout_of(accumulator).category}
    assert list(categories) == ["Risks: TRUE is bad", "Health: FALSE is bad", "Watched"]
    for chart, rule in zip(categories["Risks: TRUE is bad"], (fake.RULES[1], fake.RULES[4]), strict=True):
        assert chart.title == rule.name
        band, threshold = chart.margin.series
        curves = [f"rules/{rule.name}/{curve}" for curve in ("value", "lower", "upper", "threshold")]
        assert [band.value, band.lower, band.upper, threshold.value] == curves
        assert threshold.value == threshold.lower == threshold.upper
        assert {event.value for event in accumulator.Scalars(threshold.value)} == {np.float32(rule.threshold)}
    (chart,) = categories["Health: FALSE is bad"]
    assert chart.title == odd.name
    assert {tag for each in chart.margin.series for tag in (each.value, each.lower, each.upper)} <= set(
        accumulator.Tags()["scalars"]
    )


def test_thresholds_are_drawn_over_all_steps_so_far(tmp_path):
    fake.feed(TensorBoardSink(), fake.make_records(200), fake.make_run(tmp_path), batch=50)
    events = read(tmp_path).Scalars("rules/load_imbalance/threshold")
    assert [event.step for event in events] == [0, 49, 99, 149, 199]


def test_a_killed_run_stands_where_its_last_flush_left_it(tmp_path):
    sink, records, run = TensorBoardSink(), fake.make_records(200), fake.make_run(tmp_path)
    fake.feed(sink, records, run, batch=50, end=False)
    accumulator = read(tmp_path)
    sink.on_train_end(run)
    assert accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.plugin_name == "hparams"
    for rule, state in zip(fake.RULES, records.state[-1].tolist(), strict=True):
        assert accumulator.Scalars(f"final/{rule.name}")[-1].value == state
    true = (records.state[:, 4] == 1).mean()  # a risk without a warm-up
    assert accumulator.Scalars("fired/underutilized_experts")[-1].value == pytest.approx(true)


def test_rules_are_there_as_text(tmp_path):
    fake.feed(TensorBoardSink(), fake.make_records(3), fake.make_run(tmp_path))
    (event,) = read(tmp_path).Tensors("rules/text_summary")
    assert b"**load_imbalance** (risk, threshold 0.75" in event.tensor_proto.string_val[0]


def test_long_runs_are_thinned(tmp_path):
    records = fake.make_records(2_000, fake.make_schema(1), steps_per_second=1e6)
    records.state[:] = 0
    fake.feed(TensorBoardSink(), records, fake.make_run(tmp_path, records.schema))
    assert len(read(tmp_path).Scalars("signals/loss")) == 1_000


def drawn(accumulator: EventAccumulator) -> list[int]:
    """Steps with pictures of loads."""
    return [event.step for event in accumulator.Tensors("experts_by_layer")]


def test_pictures_become_rarer(tmp_path):
    records = fake.make_records(3_000, fake.make_schema(rules=fake.RULES[:1]))
    fake.feed(TensorBoardSink(), records, fake.make_run(tmp_path, records.schema), batch=10)
    steps = drawn(read(tmp_path))
    assert steps[:10] == list(range(9, 100, 10))  # a flush each
    assert steps[-1] == 2_999
    ratios = [(later + 1) / (step + 1) for step, later in itertools.pairwise(steps[9:-1])]
    assert min(ratios) >= 1.1
    assert max(ratios) < 1.25


def test_every_layer_has_a_picture_that_says_how_to_read_it(tmp_path):
    fake.feed(TensorBoardSink(), fake.make_records(10), fake.make_run(tmp_path))
    accumulator = read(tmp_path)
    tags = ("experts_by_layer", "experts_over_time/block_0/moe", "experts_over_time/block_1/moe")
    for tag in tags:
        (event,) = accumulator.Tensors(tag)
        width, height, png = event.tensor_proto.string_val
        assert png[:8] == b"\x89PNG\r\n\x1a\n"
        assert (int(width), int(height)) == (
            int.from_bytes(png[16:20], "big"),
            int.from_bytes(png[20:24], "big"),
        )
        metadata = accumulator.SummaryMetadata(tag)
        assert metadata.plugin_data.plugin_name == "images"
        assert "dark blue a tenth or less" in metadata.summary_description


def test_without_a_router_there_are_no_pictures(tmp_path):
    schema = fake.make_schema(experts=0)
    fake.feed(TensorBoardSink(), fake.make_records(10, schema), fake.make_run(tmp_path, schema))
    assert not any(tag.startswith("experts") for tag in read(tmp_path).Tags()["tensors"])


def test_a_run_without_rows_writes_nothing(tmp_path):
    fake.feed(TensorBoardSink(), fake.make_records(0), fake.make_run(tmp_path))
    tags = read(tmp_path).Tags()
    assert tags["scalars"] == tags["tensors"] == []


def test_a_second_run_goes_beside_the_first(tmp_path, caplog):
    for rows in (3, 5, 7):
        fake.feed(TensorBoardSink(tmp_path), fake.make_records(rows), fake.make_run())
    for directory, rows in ((".", 3), ("audit-2", 5), ("audit-3", 7)):
        assert len(read(tmp_path / directory).Scalars("signals/loss")) == rows
    assert "holds the curves of another run; this run's go to" in caplog.text


def test_resume_makes_tensorboard_forget_what_is_replaced(tmp_path, monkeypatch):
    seconds = iter(range(1_700_000_000, 1_700_000_099))
    monkeypatch.setattr(time, "time", seconds.__next__)  # event files are read in the order of their seconds
    first, second = fake.make_records(50), fake.make_records(60, seed=1)
    fake.feed(TensorBoardSink(), first, fake.make_run(tmp_path))
    fake.feed(TensorBoardSink(), second[30:], fake.make_run(tmp_path, resume=True))
    accumulator = read(tmp_path)
    events = accumulator.Scalars("signals/loss")
    assert [event.step for event in events] == list(range(60))
    assert drawn(accumulator) == [49, 59]  # pictures stay
    assert [event.step for event in accumulator.Scalars("final/load_imbalance")] == [59]
    want = np.concatenate([first.loss[:30], second.loss[30:]])
    np.testing.assert_array_equal(np.array([event.value for event in events], np.float32), want)


def test_files_of_the_same_second_do_not_clash(tmp_path):
    sinks = [TensorBoardSink(tmp_path / "a"), TensorBoardSink(tmp_path / "a")]
    for sink in sinks:
        sink.on_train_start(fake.make_run(resume=True))
        sink.on_train_end(fake.make_run())
    assert len(list((tmp_path / "a").iterdir())) == 2


def test_it_needs_somewhere_to_write():
    with pytest.raises(HistoryError, match=r"the run has no log directory. Pass logdir="):
        TensorBoardSink().on_train_start(fake.make_run())
