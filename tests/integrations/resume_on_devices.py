"""Run by test_resume_devices.py, process after process: a training on a mesh that is killed and resumed.

python resume_on_devices.py FOLDER LOGDIR FIRST LAST [kill]

Starts at step FIRST, from the checkpoint of that step unless it is 0. Saves before the step SAVED; ends
after step LAST - 1, with `kill` by SIGKILL. Prints over how many devices the parameters and the audit lay.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp
from conformance import PLAIN, differentiated, example_metrics
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from moe_rules_callback.integrations.optax import audit_transform
from resuming import FLUSH_EVERY, SAVED, audited, batch


def main(folder: Path, logdir: Path, first: int, last: int, kill: bool) -> None:
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))

    def placed(array: Any) -> NamedSharding:
        """Experts' inputs and tokens over all devices, where there are as many; the rest on each of them."""
        spread = array.ndim == 3 and array.shape[1] % jax.device_count() == 0 and array.dtype == "float32"
        return NamedSharding(mesh, P(None, "data") if spread and array.shape[0] == 4 else P())

    audit = audited(logdir, resume=first > 0)
    tx = optax.chain(audit_transform(audit, example_metrics(PLAIN)), optax.adam(1e-2))
    params = PLAIN.start()
    carry = {"params": params, "opt_state": tx.init(params)}
    shardings = jax.tree.map(placed, carry)
    carry = jax.device_put(carry, shardings)
    compute = differentiated(PLAIN.forward)

    @partial(jax.jit, donate_argnums=0, out_shardings=shardings)
    def step(carry, x, target):
        metrics, grads = compute(carry["params"], x, target)
        updates, opt_state = tx.update(grads, carry["opt_state"], carry["params"], metrics=metrics)
        return {"params": optax.apply_updates(carry["params"], updates), "opt_state": opt_state}

    with ocp.CheckpointManager(folder) as manager:
        if first:
            abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, carry)
            carry = manager.restore(first, args=ocp.args.StandardRestore(abstract))
        for i in range(first, last):
            if i == SAVED and not first:
                manager.save(SAVED, args=ocp.args.StandardSave(carry))
            x, target = jax.device_put(batch(i), NamedSharding(mesh, P("data")))
            carry = step(carry, x, target)
            audit.drain(carry)
            if i % FLUSH_EVERY == 0:
                audit.flush()
    lie = [len(carry["params"][0]["experts"].addressable_shards), len(carry["opt_state"][0].rows.devices())]
    print(json.dumps(lie), flush=True)
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)
    audit.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), "kill" in sys.argv)
