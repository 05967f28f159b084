"""A clock that jumps: by hours and back, as at the end of summer time. Rows, curves and rates go on."""

from __future__ import annotations

import io
import time
from pathlib import Path

import fake_records as fake
import numpy as np
import pytest
from collector import make
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_rules_callback.records import Records
from moe_rules_callback.sinks import ConsoleSink, TensorBoardSink, scalars

HOUR = 3600.0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def jumping(rows: int, *, every: int = 10, by: float = -HOUR) -> Records:
    """Rows whose clock is set by so much after every so many rows."""
    records = fake.make_records(rows)
    records.wall_time[:] += by * (np.arange(rows) // every)
    return records


@pytest.mark.parametrize("by", [-HOUR, HOUR, -1e9])
def test_the_callback_goes_on(by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, jumped, calls = time.time, 0.0, 0

    def clock() -> float:
        nonlocal jumped, calls
        calls += 1
        jumped += by * (-1) ** calls  # there and back
        return real() + jumped

    with make(logdir=tmp_path) as audit:
        monkeypatch.setattr(time, "time", clock)
        for step in range(40):
            audit.on_step({"x": float(step)})
        history = audit.history.load()
        monkeypatch.undo()
    assert calls > 5
    assert history.step.values.tolist() == history.signal_pooled.values[:, 0].tolist() == list(range(40))
    assert np.isfinite(history.wall_time).all()
    curves = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in curves.Scalars("signals/x")] == list(range(40))


def test_curves_do_not_end_where_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "ALL_ROWS_UNTIL", 5)
    records = jumping(100)
    records.state[:] = 0
    assert len(scalars.Thin()(records)) == 100  # ten rows a second are shown all


def test_the_console_is_not_silenced() -> None:
    """After twenty lines one comes every ten seconds, which are three rows, also if the clock is set back."""
    out, records = io.StringIO(), fake.make_records(100, steps_per_second=0.3)
    records.wall_time[50:] -= HOUR
    records.state[:] = (np.arange(100) % 2)[:, None]
    fake.feed(ConsoleSink(out), records, fake.make_run(), batch=1)
    told = [int(line.split()[1]) for line in out.getvalue().splitlines() if line.startswith("step")]
    assert told[:20] == list(range(20))
    assert set(told) & {50, 51}
    assert told[-1] > 90


def test_no_rate_where_no_time_has_passed() -> None:
    records = fake.make_records(10)
    for seconds in (0.0, -HOUR):
        records.wall_time[:] = np.linspace(5.0, 5.0 + seconds, 10)
        fake.feed(ConsoleSink(out := Terminal()), records, fake.make_run(), batch=2)
        assert "/s" not in out.getvalue()
        assert "ended at step 9" in out.getvalue()


def test_tensorboard_reads_the_runs_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads files by name, which begins with the time, and follows the last."""
    records = fake.make_records(60)
    fake.feed(TensorBoardSink(), records[:40], fake.make_run(tmp_path))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - HOUR)
    fake.feed(TensorBoardSink(), records[30:], fake.make_run(tmp_path, resume=True))
    monkeypatch.undo()
    curves = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    assert [point.step for point in curves.Scalars("signals/loss")] == list(range(60))
