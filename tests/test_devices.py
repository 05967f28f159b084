"""Tokens sharded over 8 devices: the same records as on one, and no device ever sees all probabilities."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["auto", "explicit"])
def test_one_and_eight_devices(axes: str, tmp_path: Path) -> None:
    """Batch and time on different axes of the mesh; `jax.make_mesh` makes explicit ones by default."""
    out = tmp_path / "records.npz"
    done = subprocess.run(
        [sys.executable, str(HERE / "sharded_audit.py"), axes, str(out)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        },
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "tokens are gathered"
    results = np.load(out)
    for name in results.files:
        if name.endswith(" 8"):
            one, eight = results[f"{name[:-1]}1"], results[name]
            np.testing.assert_allclose(eight, one, rtol=1e-6, atol=1e-6, err_msg=name)
