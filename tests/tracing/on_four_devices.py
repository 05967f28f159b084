"""Run by test_shard_map.py in a process of its own: taps on a mesh of four devices."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax
import jax.numpy as jnp
import numpy as np
from routed import ROUTER, E, K, T, logits_of, parameters, soft_top_k, softmax, tokens

from moe_rules_callback.tracing import tap

P = jax.P
MESH = jax.make_mesh((2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
PARAMS, X = parameters(), tokens()


def check(model, params, x, expected) -> None:
    plain = jax.jit(jax.value_and_grad(lambda p: jnp.square(model(p, x)).sum()))(params)
    tapped = jax.value_and_grad(tap(lambda p: jnp.square(model(p, x)).sum()), has_aux=True)
    (out, taps), grads = jax.jit(tapped)(params)
    jax.tree.map(np.testing.assert_array_equal, (out, grads), plain)
    assert taps[ROUTER].shape == expected.shape, (taps[ROUTER].shape, expected.shape)
    np.testing.assert_allclose(taps[ROUTER], expected, atol=1e-5)


def sharded_tokens(check_vma: bool):
    """Tokens over `data`, the same on both devices of `model`."""
    return jax.shard_map(
        soft_top_k, mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=check_vma
    )


def split_contraction(params, x):
    """The router's input is split over `model`: the logits are a sum over its devices."""
    probs = jax.nn.softmax(jax.lax.psum(x @ params["router"]["kernel"], "model"))
    weights, index = jax.lax.top_k(probs, K)
    return jnp.einsum("tk,tkdf,td->tf", weights, params["experts"]["up"][index], x)


def scanned(params, x):
    return jax.lax.scan(jax.checkpoint(lambda x, p: (x + soft_top_k(p, x), None)), x, params)[0]


expected = softmax(logits_of(PARAMS, X))
for check_vma in (True, False):
    check(sharded_tokens(check_vma), PARAMS, X, expected)

specs = {"router": P("model"), "experts": {"up": P(None, "model"), "down": P()}}
split = jax.shard_map(
    lambda p, x: jax.lax.psum(split_contraction(p, x), "model"),
    mesh=MESH, in_specs=(specs, P("data", "model")), out_specs=P("data"),
)  # fmt: skip
without_bias = PARAMS | {"router": {"kernel": PARAMS["router"]["kernel"]}}
check(split, without_bias, X, expected)

stacked = parameters(layers=2)
layers = jax.shard_map(scanned, mesh=MESH, in_specs=(P(), P("data")), out_specs=P("data"))
first, second = ([leaf[i] for leaf in jax.tree.leaves(stacked)] for i in range(2))
trees = [jax.tree.unflatten(jax.tree.structure(stacked), leaves) for leaves in (first, second)]
after = X + soft_top_k(trees[0], X)
both = np.stack([softmax(logits_of(trees[0], X)), softmax(logits_of(trees[1], after))])
check(layers, stacked, X, both)

# No shard_map: the compiler splits the work, and the tap keeps the layout that the compiler gives it.
placed = jax.device_put(X, jax.sharding.NamedSharding(MESH, P("data")))
out, taps = jax.jit(tap(soft_top_k))(PARAMS, placed)
np.testing.assert_array_equal(out, jax.jit(soft_top_k)(PARAMS, placed))
np.testing.assert_allclose(taps[ROUTER], expected, atol=1e-6)
assert taps[ROUTER].shape == (T, E)

# A trainer's jit with shardings of its own.
replicated = jax.sharding.NamedSharding(MESH, P())
step = jax.jit(soft_top_k, in_shardings=(replicated, placed.sharding), out_shardings=placed.sharding)
out, taps = tap(step)(PARAMS, placed)
assert out.sharding == placed.sharding
np.testing.assert_allclose(taps[ROUTER], expected, atol=1e-6)
print("ok")
