"""The callback at the end of an interpreter, on other threads, and over eight devices."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_rules_callback import (
    open_history,
)


def run(program: str, *arguments: Any, code: int = 0, **environment: str) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    path = f"{Path(__file__).parents[1]}:{Path(__file__).parent}"
    environment = {"PATH": "", "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


NEVER_CLOSED = """
import sys, threading
from collector import RULES
from moe_rules_callback import RuleAuditCallback

def train(directory):
    audit = RuleAuditCallback(RULES, logdir=directory, flush_every=4)
    for x in range(10):
        audit.on_step({"x": x})
    return audit

audit = train(sys.argv[1])
raise RuntimeError("training broke")
"""

ON_A_THREAD = """
import threading
from collector import RULES, Collector, make
from moe_rules_callback import RuleAuditCallback

class Prints(Collector):
    from moe_rules_callback import hookimpl

    @hookimpl
    def on_train_end(self):
        print(self.steps)

def train():
    audit = RuleAuditCallback(RULES, plugins=[Prints()])
    for x in range(1000):
        audit.on_step({"x": x})

threading.Thread(target=train).start()
"""

EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moe_rules_callback import RuleAuditCallback, delivery

rules = {"sure": "high_routing_confidence"}
probs = np.random.default_rng(0).dirichlet(np.ones(4), (5, 2, 16)).astype(np.float32)

def history(place, scalar):
    with RuleAuditCallback(rules, flush_every=2, top_k=1) as audit:
        for i in range(5):
            audit.on_step({"loss": scalar(1.0 / (1 + i)), "router_probs": place(probs[i])})
            assert len(audit._outgoing.latest.row.devices()) == len(place(probs[i]).devices())
        return audit.history.drop_vars("wall_time")

def on_one_device(rows, row, copy=delivery._copy):  # where the others belong to other processes
    assert len(row.devices()) == len(rows.devices()) == 1
    return copy(rows, row)

delivery._copy = on_one_device
expected = history(jnp.asarray, float)
third = jax.devices()[3]
ways = {"another device": (lambda x: jax.device_put(x, third), lambda x: jax.device_put(x, third))}
auto, explicit = (AxisType.Auto,) * 2, (AxisType.Explicit,) * 2
for kind, spec in (auto, P()), (auto, P("data", None, "model")), (explicit, P("data", "model")):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=kind)
    ways[f"{kind} {spec}"] = (
        lambda x, s=NamedSharding(mesh, spec): jax.device_put(x, s),
        lambda x, s=NamedSharding(mesh, P()): jax.device_put(jnp.float32(x), s),
    )
for way, (place, scalar) in ways.items():
    found = history(place, scalar)
    for name in expected.data_vars:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6, err_msg=f"{way} {name}")
"""


@pytest.mark.slow
def test_a_callback_that_nobody_closes_writes_everything_at_exit(tmp_path):
    output = run(NEVER_CLOSED, tmp_path, code=1)
    assert output.count("Traceback") == 1
    assert "training broke" in output
    assert open_history(tmp_path).step.values.tolist() == list(range(10))
    assert [path.name for path in tmp_path.glob("audit*")] == ["audit.zarr"]


@pytest.mark.slow
def test_training_may_go_on_in_a_thread_when_the_main_one_has_ended():
    assert run(ON_A_THREAD) == f"{list(range(1000))}\n"


@pytest.mark.slow
def test_metrics_may_be_sharded_over_eight_devices():
    assert run(EIGHT_DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=8") == ""
