"""A batch that could not be written comes again: everything is there once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import fake_records as fake
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from moe_rules_callback.errors import TryAgain
from moe_rules_callback.sinks import CluSink, TensorBoardSink
from moe_rules_callback.sinks.memory import MemorySink

RECORDS = fake.make_records(30)


def feed(sink: Any, run: Any, failures: int) -> None:
    """The batches of ten, the second of which fails so often."""
    sink.on_train_start(run)
    for begin in (0, 10, 20):
        batch, failed = RECORDS[begin : begin + 10], 0
        while True:
            try:
                sink.on_records(batch)
                break
            except TryAgain:
                failed += 1
        assert failed == (failures if begin == 10 else 0)
    sink.on_train_end(run)


def test_a_clu_writer_gets_no_step_twice() -> None:
    class Writer:
        def __init__(self) -> None:
            self.steps: list[int] = []
            self.errors = {13: 2}

        def write_scalars(self, step: int, scalars: Any) -> None:
            if self.errors.get(step, 0):
                self.errors[step] -= 1
                raise ConnectionError("gone")
            self.steps.append(step)

    writer = Writer()
    feed(CluSink(writer), fake.make_run(), 2)
    assert writer.steps == list(range(30))


@pytest.mark.parametrize("halfway", [False, True])
def test_an_event_file_holds_everything_once(
    halfway: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, original = 0, os.fsync

    def fsync(handle: int) -> None:
        nonlocal calls
        calls += 1
        if calls in (2, 3):  # of the second batch, and of its second attempt
            if halfway:
                os.ftruncate(handle, os.fstat(handle).st_size - 100)
            raise OSError(28, "No space left on device")
        original(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    feed(TensorBoardSink(), fake.make_run(tmp_path), 2)
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("signals/loss")] == list(range(30))
    (path,) = tmp_path.glob("*tfevents*")
    found = [value.tag for event in EventFileLoader(str(path)).Load() for value in event.summary.value]
    assert found.count("rules/text_summary") == 1
    assert found.count("signals/loss") == 30


@pytest.mark.parametrize(("step", "left"), [(0, 0), (5, 5), (10, 10), (17, 17), (29, 29), (99, 30)])
def test_memory_forgets_what_is_replaced(step: int, left: int, caplog: Any) -> None:
    sink, run = MemorySink(), fake.make_run()
    for begin in (0, 10, 20):
        sink.on_records(RECORDS[begin : begin + 10])
    sink.on_rewind(step)
    assert sink.dataset(run).step.values.tolist() == list(range(left))
    sink.on_records(RECORDS[left:])
    np.testing.assert_array_equal(sink.dataset(run).truth, RECORDS.truth)
    assert caplog.messages == (
        [f"{30 - left} rows from step {step} on are replaced, since an older state was restored"]
        * (left < 30)
    )
