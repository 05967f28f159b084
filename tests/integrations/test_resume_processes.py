"""Two processes train one model; they are killed and two others resume, or they are rolled back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from resume_on_processes import KINDS
from resuming import SAVED, STEPS, assert_same_bits, history, replaced

HERE = Path(__file__).parent
COUNT = 2


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def run(names: str, folder: Path, ended_by: int = 0) -> None:
    """In new processes, which are a group of their own."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0",
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1]))),
    }
    command = [sys.executable, str(HERE / "resume_on_processes.py"), names]
    rest = [str(COUNT), str(free_port()), str(folder)]
    processes: list[subprocess.Popen[str]] = []
    try:
        for i in range(COUNT):
            group = processes[0].pid if processes else 0
            processes.append(
                subprocess.Popen(
                    [*command, str(i), *rest],
                    env=environment,
                    text=True,
                    stderr=subprocess.PIPE,
                    process_group=group,
                )
            )
        errors = "\n".join(process.communicate(timeout=300)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [-ended_by] * COUNT, errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the histories of all runs."""
    folder = tmp_path_factory.mktemp("processes")
    run("unbroken,rolled back,killed", folder, signal.SIGKILL)
    run("resumed", folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_are_killed_and_resumed(kind: str, folder: Path) -> None:
    unbroken = history(folder / kind / "unbroken")
    assert unbroken.step.values.tolist() == list(range(STEPS))
    assert_same_bits(history(folder / kind / "killed"), unbroken)
    assert replaced(folder / kind / "killed") == []  # all that was taken again was the same


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_processes_that_are_rolled_back(kind: str, folder: Path) -> None:
    unbroken, once, thrice = (
        folder / kind / name for name in ("unbroken", "rolled back once", "rolled back")
    )
    assert_same_bits(history(once), history(unbroken))
    assert replaced(once) == []  # the same rows are not told again
    assert_same_bits(history(thrice), history(unbroken))
    told = [(each["from_step"], each["rows"]) for each in replaced(thrice)]
    assert told == [(SAVED, STEPS - SAVED), (SAVED, STEPS - 6 - SAVED)]
