"""Two processes see what is asked at the same step, and neither waits for what cannot come."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
TESTS = HERE.parent


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
    }
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_processes.py"), str(number), port, str(tmp_path)],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for number in (0, 1)
    ]  # fmt: skip
    try:
        told = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], told[0][1] + told[1][1]
    zero, one = (json.loads(out.splitlines()[-1]) for out, _ in told)
    for case in ("tied", "apart"):
        assert zero[case] == one[case], case
        step = zero[case]["stop"]
        assert step >= 12, case  # the third row that fires
        assert step % 4 == 3, case  # a call at which they agree
        (checkpoint,) = zero[case]["checkpoints"]
        assert 10 <= checkpoint <= step, case
    assert zero["alone"]["error"] is None
    assert one["alone"]["error"] == (
        "process 1 has taken 4 steps, and within 1 s process 0 has not. Usual causes: on_step or drain is "
        "not called on process 0, not as often as here, or process 0 has ended. Call it on every process "
        "after every step."
    )
    assert zero["entropy"] == pytest.approx(0.5)
    with np.load(tmp_path / "snapshots" / "step-2.npz") as file:  # what process 0 has of it
        probs = {name: file[name].tolist() for name in file.files if name.startswith("2/")}
    assert probs == {"2/router_probs[0:2, 0:3]": [[1, 0, 0], [0, 1, 0]], "2/loss": 3}
