"""Run by test_shard_map.py in a process of its own: watched functions on a mesh of four devices."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from routed import parameters, soft_top_k, tokens

from moe_rules_callback import RuleAuditCallback

P = jax.P
MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
STACKED, X = parameters(layers=2), tokens()
SIGNALS = ("load_gini", "router_mutual_information", "expert_coactivation")


def scanned(params, x):
    return jax.lax.scan(jax.checkpoint(lambda x, p: (x + soft_top_k(p, x), None)), x, params)[0]


def loss_of(model):
    return lambda params, x: jnp.square(model(params, x)).mean()


def auditor() -> RuleAuditCallback:
    return RuleAuditCallback({"r": "low_load_cv_normalised"}, signals=SIGNALS)


def values_of(loss, params, x):
    """Signals of one step, whose results must be what they are without."""
    with auditor() as audit:
        watched = jax.jit(jax.value_and_grad(audit.watch(loss)))(params, x)
        jax.tree.map(np.testing.assert_array_equal, watched, jax.jit(jax.value_and_grad(loss))(params, x))
        audit.on_step({"loss": watched[0]})
        return audit.history.signal_value.values


expected = values_of(loss_of(scanned), STACKED, X)
assert expected.shape[-1] == 2

# The model is a shard_map: blocks of tokens are averaged.
specs = {"in_specs": (P(), P("data")), "out_specs": P("data")}
for check_vma in (True, False):
    split = jax.shard_map(scanned, mesh=MESH, check_vma=check_vma, **specs)
    np.testing.assert_allclose(values_of(loss_of(split), STACKED, X), expected, atol=1e-6)

# The compiler splits the work.
placed = jax.device_put(X, jax.sharding.NamedSharding(MESH, P("data")))
whole = jax.device_put(STACKED, jax.sharding.NamedSharding(MESH, P()))
np.testing.assert_allclose(values_of(loss_of(scanned), whole, placed), expected, atol=1e-6)

# The training step is a shard_map: each device is a forward.
with auditor() as audit:
    watched = audit.watch(loss_of(scanned), forwards_per_step=4)

    def step(params, x):
        loss, grads = jax.value_and_grad(watched)(params, x)
        return jax.lax.pmean((loss, grads), ("data", "model"))

    step = jax.jit(jax.shard_map(step, mesh=MESH, in_specs=(P(), P("data")), out_specs=P(), check_vma=False))
    loss, _ = step(STACKED, X)
    audit.on_step({"loss": loss})
    np.testing.assert_allclose(audit.history.signal_value.values, expected, atol=1e-6)


def slow(params, x):
    busy = jax.lax.fori_loop(0, 5000, lambda _, y: jnp.tanh(y @ y), jnp.full((128, 128), x.ravel()[0]))
    return loss_of(scanned)(params, x + 0 * busy[0, 0])


# The devices are behind when the history is asked for.
with auditor() as audit:
    gradients = jax.jit(jax.grad(audit.watch(slow)))(whole, placed)
    assert not all(leaf.is_ready() for leaf in jax.tree.leaves(gradients))
    assert len(audit.history.step) == 1
print("ok")
