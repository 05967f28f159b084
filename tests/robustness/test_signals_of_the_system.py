"""Ctrl-C and SIGTERM, sent to processes that train: all rows are written, and the exit status tells."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from signalled_run import STEPS

from moe_rules_callback import at_exit
from moe_rules_callback.history import open_history

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture(scope="module")
def runs() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("signalled_run.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as runs:
        yield runs
        runs.kill()


def signalled(runs: subprocess.Popen[str], case: str, logdir: Path, *signals: int) -> tuple[int, float]:
    """The exit status of a run that gets signals, and how many seconds after the first."""
    assert runs.stdin
    assert runs.stdout
    runs.stdin.write(f"{case} {logdir}\n")
    runs.stdin.flush()
    said: list[str] = []
    sent = 0.0
    while not (line := runs.stdout.readline()).startswith("ended"):
        assert line, said
        said.append(line.strip())
        if line == "now\n" and not sent:
            sent = time.monotonic()
            (pid,) = (int(each.split()[1]) for each in said if each.startswith("pid"))
            for number in signals:
                os.kill(pid, number)
                time.sleep(0.1 if len(signals) > 1 else 0)
    assert open_history(logdir).step.values.tolist() == list(
        range(sum(each.startswith("took") for each in said))
    )
    return int(line.split()[1]), time.monotonic() - sent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "signals", "status"),
    [
        ("plain", [TERM], 143),
        ("plain", [INT], -INT),
        ("with_block", [TERM], 143),
        ("with_block", [INT], -INT),
        ("compiling", [TERM], 143),
        ("flushing", [TERM], 143),
        ("flushing", [INT], -INT),
        ("closing", [TERM], 143),
        ("closing", [INT], -INT),
        ("flushing", [TERM, TERM], 143),
        ("hung", [TERM], 143),
        ("own_handler", [TERM], 7),
        ("distributed", [TERM], 0),
    ],
)
def test_all_rows_are_there(
    case: str, signals: list[int], status: int, runs: subprocess.Popen[str], tmp_path: Path
) -> None:
    found, seconds = signalled(runs, case, tmp_path, *signals)
    # or 1: Python forgets the signal when something is `exec`ed while it ends, as dataclasses are
    assert found in ((status, 1) if (case, status) == ("plain", -INT) else (status,))
    assert open_history(tmp_path).sizes["step"] == STEPS
    if case == "hung":
        assert seconds < at_exit.GRACE  # it was made shorter there


@pytest.fixture
def unhandled() -> Iterator[None]:
    before = signal.signal(TERM, signal.SIG_DFL)
    yield
    signal.signal(TERM, before)


@pytest.mark.usefixtures("unhandled")
def test_a_handler_below_python_is_left_alone() -> None:
    assert not at_exit._caught(TERM)
    faulthandler.register(TERM)
    try:
        assert at_exit._caught(TERM)
        at_exit.end_on_sigterm()
        assert signal.getsignal(TERM) is signal.SIG_DFL
    finally:
        faulthandler.unregister(TERM)


def _nothing() -> None:
    time.sleep(60)


@pytest.mark.filterwarnings("ignore:os.fork", "ignore:This process")
@pytest.mark.usefixtures("unhandled")
def test_a_fork_neither_closes_nor_survives() -> None:
    """A worker of a data loader ends at once, with nothing of ours, and dies of SIGTERM."""

    class Closed:
        closed = 0

        def close(self) -> None:
            self.closed += 1
            os._exit(9)

    thing = Closed()
    at_exit.close_at_exit(thing)
    assert signal.getsignal(TERM) is at_exit._end
    fork = multiprocessing.get_context("fork")
    ends, waits = fork.Process(target=int), fork.Process(target=_nothing)
    ends.start()
    waits.start()
    ends.join(60)
    waits.terminate()
    waits.join(60)
    assert (ends.exitcode, waits.exitcode) == (0, -TERM)
