"""The tiny MoE in Haiku, and the ways in that it is tested with."""

from __future__ import annotations

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from conformance import Shown, beside, inside_optax
from tiny_moe import EXPERTS, LAYERS, TOKENS, WIDTH, make_weights, mixture, route, stacked_weights

from moe_rules_callback.integrations import haiku


class Router(hk.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return route(hk.get_parameter("kernel", (WIDTH, EXPERTS), init=jnp.zeros), x)


class Block(hk.Module):
    """`set_state`: whether it records its probabilities itself."""

    def __init__(self, name: str, set_state: bool = False) -> None:
        super().__init__(name)
        self.set_state = set_state

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        probs = Router(name="router")(x)
        if self.set_state:
            hk.set_state("router_probs", probs)
        experts = hk.get_parameter("experts", (EXPERTS, WIDTH, WIDTH), init=jnp.zeros)
        return x + mixture(probs, experts, x), probs


def blocks(x, set_state=False):
    probs = []
    for i in range(LAYERS):
        x, seen = Block(f"block_{i}", set_state)(x)
        probs.append(seen)
    return x, probs


def recorded(x):
    with haiku.recording(lambda module: isinstance(module, Router)):
        return blocks(x)[0]


def recorded_in_stack(x):
    with haiku.recording(lambda module: module.name == "router"):
        return hk.layer_stack(LAYERS, name="stack")(lambda x: Block("block")(x)[0])(x)


def weights() -> dict[str, Any]:
    modules = [(f"block_{i}", layer) for i, layer in enumerate(make_weights())]
    return {name: {"experts": layer["experts"]} for name, layer in modules} | {
        f"{name}/router": layer["router"] for name, layer in modules
    }


def weights_of_stack() -> dict[str, Any]:
    stacked = stacked_weights()
    return {"stack/block": {"experts": stacked["experts"]}, "stack/block/router": stacked["router"]}


def returned(params, x):
    y, probs = hk.without_apply_rng(hk.transform(blocks)).apply(params, x)
    return y, {"router_probs": probs}


def state_of(forward):
    """How a function with state shows its probabilities."""
    model = hk.without_apply_rng(hk.transform_with_state(forward))

    def shown(params, x):
        _, state = model.init(jax.random.key(0), jnp.zeros((TOKENS, WIDTH)))
        y, state = model.apply(params, state, x)
        return y, {"intermediates": state}

    return shown


MODELS = {
    "haiku-returned": (Shown(weights, returned), beside),
    "haiku-set-state": (Shown(weights, state_of(lambda x: blocks(x, set_state=True)[0])), beside),
    "haiku-recorded": (Shown(weights, state_of(recorded)), beside, inside_optax),
    "haiku-stack-recorded": (Shown(weights_of_stack, state_of(recorded_in_stack), 0), beside, inside_optax),
}
