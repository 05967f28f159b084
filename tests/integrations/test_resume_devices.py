"""A training over eight devices that is killed and resumed in another process, on as many or on one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from resuming import KILLED, SAVED, STEPS, assert_same_bits, history

HERE = Path(__file__).parent


def run(devices: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(HERE / "resume_on_devices.py"), *map(str, arguments)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"
            " --xla_backend_optimization_level=0",
            "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent, HERE.parents[1]))),
        },
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )


def laid_out(done: subprocess.CompletedProcess[str], ended_by: int = 0) -> list[int]:
    assert done.returncode == -ended_by, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_eight_devices_then_eight_and_one(tmp_path: Path) -> None:
    checkpoints, killed = tmp_path / "checkpoints", tmp_path / "killed"
    assert laid_out(run(8, tmp_path / "others", tmp_path / "unbroken", 0, STEPS)) == [8, 8]
    assert laid_out(run(8, checkpoints, killed, 0, KILLED, "kill"), signal.SIGKILL) == [8, 8]
    on_one = shutil.copytree(killed, tmp_path / "on one")
    assert laid_out(run(8, checkpoints, killed, SAVED, STEPS)) == [8, 8]
    assert laid_out(run(1, checkpoints, on_one, SAVED, STEPS)) == [1, 1]

    unbroken = history(tmp_path / "unbroken")
    assert unbroken.step.values.tolist() == list(range(STEPS))
    assert_same_bits(history(killed), unbroken)
    found = history(on_one)  # sums over tokens come in another order, which training then amplifies
    assert_same_bits(found.sel(step=slice(0, SAVED - 1)), unbroken.sel(step=slice(0, SAVED - 1)))
    assert found.step.values.tolist() == list(range(STEPS))
    for name in ("loss", "truth_layer"):
        np.testing.assert_allclose(found[name], unbroken[name], rtol=1e-3, atol=1e-3, err_msg=name)
