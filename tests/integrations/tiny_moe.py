"""One tiny MoE in plain JAX, Linen and NNX: the same arithmetic, weights and data.

    probs = router(x);  x = x + mixture(probs, experts, x);  twice

Every model is called as `model(x) -> (y, probabilities as the model happens to return them)`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

LAYERS, EXPERTS, TOP_K, WIDTH, TOKENS, STEPS = 2, 4, 2, 8, 16, 6


def make_weights() -> list[dict[str, Any]]:
    """For each layer {"router": {"kernel": [WIDTH, EXPERTS]}, "experts": [EXPERTS, WIDTH, WIDTH]}."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32)

    return [
        {"router": {"kernel": normal(WIDTH, EXPERTS)}, "experts": normal(EXPERTS, WIDTH, WIDTH)}
        for _ in range(LAYERS)
    ]


def stacked_weights() -> dict[str, Any]:
    """The weights of all layers, on a leading layer axis."""
    return jax.tree.map(lambda *layers: jnp.stack(layers), *make_weights())


def make_batches() -> list[tuple[jax.Array, jax.Array]]:
    """Inputs and targets [TOKENS, WIDTH] of each step."""
    data = np.random.default_rng(1).normal(size=(STEPS, 2, TOKENS, WIDTH))
    return [(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)) for x, y in data]


def route(kernel: jax.Array, x: jax.Array) -> jax.Array:
    """Router probabilities [tokens, experts]."""
    return jax.nn.softmax(x @ kernel)


def mixture(probs: jax.Array, experts: jax.Array, x: jax.Array) -> jax.Array:
    """Output [tokens, width] of the TOP_K experts of each token, weighted by their probabilities."""
    gates, index = jax.lax.top_k(probs, TOP_K)
    weights = (jax.nn.one_hot(index, EXPERTS) * gates[..., None]).sum(-2)
    return jnp.einsum("te,tw,ewv->tv", weights, x, experts)


def mse(y: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean((y - target) ** 2)


def plain_model(weights: list[dict[str, Any]], x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
    returned = []
    for layer in weights:
        probs = route(layer["router"]["kernel"], x)
        x = x + mixture(probs, layer["experts"], x)
        returned.append(probs)
    return x, returned


class LinenRouter(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return route(self.param("kernel", nn.initializers.zeros, (WIDTH, EXPERTS)), x)


class LinenBlock(nn.Module):
    sow_probs: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, jax.Array]:
        probs = LinenRouter(name="router")(x)
        if self.sow_probs:
            self.sow("intermediates", "router_probs", probs)
        experts = self.param("experts", nn.initializers.zeros, (EXPERTS, WIDTH, WIDTH))
        return x + mixture(probs, experts, x), probs


class LinenModel(nn.Module):
    sow_probs: bool = False

    @staticmethod
    def weights() -> dict[str, Any]:
        return {f"block_{i}": layer for i, layer in enumerate(make_weights())}

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        returned = []
        for i in range(LAYERS):
            x, probs = LinenBlock(self.sow_probs, name=f"block_{i}")(x)
            returned.append(probs)
        return x, returned


class LinenScanned(nn.Module):
    """Blocks stacked by nn.scan; `keep` says whether what they sow leaves the scan."""

    sow_probs: bool = True
    keep: bool = True

    @staticmethod
    def weights() -> dict[str, Any]:
        return {"blocks": stacked_weights()}

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes: dict[Any, Any] = {"params": 0} | ({"intermediates": 0} if self.keep else {})
        scanned = nn.scan(LinenBlock, variable_axes=axes, split_rngs={"params": True}, length=LAYERS)
        return scanned(self.sow_probs, name="blocks")(x, None)


class NnxRouter(nnx.Module):
    def __init__(self, kernel: jax.Array) -> None:
        self.kernel = nnx.Param(kernel)

    def __call__(self, x: jax.Array) -> jax.Array:
        return route(self.kernel[...], x)


class NnxBlock(nnx.Module):
    """`record`: how the block leaves its probabilities behind: "assign", "sow" or "" (not at all)."""

    def __init__(self, weights: dict[str, Any], record: str) -> None:
        self.router = NnxRouter(weights["router"]["kernel"])
        self.experts = nnx.Param(weights["experts"])
        self.record = record

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        probs = self.router(x)
        if self.record == "assign":
            self.router_probs = nnx.Intermediate(probs)
        elif self.record == "sow":
            self.sow(nnx.Intermediate, "router_probs", probs)
        return x + mixture(probs, self.experts[...], x), probs


class NnxModel(nnx.Module):
    def __init__(self, record: str = "") -> None:
        self.blocks = nnx.List(NnxBlock(weights, record) for weights in make_weights())

    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        returned = []
        for block in self.blocks:
            x, probs = block(x)
            returned.append(probs)
        return x, returned


class NnxScanned(nnx.Module):
    """Blocks stacked by nnx.vmap, run by nnx.scan."""

    def __init__(self, record: str = "") -> None:
        self.blocks = nnx.vmap(lambda weights: NnxBlock(weights, record))(stacked_weights())

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        return run(x, self.blocks)
