"""Run by test_expert_parallel.py with four devices: experts are dealt out, and each device routes for itself.

python expert_parallel.py      # prints signals of each way in as JSON: way -> [signals]

The devices along "expert" have the same tokens and the same router: what they say counts once.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_rules_callback import RuleAuditCallback

TOKENS, WIDTH, EXPERTS, K = 12, 4, 8, 2
SIGNALS = ("router_tokens", "router_entropy", "load_gini", "router_mutual_information", "expert_coactivation")
MESH = jax.make_mesh((2, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
SPECS = {"router": P(), "experts": P("expert")}
Params = dict[str, jax.Array]


def place(x: Any, spec: P) -> jax.Array:
    return jax.device_put(x, NamedSharding(MESH, spec))


def routed(params: Params, x: jax.Array, first: Any = 0) -> tuple[jax.Array, jax.Array]:
    """What experts from number `first` on, those in `params`, add for each token; and all probabilities."""
    probs = jax.nn.softmax(x @ params["router"])
    weights, index = jax.lax.top_k(probs, K)
    gates = (jax.nn.one_hot(index, EXPERTS) * weights[..., None]).sum(-2)
    mine = jax.lax.dynamic_slice_in_dim(gates, first, len(params["experts"]), 1)
    return jnp.einsum("te,edf,td->tf", mine, params["experts"], x), probs


def parallel(params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same on one device of many."""
    out, probs = routed(params, x, jax.lax.axis_index("expert") * len(params["experts"]))
    return jax.lax.psum(out, "expert"), probs


def model(check_vma: bool) -> Callable[..., tuple[jax.Array, jax.Array]]:
    specs = {"in_specs": (SPECS, P("data")), "out_specs": (P("data"), P("data"))}
    return jax.shard_map(parallel, mesh=MESH, check_vma=check_vma, **specs)


def loss_of(forward: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., jax.Array]:
    return lambda params, x: jnp.square(forward(params, x)[0] - x).mean()


def signals(step: Callable[[RuleAuditCallback], dict[str, Any]]) -> list[float]:
    """Of one row, that a step makes."""
    with RuleAuditCallback({"r": "low_router_entropy"}, signals=SIGNALS, top_k=K) as audit:
        audit.on_step(step(audit))
        return audit.history.signal_value.sel(signal=list(SIGNALS))[0, :, 0].values.tolist()


def watched_loss(forward: Any, params: Params, x: jax.Array) -> list[float]:
    def step(audit: RuleAuditCallback) -> dict[str, Any]:
        loss, _ = jax.jit(jax.value_and_grad(audit.watch(loss_of(forward))))(params, x)
        return {"loss": loss}

    return signals(step)


def watched_step(check_vma: bool, params: Params, x: jax.Array) -> list[float]:
    """The whole step is a shard_map of the trainer's own."""

    def trained(params: Params, x: jax.Array) -> tuple[Params, jax.Array]:
        loss, grads = jax.value_and_grad(loss_of(parallel))(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), jax.lax.pmean(loss, "data")

    # Its gradients are no part of the test: those of the router differ from device to device.
    specs = {
        "in_specs": (SPECS, P("data")),
        "out_specs": (SPECS if check_vma else P(("data", "expert")), P()),
    }
    step = jax.jit(jax.shard_map(trained, mesh=MESH, check_vma=check_vma, **specs))
    return signals(lambda audit: {"loss": audit.watch(step)(params, x)[1]})


def main() -> None:
    rng = np.random.default_rng(0)
    params: Any = {
        "router": rng.normal(size=(WIDTH, EXPERTS)).astype(np.float32),
        "experts": rng.normal(size=(EXPERTS, WIDTH, WIDTH)).astype(np.float32),
    }
    x: Any = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    found = {"one device": signals(lambda audit: {"router_probs": jax.jit(routed)(params, x)[1]})}
    found["one device, watched"] = watched_loss(routed, params, x)
    params, x = {name: place(params[name], SPECS[name]) for name in params}, place(x, P("data"))
    found["beside"] = signals(lambda audit: {"router_probs": jax.jit(model(True))(params, x)[1]})
    for check_vma in (True, False):
        found[f"watched loss, {check_vma}"] = watched_loss(model(check_vma), params, x)
        found[f"watched step, {check_vma}"] = watched_step(check_vma, params, x)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
