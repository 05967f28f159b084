"""Metrics laid out over 8 devices: the same records as on one, and what is sent around is small.

The compiled program says what devices send each other. Statistics are summed over devices; what there is for
every token stays where it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sharded_audit import AXES, LAYOUTS, B, E, K, L, T

HERE = Path(__file__).parent
FLOAT = 4
STATISTICS = FLOAT * (E * E + 3 * E + 10)  # bytes that a layer's tokens come to: pairs, three loads, scalars
WEIGHTS = FLOAT * 16 * 32  # bytes of an expert's kernel, which expert_weight_cosine sums over experts


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[str, Any]]:
    """(records, collectives) of all runs."""
    out = tmp_path_factory.mktemp("sharded") / "records.npz"
    done = subprocess.run(
        [sys.executable, str(HERE / "sharded_audit.py"), str(out)],
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
        },
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(out) as records:
        return dict(records), json.loads(done.stdout.splitlines()[-1])


RUNS = [
    f"{name}/{indexed}/{axes}"
    for name, layout in LAYOUTS.items()
    for indexed in layout.indexed
    for axes in AXES
]


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_one_and_eight_devices(run: str, laid_out: Any) -> None:
    records, programs = laid_out
    assert not isinstance(programs[run], str), programs[run]
    found = [name.removesuffix("8") for name in records if name.startswith(run) and name.endswith("8")]
    assert len(found) == 6
    for name in found:
        one, eight = records[f"{name}1"], records[f"{name}8"]
        np.testing.assert_allclose(eight, one, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_what_devices_send_is_small(run: str, laid_out: Any) -> None:
    layout, program = LAYOUTS[run.split("/")[0]], laid_out[1][run]
    layers = 1 if layout.layers is None else L
    parts = [layout.mesh[axis] for axis in layout.tokens if axis]
    per_token = FLOAT * B * T // int(np.prod(parts))  # bytes of a float for each token of a device
    assert per_token > STATISTICS, "token-sized arrays are told from small ones"

    summed = [size for kind, sizes in program if kind == "all-reduce" for size in sizes]
    moved = [size for kind, sizes in program if kind != "all-reduce" for size in sizes]
    assert summed
    if layout.layers is None and layout.experts is None:
        assert not moved, "each device has what it needs"
    assert sum(moved) <= 2 * layers * STATISTICS
    if layout.experts is not None:  # a token's sum and largest score over devices, for each of k choices
        assert max(summed) <= per_token
        assert sum(summed) <= (12 + 2 * K) * per_token + 2 * STATISTICS
    elif layout.trees:
        assert sum(summed) <= 2 * (STATISTICS + WEIGHTS)
    else:
        assert sum(summed) <= 2 * layers * STATISTICS
