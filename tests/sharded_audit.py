"""Run by test_devices.py with 8 devices: records of an audit whose tokens are sharded over them.

python sharded_audit.py auto|explicit OUT.npz      # records on 1 and on 8 devices; prints all-gathers
"""

from __future__ import annotations

import re
import sys

import jax
import numpy as np
from audited import unpack
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_rules_callback import Audit

RULES = {
    "specialised": "0.85 :: high_routing_confidence & low_activation_entropy",
    "uneven": "always[2](high_load_cv) | decreasing_loss",
}
B, T, E = 16, 64, 8


def steps(indexed: bool) -> list[dict]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(4):
        logits = 2 * rng.normal(size=(B, T, E)).astype(np.float32)
        metrics = {
            "loss": np.float32(rng.random()),
            "router_logits": logits,
            "token_mask": rng.random((B, T)) < 0.9,
        }
        if indexed:
            metrics["expert_index"] = np.argsort(-logits, axis=-1)[..., :2].astype(np.int32)
        weights = rng.normal(size=(E, 16, 32)).astype(np.float32)
        tree = {"router": weights[0], "experts": {"up": weights, "down": weights.swapaxes(1, 2)}}
        found.append(metrics | {"params": tree, "grads": tree})
    return found


def main(kind: str, out: str) -> None:
    assert jax.device_count() == 8
    types = {"explicit": {}, "auto": {"axis_types": (AxisType.Auto,) * 2}}[kind]
    mesh = jax.make_mesh((4, 2), ("data", "seq"), **types)

    def place(x: np.ndarray) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, P(*("data", "seq")[: min(x.ndim, 2)])))

    results = {}
    for indexed in (True, False):
        audit = Audit(RULES, top_k=2, signals="all")
        for devices in (1, 8):
            given = steps(indexed)
            if devices == 8:
                given = [jax.tree.map(place, m) for m in given]
            state = audit.init(given[0])
            if devices == 8:
                state = jax.device_put(state, NamedSharding(mesh, P()))
            update = jax.jit(audit.update)
            if devices == 8:
                with jax.set_mesh(mesh):
                    text = update.lower(state, given[0]).compile().as_text() or ""
                    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text):
                        print("all-gather", shape)
                    for metrics in given:
                        state = update(state, metrics)
            else:
                for metrics in given:
                    state = update(state, metrics)
            rows = unpack(audit, state)
            for name in ("truth_layer", "signal_value", "signal_pooled", "expert_share", "state", "step"):
                results[f"{name} {indexed} {devices}"] = getattr(rows, name)
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
