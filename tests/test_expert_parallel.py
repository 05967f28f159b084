"""Routers that several devices run on the same tokens are counted once, on each way in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_routers_that_devices_share_count_once() -> None:
    """Inside the step: `replicated` of test_devices.py."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    done = subprocess.run(
        [sys.executable, str(HERE / "expert_parallel.py")],
        env=environment, text=True, capture_output=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = found.pop("one device")
    assert expected[0] == 12  # tokens
    assert len(found) == 6
    for way, values in found.items():
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6, err_msg=way)
