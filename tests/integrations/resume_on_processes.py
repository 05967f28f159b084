"""Run by test_resume_processes.py as each of two processes that train one model, which is saved with Orbax.

python resume_on_processes.py RUNS PROCESS COUNT PORT FOLDER

RUNS are one or several of `unbroken`, `rolled back`, `killed` (as the last) and `resumed`, with commas. Each
is taken with the audit inside the step and beside it; histories are FOLDER/inside/RUN and FOLDER/beside/RUN,
and what is resumed goes on in those of the killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from conformance import PLAIN, differentiated
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from resuming import FLUSH_EVERY, KILLED, SAVED, STEPS, TEXTS, audited, batch

from moe_rules_callback import delivery

KINDS = ("inside", "beside")
RULES = {name: TEXTS[name] for name in ("idle", "jumpy", "held")}  # a window of each kind, soon compiled
BACK = SAVED + FLUSH_EVERY  # where the run is rolled back: right after rows were flushed


class Training:
    """Data-parallel over all devices of all processes: tokens are sharded, the rest is replicated."""

    def __init__(self, kind: str, logdir: Path, resume: bool = False) -> None:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        whole, self._tokens = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self.audit = audit = audited(logdir, RULES, resume=resume)
        self._inside = kind == "inside"
        compute = differentiated(PLAIN.forward)

        @partial(jax.jit, donate_argnums=(0, 1), out_shardings=(whole, whole, None))
        def step(params, state, x, target):
            metrics, grads = compute(params, x, target)
            params = jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)
            return (params, audit.update(state, metrics), None) if self._inside else (params, None, metrics)

        self._step = step
        params = PLAIN.start()
        metrics, _ = jax.eval_shape(compute, params, *batch(0))
        state = audit.init(metrics) if self._inside else None
        self._params, self._state = jax.jit(lambda carry: carry, out_shardings=whole)((params, state))

    def go(self, steps: Iterable[int], seed: int = 0) -> None:
        for i in steps:
            x, target = map(self._placed, batch(i, seed))
            self._params, self._state, metrics = self._step(self._params, self._state, x, target)
            if self._inside:
                self.audit.drain(self._state)
            else:
                self.audit.on_step(metrics)
            if i % FLUSH_EVERY == 0:
                self.audit.flush()  # steps as fast as these outrun the sinks
            jax.block_until_ready(self._params)  # processes that run ahead of each other can hang jax

    def save(self, manager: ocp.CheckpointManager) -> None:
        """Which Orbax goes on with while training does, and donates."""
        saved = {name: ocp.args.StandardSave(tree) for name, tree in self._trees().items()}
        manager.save(SAVED, args=ocp.args.Composite(**saved))

    def restore(self, manager: ocp.CheckpointManager) -> None:
        abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, self._trees())
        wanted = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
        saved = manager.restore(SAVED, args=ocp.args.Composite(**wanted))
        self._params = saved["params"]
        if self._inside:
            self._state = saved["audit"]
        else:
            self.audit.restore(saved["audit"])

    def _trees(self) -> dict[str, Any]:
        return {"params": self._params, "audit": self._state if self._inside else self.audit.state}

    def _placed(self, x: jax.Array) -> jax.Array:
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, self._tokens, lambda index: host[index])


def unbroken(kind: str, folder: Path) -> None:
    training = Training(kind, folder / "unbroken")
    training.go(range(STEPS))
    training.audit.close()


def rolled_back(kind: str, folder: Path) -> None:
    """Over the rows since the last flush, on with the same batches; then over more, on with others and, back
    again, with the same."""
    training = Training(kind, folder / "rolled back")
    with ocp.CheckpointManager(folder / "checkpoints") as manager, training.audit as audit:
        training.go(range(SAVED))
        training.save(manager)
        training.go(range(SAVED, BACK))
        training.restore(manager)
        training.go(range(SAVED, STEPS))
        audit.flush()
        if jax.process_index() == 0:
            shutil.copytree(folder / "rolled back", folder / "rolled back once")
        training.restore(manager)
        training.go(range(SAVED, STEPS - 6), seed=1)
        audit.flush()
        training.restore(manager)
        training.go(range(SAVED, STEPS))


def killed(kind: str, folder: Path) -> None:
    """As far as it comes: the kill is that of the process."""
    training = Training(kind, folder / "killed")
    with ocp.CheckpointManager(folder / "of the killed") as manager:
        training.go(range(SAVED))
        training.save(manager)
        training.go(range(SAVED, KILLED))


def resumed(kind: str, folder: Path) -> None:
    training = Training(kind, folder / "killed", resume=True)
    with ocp.CheckpointManager(folder / "of the killed") as manager, training.audit:
        training.restore(manager)
        training.go(range(SAVED, STEPS))


RUNS = {"unbroken": unbroken, "rolled back": rolled_back, "killed": killed, "resumed": resumed}


def main(names: str, process: str, count: str, port: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
    assert jax.process_count() == jax.device_count() == int(count)
    delivery.LONGEST = 1e6  # what is replaced must not depend on how busy the machine is
    for name in names.split(","):
        for kind in KINDS:
            RUNS[name](kind, Path(folder) / kind)
    if names.endswith("killed"):
        if jax.process_index() == 0:
            os.killpg(0, signal.SIGKILL)  # all at once: none sees another die
        signal.pause()


if __name__ == "__main__":
    main(*sys.argv[1:])
