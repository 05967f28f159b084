"""A transformer in plain JAX whose layers are Mixtures of Experts and hand out nothing but the loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

WIDTH, HIDDEN, EXPERTS, TOP_K, HEADS = 64, 64, 8, 2, 4
Params = dict[str, jax.Array]


def parameters(layers: int) -> Params:
    """Weights of all layers, float32 with a leading axis [layers]."""
    shapes = {
        "qkv": (WIDTH, 3, HEADS, WIDTH // HEADS),
        "out": (HEADS, WIDTH // HEADS, WIDTH),
        "router": (WIDTH, EXPERTS),
        "up": (EXPERTS, WIDTH, HIDDEN),
        "down": (EXPERTS, HIDDEN, WIDTH),
    }
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: 0.1 * jax.random.normal(key, (layers, *shape))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def block(layer: Params, x: jax.Array) -> jax.Array:
    """[batch, time, width] -> the same: attention, then the two best experts of each token."""
    q, k, v = jnp.einsum("btd,dchf->cbthf", _normed(x), layer["qkv"])
    scores = jax.nn.softmax(jnp.einsum("bthf,bshf->bhts", q, k))
    x = x + jnp.einsum("bhts,bshf,hfd->btd", scores, v, layer["out"])
    h = _normed(x)
    gate, index = jax.lax.top_k(jax.nn.softmax(h @ layer["router"]), TOP_K)
    weights = (jax.nn.one_hot(index, EXPERTS) * gate[..., None]).sum(-2)
    hidden = jax.nn.gelu(jnp.einsum("btd,edf->btef", h, layer["up"]))
    return x + jnp.einsum("btef,efd,bte->btd", hidden, layer["down"], weights)


def scanned(params: Params, x: jax.Array) -> jax.Array:
    """The layers as a scan, each rematerialised in the backward pass."""
    return jax.lax.scan(jax.checkpoint(lambda x, layer: (block(layer, x), None)), x, params)[0]


def unrolled(params: Params, x: jax.Array) -> jax.Array:
    """The layers one after the other."""
    for i in range(len(params["router"])):
        x = block(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
    return x


def loss_of(model: Any) -> Any:
    """The loss of a model that is to give its input shifted by one."""
    return lambda params, x: jnp.square(model(params, x) - jnp.roll(x, 1, axis=1)).mean()


def _normed(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
