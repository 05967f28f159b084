"""What is written is read back by TensorBoard itself."""

from __future__ import annotations

import contextlib
import importlib
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
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
    assert set(accumulator.Tags()["scalars"]) == set(table.tags)
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


def test_layout_draws_a_band_for_every_rule(tmp_path):
    schema = fake.make_schema(rules=(*fake.RULES, fake.Rule("an odd/name!", fake.CONFIDENT)))
    fake.feed(TensorBoardSink(), fake.make_records(3, schema), fake.make_run(tmp_path, schema))
    accumulator = read(tmp_path)
    (category,) = layout_of(accumulator).category
    assert category.title == "rules"
    assert [chart.title for chart in category.chart] == [rule.name for rule in schema.rules]
    for chart in category.chart:
        (series,) = chart.margin.series
        tags = [series.value, series.lower, series.upper]
        assert len(set(tags)) == 3
        assert set(tags) <= set(accumulator.Tags()["scalars"])
    assert category.chart[1].margin.series[0].lower == "rules/load_imbalance/lower"


def test_rules_are_there_as_text(tmp_path):
    fake.feed(TensorBoardSink(), fake.make_records(3), fake.make_run(tmp_path))
    (event,) = read(tmp_path).Tensors("rules/text_summary")
    assert b"**load_imbalance** (risk, threshold 0.75" in event.tensor_proto.string_val[0]


def test_long_runs_are_thinned(tmp_path):
    records = fake.make_records(2_000, fake.make_schema(1), steps_per_second=1e6)
    records.state[:] = 0
    fake.feed(TensorBoardSink(), records, fake.make_run(tmp_path, records.schema))
    assert len(read(tmp_path).Scalars("signals/loss")) == 1_000


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


@pytest.mark.slow
def test_the_server_serves_bands_and_curves(tmp_path):
    records = fake.make_records(20)
    fake.feed(TensorBoardSink(), records, fake.make_run(tmp_path / "demo"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def get(path: str):
        """Waits until the server is up and has read the run."""
        for _ in range(120):
            with (
                contextlib.suppress(urllib.error.URLError, ConnectionError),
                urllib.request.urlopen(f"http://127.0.0.1:{port}/data/plugin/{path}", timeout=10) as answer,
            ):
                if content := json.load(answer):
                    return content
            time.sleep(0.5)
        raise AssertionError(f"no answer to {path}")

    try:
        layout = get("custom_scalars/layout")
        charts = layout["category"][0]["chart"]
        assert [chart["title"] for chart in charts] == [rule.name for rule in fake.RULES]
        series = charts[0]["margin"]["series"][0]
        curve = get(f"scalars/scalars?run=demo&tag={series['lower']}")
        values = np.array([value for _, _, value in curve], np.float32)
        np.testing.assert_array_equal(values, records.truth[:, 0, 0])
    finally:
        server.kill()
        server.wait()
