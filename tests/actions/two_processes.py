"""Run by test_agreement.py as each of two processes: at which steps the loop of each sees what is asked.

python two_processes.py PROCESS PORT LOGDIR      # prints JSON
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from collector import make
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_rules_callback import PluginError, RuleAuditCallback
from moe_rules_callback.actions import RequestCheckpoint, SnapshotRouting, StopTraining, agreement

EVERY, HOT_FROM, MANY = 4, 10, 2000


def audited() -> RuleAuditCallback:
    actions = [StopTraining("warning", after=3), RequestCheckpoint()]
    return make(actions=actions, dry_run=False, flush_every=EVERY)


def loop(process: int, tied: bool) -> dict[str, Any]:
    """Train until asked to stop; what is asked rests on `x`, of which process 1 sees nothing.

    With `tied` a step sums over both processes, so that one which goes on alone would wait for ever. Without,
    each goes at its own pace, and only what they agree on ties them.
    """
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    tokens, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    total = jax.jit(jnp.sum, out_shardings=everywhere)
    batch = jax.make_array_from_process_local_data(tokens, np.ones((4, 3), np.float32))
    rng, checkpoints = np.random.default_rng(process), []
    with audited() as audit:
        for step in range(MANY):
            if tied:
                jax.block_until_ready(total(batch))
            audit.on_step({"x": -1.0 if step >= HOT_FROM and process == 0 else 0.0})
            if audit.should_checkpoint:
                checkpoints.append(step)
            if audit.should_stop:
                return {"stop": step, "checkpoints": checkpoints}
            time.sleep(0.02 * rng.random())
    return {"stop": None, "checkpoints": checkpoints}


def alone(process: int) -> dict[str, Any]:
    """Process 0 takes steps that process 1 does not, and the other way round."""
    with audited() as audit:
        for _ in range(3 * EVERY if process == 0 else 0):
            audit.on_step({"x": -1.0})
    agreement.PATIENCE = 1.0
    error = None
    with audited() as audit:
        try:
            for _ in range(EVERY if process == 1 else 0):
                audit.on_step({"x": 0.0})
        except PluginError as raised:
            error = str(raised)
    return {"error": error}


def snapshot(logdir: str) -> None:
    """An alert in step 2, whose routing lies on both processes."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    tokens, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    probs = jax.make_array_from_callback((4, 3), tokens, lambda index: np.eye(4, 3)[index])
    action = SnapshotRouting(rows=1)
    with make(actions=[action], dry_run=False, flush_every=1, logdir=logdir, sinks=[]) as audit:
        state, update = audit.init({"x": 0.0}), jax.jit(audit.update)
        for step in range(3):
            state = update(state, {"x": jnp.float32(-1.0 if step == 2 else 0.0)})
            action.keep(
                {"router_probs": probs, "loss": jax.jit(jnp.sum, out_shardings=everywhere)(probs)}, step
            )
            audit.drain(state)


def sharded() -> float:
    """Probabilities whose tokens lie on both processes, given to `on_step`: the entropy that is recorded."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    probs = np.full((4, 4), 0.25, np.float32)
    probs[2:] = np.eye(4)[:2]  # those of process 1
    array = jax.make_array_from_callback((4, 4), NamedSharding(mesh, P("data")), lambda index: probs[index])
    with RuleAuditCallback({"sure": "low_router_entropy"}) as audit:
        for _ in range(3):
            audit.on_step({"router_probs": array})
        if jax.process_index():
            return 0.5
        return float(audit.history["signal_value"][-1, 0, 0])


if __name__ == "__main__":
    number = int(sys.argv[1])
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", 2, number)
    assert jnp.zeros(()).is_fully_addressable
    assert jax.process_count() == jax.device_count() == 2
    seen: dict[str, Any] = {"tied": loop(number, True), "apart": loop(number, False), "alone": alone(number)}
    seen["entropy"] = sharded()
    snapshot(sys.argv[3])
    print(json.dumps(seen))
