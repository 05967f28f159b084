"""A file system that fails, at any single operation or for a while: every row arrives."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import fake_records as fake
import pytest
import xarray as xr
from fsspec.implementations.memory import MemoryFileSystem
from upath import UPath

from moe_rules_callback import outbox
from moe_rules_callback.events import Events
from moe_rules_callback.history import open_history, records_to_dataset
from moe_rules_callback.paths import as_path
from moe_rules_callback.plugins import get_plugin_manager
from moe_rules_callback.records import Records, Run
from moe_rules_callback.sinks import TensorBoardSink, ZarrSink

READS, WRITES = ("cat_file", "info", "ls"), ("pipe_file", "mkdir", "makedirs")
FIRST, AGAIN = fake.make_records(60), fake.make_records(60, seed=1)
SOON = 60.0  # seconds that only a failing test waits


class LibraryError(Exception):
    """Remote file systems raise what they like."""


HOWS = ("before", "after", "half")
ERRORS = (OSError, TimeoutError, LibraryError)


class Faults:
    """The file system in memory, whose n-th operation fails once.

    Attributes:
        operations: names of those since `arm`.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.operations: list[str] = []
        self._at, self._how = -1, ""
        self.before: Callable[[str], None] = lambda name: None
        for name in (*READS, *WRITES):
            patch.setattr(MemoryFileSystem, name, self._wrapped(name, getattr(MemoryFileSystem, name)))

    def arm(self, at: int = -1, how: str = "before") -> None:
        """Fail at operation `at`: before it is done, after it, or when half of a chunk is written."""
        self.operations, self._at, self._how = [], at, how

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(system: Any, path: str, *arguments: Any, **options: Any) -> Any:
            number = len(self.operations)
            self.operations.append(name)
            self.before(name)
            error = ERRORS[number % len(ERRORS)]("it is gone") if number == self._at else None
            if error and self._how == "before":
                raise error
            chunk = name == "pipe_file" and "/c/" in path and "/step/" not in path
            if error and chunk and self._how == "half":
                real(system, path, arguments[0][: len(arguments[0]) // 2], **options)
                raise error
            done = real(system, path, *arguments, **options)
            if error:
                raise error
            return done

        return operation


@pytest.fixture
def url() -> Iterator[str]:
    root = f"memory://{uuid.uuid4().hex}"
    yield f"{root}/run"
    if as_path(root).exists():
        UPath(root).rmdir(recursive=True)


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> Faults:
    monkeypatch.setattr(outbox, "FIRST_DELAY", 0.001)
    return Faults(monkeypatch)


def told(sink: Any, logdir: str, *batches: Records | int, resume: bool) -> list[Any]:
    """What the callback does: rows, or the step to which it goes back."""
    events = Events(get_plugin_manager([sink]))
    run = Run(fake.make_schema(), as_path(logdir), flush_every=16, resume=resume)
    events.start(run)
    for batch in batches:
        if isinstance(batch, int):
            events.tell("on_rewind", step=batch)
        else:
            events.tell("on_records", records=batch)
    events.close(run, time.monotonic() + SOON)
    return list(events._off)


def new_history(logdir: str) -> None:
    assert not told(ZarrSink(), logdir, FIRST[:20], FIRST[20:30], resume=False)


def resumed_history(logdir: str) -> None:
    """From an older step, and it goes back in the middle."""
    batches = AGAIN[20:40], 35, FIRST[35:50], FIRST[50:]
    assert not told(ZarrSink(), logdir, *batches, resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_each_operation_fails_once(
    resume: bool, url: str, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """With one of three errors, in one of three ways, and the history is the same as without."""
    expected = [FIRST[:20], AGAIN[20:35], FIRST[35:]] if resume else [FIRST[:30]]
    run, at = resumed_history if resume else new_history, 0
    if resume:
        new_history(url)
    before = MemoryFileSystem.store.copy()
    while True:
        faults.arm(at, HOWS[at % len(HOWS)])
        run(url)
        if len(faults.operations) <= at:
            break
        failed = faults.operations[at]
        faults.arm()
        found = open_history(url).load()
        assert ("replaced" in found.attrs) == resume, (at, failed)
        found.attrs.pop("replaced", None)
        xr.testing.assert_identical(found, records_to_dataset(expected))
        for gone in MemoryFileSystem.store.keys() - before.keys():
            del MemoryFileSystem.store[gone]
        MemoryFileSystem.store.update(before)
        at += 1
    assert at > 20
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_file_system_that_is_away_while_a_run_begins(url: str, faults: Faults) -> None:
    """It is known again before the end, and the run goes on with the history that is there."""
    new_history(url)

    def fail(name: str) -> None:
        if len(faults.operations) < 8:
            raise LibraryError("it is gone")

    faults.arm()
    faults.before = fail
    resumed_history(url)
    faults.before = lambda name: None
    assert open_history(url).step.values.tolist() == list(range(60))


@pytest.mark.parametrize("sink", [ZarrSink, TensorBoardSink])
def test_a_file_system_that_hangs(
    sink: Any, url: str, faults: Faults, caplog: pytest.LogCaptureFixture
) -> None:
    """`close` comes back in time and says what is not written; if the file system moves on, it is."""
    go_on, stuck = threading.Event(), threading.Event()

    def hang(name: str) -> None:
        if name == "pipe_file":
            stuck.set()
            assert go_on.wait(SOON)

    events = Events(get_plugin_manager([sink()]))
    run = Run(fake.make_schema(), as_path(url), flush_every=16)
    events.start(run)
    events.tell("on_records", records=FIRST[:20])
    events.wait(time.monotonic() + SOON)
    faults.before = hang
    events.tell("on_records", records=FIRST[20:40])
    events.tell("on_records", records=FIRST[40:])
    assert stuck.wait(SOON)
    began = time.monotonic()
    events.close(run, time.monotonic() + 0.1)
    assert time.monotonic() - began < SOON / 2
    assert caplog.messages == [
        f"the run has ended and not everything is written: plugin '{sink.__name__}': 40 rows "
        "(steps 20 to 59) wait for it, which has not returned from on_records"
    ]
    go_on.set()
    (thread,) = (each._thread for each in events._boxes.values())
    thread.join(SOON)
    assert not thread.is_alive()
    if sink is ZarrSink:
        assert open_history(url).step.values.tolist() == list(range(60))
