"""What a flush costs, counted rather than timed: late flushes cost what early ones did."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import fake_records as fake
import pytest
from counting import instructions

from moe_rules_callback.sinks import TensorBoardSink, TensorBoardXWriter, ZarrSink
from moe_rules_callback.sinks.events import EventFile
from moe_rules_callback.sinks.memory import MemorySink

SINKS: dict[str, Callable[[Path], Any]] = {
    "zarr": lambda where: ZarrSink(where / "audit.zarr"),
    "tensorboard": TensorBoardSink,
    "memory": lambda where: MemorySink(),
}
IO = Path("/proc/self/io")
BATCH, FLUSHES = 512, 32  # 8 flushes fill a chunk of the history


def transferred(work: Callable[[], Any]) -> int:
    """Bytes that this process reads and writes."""

    def total() -> int:
        told = dict(line.split(": ") for line in IO.read_text().splitlines())
        return int(told["rchar"]) + int(told["wchar"])

    before = total()
    work()
    return total() - before


def flushes(make: Callable[[Path], Any], place: Path, measure: Callable[..., int]) -> list[int]:
    """What each flush of a run takes; without a router, for pictures of loads come now and then."""
    schema = fake.make_schema(experts=0)
    records, run = fake.make_records(FLUSHES * BATCH, schema), fake.make_run(schema=schema, flush_every=BATCH)
    records.state[:] = 0
    sink = make(place)
    if hasattr(sink, "on_train_start"):
        sink.on_train_start(run)
    batches = [records[start : start + BATCH] for start in range(0, len(records), BATCH)]
    figures = [measure(lambda batch=batch: sink.on_records(batch)) for batch in batches]
    if hasattr(sink, "on_train_end"):
        sink.on_train_end(run)
    return figures


@pytest.mark.parametrize("name", SINKS)
def test_late_flushes_interpret_no_more(name, tmp_path):
    figures = flushes(SINKS[name], tmp_path, instructions)
    assert 0 < max(figures[-8:]) <= 1.2 * max(figures[2:10]) + 100


@pytest.mark.skipif(not IO.exists(), reason="Linux counts what a process reads and writes")
@pytest.mark.parametrize("name", SINKS)
def test_late_flushes_read_and_write_no_more(name, tmp_path):
    figures = flushes(SINKS[name], tmp_path, transferred)
    assert max(figures[-8:]) <= 1.2 * max(figures[2:10]) + 4_096


def test_wide_rows_are_no_loops_over_scalars(tmp_path):
    def of(layers: int) -> int:
        schema = fake.make_schema(layers, experts=0)
        records, run = fake.make_records(20, schema), fake.make_run(schema=schema)
        sink = TensorBoardSink(tmp_path / str(layers))
        sink.on_train_start(run)
        sink.on_records(records[:10])
        count = instructions(lambda: sink.on_records(records[10:]))
        sink.on_train_end(run)
        return count

    assert of(200) <= of(2) + 1_000  # 10 rows of 396 scalars more


def test_a_clu_writer_looks_at_each_scalar_once(tmp_path):
    rows = [{f"scalar_{i}": float(i) for i in range(count)} for count in (10, 510)]
    with closing(TensorBoardXWriter(tmp_path)) as writer:
        for row in rows:
            writer.write_scalars(0, row)
        few, many = (instructions(lambda row=row: writer.write_scalars(1, row)) for row in rows)
    assert many <= few + 20 * 500


def test_a_row_of_scalars_is_one_record(tmp_path, monkeypatch):
    written = []
    write = EventFile._write
    monkeypatch.setattr(EventFile, "_write", lambda file, event: (written.append(event), write(file, event)))
    schema = fake.make_schema(experts=0)
    sink, records = TensorBoardSink(tmp_path), fake.make_records(100, schema)
    sink.on_train_start(fake.make_run(schema=schema))
    sink.on_records(records[:50])
    written.clear()
    sink.on_records(records[50:])
    sink.on_train_end(fake.make_run(schema=schema))
    assert len(written) == 50 + 1  # and where the rules stand
    assert len(list(tmp_path.iterdir())) == 1
