"""The same small MLP in Linen and NNX, and a routed layer in each."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import linen, nnx
from routed import D, E, K, run_gathered, tokens


class LinenMLP(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(10)(x))
        return linen.Dense(3)(x)


class NnxMLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(D, 10, rngs=rngs)
        self.second = nnx.Linear(10, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


def mlp_in_linen():
    """(function, its arguments)"""
    model, x = LinenMLP(), tokens()
    return model.apply, (model.init(jax.random.key(0), x), x)


def mlp_in_nnx():
    def forward(model, x):
        return model(x)

    return forward, (NnxMLP(nnx.Rngs(0)), tokens())


def _route(logits, up, down, x):
    weights, index = jax.lax.top_k(jax.nn.softmax(logits), K)
    return run_gathered({"experts": {"up": up, "down": down}}, x, weights, index)


class LinenMoE(linen.Module):
    @linen.compact
    def __call__(self, x, _=None):
        normal = linen.initializers.normal()
        up = self.param("up", normal, (E, D, D))
        down = self.param("down", normal, (E, D, D))
        return x + _route(linen.Dense(E, use_bias=False, name="router")(x), up, down, x), None


class LinenNet(linen.Module):
    """Three layers under nn.scan and nn.remat, which drop what is sown."""

    @linen.compact
    def __call__(self, x):
        block = linen.scan(
            linen.remat(LinenMoE), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return block(name="layers")(x)[0]


class NnxMoE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.router = nnx.Linear(D, E, use_bias=False, rngs=rngs)
        self.up = nnx.Param(jax.random.normal(rngs.params(), (E, D, D)))
        self.down = nnx.Param(jax.random.normal(rngs.params(), (E, D, D)))
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return x + _route(self.router(x), self.up[...], self.down[...], x)


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([NnxMoE(rngs) for _ in range(2)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class NnxScanned(nnx.Module):
    """Three layers stacked for nnx.scan."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        make = nnx.vmap(NnxMoE, in_axes=0, out_axes=0)
        self.layers = nnx.split_rngs(splits=3)(make)(rngs)

    def __call__(self, x):
        run = nnx.scan(lambda layer, x: layer(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return run(self.layers, x)
