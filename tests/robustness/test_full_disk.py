"""A disk that is full, read-only, or away for a while: training goes on, and all rows arrive afterwards."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from collector import make
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_rules_callback import RuleAuditCallback, events, outbox
from moe_rules_callback.history import open_history

SOON = 60.0  # seconds that only a failing test waits


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FIRST_DELAY", 0.02)
    monkeypatch.setattr(events, "FURTHER_ATTEMPTS", 0.1)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if made.returncode:
        pytest.skip("mounting a small tmpfs takes root, and a container that lets it")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


def fill(disk: Path) -> Path:
    """Take all space that is left."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    return ballast


def steps(audit: RuleAuditCallback, first: int, number: int) -> None:
    for step in range(first, first + number):
        audit.on_step({"x": float(step)})


def held(logdir: Path) -> list[float]:
    history = open_history(logdir).load()
    assert history.step.values.tolist() == history.signal_pooled.values[:, 0].tolist()
    return history.step.values.tolist()


def points(logdir: Path) -> list[int]:
    curves = EventAccumulator(str(logdir), size_guidance={"scalars": 0}).Reload()
    return [point.step for point in curves.Scalars("signals/x")]


def warnings(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [each.getMessage() for each in caplog.records if text in each.getMessage()]


def away_and_back(
    logdir: Path, away: Callable[[], Any], back: Callable[[], Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Of two sinks each tells once, and both have all rows in the end."""
    with make(logdir=logdir, flush_every=50) as audit:
        steps(audit, 0, 20)
        audit.flush()
        away()
        steps(audit, 20, 200)
        audit.flush()  # comes back after an attempt
        back()
        steps(audit, 220, 20)
    assert held(logdir) == points(logdir) == list(range(240))
    for sink in ("ZarrSink", "TensorBoardSink"):
        assert len(warnings(caplog, f"plugin '{sink}' raised in on_records and will be tried again")) == 1
        assert (
            len(warnings(caplog, f"not everything is written yet: plugin '{sink}': 200 rows (steps 20 to"))
            == 1
        )
    assert not warnings(caplog, "the run has ended")
    assert not [*logdir.rglob("*.partial")]


def test_a_full_disk(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    away_and_back(disk / "run", lambda: fill(disk), lambda: (disk / "ballast").unlink(), caplog)


def test_a_disk_that_becomes_read_only(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    away_and_back(disk / "run", lambda: remount(disk, "ro"), lambda: remount(disk, "rw"), caplog)


def test_a_directory_that_vanishes_and_comes_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logdir, elsewhere = tmp_path / "mounted" / "run", tmp_path / "elsewhere"
    logdir.mkdir(parents=True)
    away_and_back(logdir, lambda: logdir.rename(elsewhere), lambda: elsewhere.rename(logdir), caplog)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO, errno.ESTALE])
def test_writing_fails(
    error: int, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without a disk of one's own."""
    patch = pytest.MonkeyPatch()

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(error, os.strerror(error))

    def away() -> None:
        patch.setattr(Path, "write_bytes", fail)
        patch.setattr(os, "fsync", fail)

    away_and_back(tmp_path, away, patch.undo, caplog)


def test_a_disk_that_stays_full(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`close` comes back and says what is missing; what was written before can be read, and gone on with."""
    caplog.set_level(logging.WARNING)
    audit = make(logdir=disk / "run", flush_every=50)
    steps(audit, 0, 20)
    audit.flush()
    fill(disk)
    steps(audit, 20, 200)
    began = time.monotonic()
    audit.close()
    assert time.monotonic() - began < SOON / 2
    for sink in ("ZarrSink", "TensorBoardSink"):
        (told,) = warnings(caplog, f"the run has ended and not everything is written: plugin '{sink}': ")
        assert "200 rows (steps 20 to 219) wait for it, which tries again after: OSError: [Errno 28]" in told
    assert held(disk / "run") == list(range(20))
    (disk / "ballast").unlink()
    with make(logdir=disk / "run", flush_every=50, resume=True) as audit:
        steps(audit, 20, 30)
    assert held(disk / "run") == points(disk / "run") == list(range(50))


def test_a_directory_in_which_nothing_can_be_written(disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From the start to the end, or until it can."""
    remount(disk, "ro")
    with make(logdir=disk / "run", flush_every=50) as audit:
        steps(audit, 0, 40)
    for sink in ("ZarrSink", "TensorBoardSink"):
        assert len(warnings(caplog, f"plugin '{sink}' raised in on_train_start and will be tried again")) == 1
        assert len(warnings(caplog, f"plugin '{sink}': 40 rows (steps 0 to 39) wait for it")) == 1
    with make(logdir=disk / "run", flush_every=50) as audit:
        steps(audit, 0, 40)
        audit.flush()
        remount(disk, "rw")
    assert held(disk / "run") == points(disk / "run") == list(range(40))
