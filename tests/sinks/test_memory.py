"""The history in memory: whole while it is small, and bounded."""

from __future__ import annotations

import fake_records as fake

from moe_rules_callback.records import ARRAYS
from moe_rules_callback.sinks.memory import MemorySink


def size(records) -> int:
    return sum(getattr(records, name).nbytes for name in ARRAYS)


def test_history_is_all_that_was_given():
    records, run = fake.make_records(10), fake.make_run(config={"lr": 0.1})
    sink = MemorySink()
    assert sink.dataset(run).sizes["step"] == 0
    for rows in (slice(0, 4), slice(4, 5), slice(5, 10)):
        sink.on_records(records[rows])
    dataset = sink.dataset(run)
    for name in ARRAYS:
        assert (dataset[name].values == getattr(records, name)).all()
    assert dataset.attrs["config"] == '{"lr": 0.1}'


def test_the_oldest_batches_go_when_the_limit_is_reached_and_that_is_said_once(caplog):
    records, run = fake.make_records(40), fake.make_run()
    sink = MemorySink(limit=size(records[:15]))
    for start in range(0, 40, 5):
        sink.on_records(records[start : start + 5])
        kept = sink.dataset(run).step.values
        assert kept.tolist() == list(range(max(0, start - 10), start + 5))
    assert caplog.messages == [
        "the history in memory has reached 0 MiB, so its oldest rows are dropped from now on; "
        "pass logdir=... to keep all of them on disk"
    ]


def test_a_batch_above_the_limit_is_kept_until_the_next():
    records, run = fake.make_records(8), fake.make_run()
    sink = MemorySink(limit=1)
    sink.on_records(records[:5])
    assert sink.dataset(run).step.values.tolist() == [0, 1, 2, 3, 4]
    sink.on_records(records[5:])
    assert sink.dataset(run).step.values.tolist() == [5, 6, 7]
