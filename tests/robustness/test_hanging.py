"""Sinks that hang for a whole run, and many runs at once: memory stays bounded, histories are whole."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_records as fake
import numpy as np
import pytest
from collector import make

from moe_rules_callback import at_exit, callback, hookimpl, outbox
from moe_rules_callback.history import open_history

SOON = 60.0  # seconds that only a failing test waits


class Hangs:
    def __init__(self) -> None:
        self.called, self.go_on = threading.Event(), threading.Event()

    @hookimpl
    def on_records(self, records: Any) -> None:
        self.called.set()
        assert self.go_on.wait(SOON)


def test_what_waits_for_a_sink_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """30,000 rows, 5 MB of them, wait for a plugin that takes none; each arrives in an array of its own."""
    monkeypatch.setattr(outbox, "KEPT_BYTES", 2**18)
    hangs, rows = Hangs(), fake.make_records(64)
    box = outbox.Outbox("Hangs", {"on_records": hangs.on_records}, set())
    box.put("on_records", records=rows[:2])
    assert hangs.called.wait(SOON)
    tracemalloc.start()
    try:
        for batch in range(15_000):
            first = 2 * (batch % 30)
            box.put("on_records", records=rows[np.arange(first, first + 2)])
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert box._bytes <= 2**18
    assert kept < peak < 8 * 2**18  # with what Python needs for each small array
    box.end()
    hangs.go_on.set()


def test_a_run_beside_a_sink_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows are in the history, although one sink never returns, and the run ends in time."""
    monkeypatch.setattr(callback, "PATIENCE", 6.0)
    hangs = Hangs()
    with make(hangs, logdir=tmp_path, flush_every=50) as audit:
        for step in range(500):
            audit.on_step({"x": float(step)})
        began = time.monotonic()
    assert time.monotonic() - began < SOON
    assert open_history(tmp_path).step.values.tolist() == list(range(500))
    hangs.go_on.set()


def at_once(number: int, train: Callable[[int], None]) -> None:
    """Calls it on so many threads, none of which may fail."""
    errors: list[BaseException] = []

    def guarded(i: int) -> None:
        try:
            train(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert not errors


def test_eight_runs_on_eight_threads(tmp_path: Path) -> None:
    """Each with a callback and a folder of its own, in one process."""

    def train(number: int) -> None:
        with make(logdir=tmp_path / str(number), flush_every=20) as audit:
            for step in range(100):
                audit.on_step({"x": float(1000 * number + step)})

    at_once(8, train)
    for number in range(8):
        history = open_history(tmp_path / str(number)).load()
        assert history.signal_pooled.values[:, 0].tolist() == [1000 * number + step for step in range(100)]


def test_one_callback_on_four_threads() -> None:
    """Rows come in the order of the calls, whoever makes them."""

    def train(number: int) -> None:
        for step in range(200):
            audit.on_step({"x": float(1000 * number + step)})

    with make(flush_every=50) as audit:
        audit.on_step({"x": -1.0})
        at_once(4, train)
    x = audit.history.signal_pooled.values[1:, 0]
    for number in range(4):
        assert x[x // 1000 == number].tolist() == [1000 * number + step for step in range(200)]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_closing_goes_on_when_it_is_interrupted(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C or SIGTERM while the last rows are waited for."""
    real, interrupted = outbox.Outbox.wait, []

    def wait(self: outbox.Outbox, *arguments: Any, **options: Any) -> bool:
        if not interrupted:
            interrupted.append(self.plugin)
            raise error
        return real(self, *arguments, **options)

    monkeypatch.setattr(at_exit, "HURRY", SOON)
    audit = make(logdir=tmp_path)
    for step in range(10):
        audit.on_step({"x": float(step)})
    monkeypatch.setattr(outbox.Outbox, "wait", wait)
    with pytest.raises(type(error)):
        audit.close()
    assert interrupted
    assert open_history(tmp_path).step.values.tolist() == list(range(10))
