"""The tiny MoE in Equinox, and the ways in that it is tested with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from conformance import Shown, differentiated, example_metrics, returned
from moe_rules_callback.integrations.optax import audit_transform
from tiny_moe import EXPERTS, TOKENS, make_batches, make_weights, mixture

from moe_rules_callback.integrations import equinox


class Router(eqx.Module):
    """A leaf of it, `score`, is no array."""

    kernel: jax.Array
    score: Callable[[jax.Array], jax.Array]

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.score(x @ self.kernel)


class Block(eqx.Module):
    router: Router
    experts: jax.Array

    def __init__(self, weights: dict[str, Any]) -> None:
        self.router = Router(weights["router"]["kernel"], jax.nn.softmax)
        self.experts = weights["experts"]

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        probs = self.router(x)
        return x + mixture(probs, self.experts, x), probs


class Model(eqx.Module):
    blocks: list[Block]

    def __init__(self) -> None:
        self.blocks = [Block(weights) for weights in make_weights()]

    def __call__(self, x: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
        probs = []
        for block in self.blocks:
            x, seen = block(x)
            probs.append(seen)
        return x, probs


class StatefulBlock(eqx.Module):
    """Keeps its probabilities and a number of calls in an `eqx.nn.State`."""

    block: Block
    router_probs: eqx.nn.StateIndex
    calls: eqx.nn.StateIndex

    def __init__(self, weights: dict[str, Any]) -> None:
        self.block = Block(weights)
        self.router_probs = eqx.nn.StateIndex(jnp.zeros((TOKENS, EXPERTS)))
        self.calls = eqx.nn.StateIndex(jnp.array(0))

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        x, probs = self.block(x)
        state = state.set(self.calls, state.get(self.calls) + 1)
        return x, state.set(self.router_probs, probs)


class StatefulModel(eqx.Module):
    blocks: list[StatefulBlock]

    def __init__(self) -> None:
        self.blocks = [StatefulBlock(weights) for weights in make_weights()]

    def __call__(self, x: jax.Array, state: eqx.nn.State) -> tuple[jax.Array, eqx.nn.State]:
        for block in self.blocks:
            x, state = block(x, state)
        return x, state


def routers(model: Model) -> list[Router]:
    return [block.router for block in model.blocks]


def captured(model, x):
    (y, _), probs = equinox.capture(model, routers)(x)
    return y, {"router_probs": probs}


def captured_in_vmap(model, x):
    run = jax.vmap(equinox.capture(model, routers))
    (y, _), probs = run(x.reshape(2, TOKENS // 2, -1))
    return y.reshape(x.shape), {"router_probs": probs}


def stateful(model, x):
    model, state = model
    y, state = model(x, state)
    return y, {"intermediates": state}


def floats(model):
    return eqx.filter(model, eqx.is_inexact_array)


def beside(audit, shown):
    compute = differentiated(shown.forward, eqx.filter_value_and_grad)

    @eqx.filter_jit
    def step(model, x, target):
        metrics, grads = compute(model, x, target)
        updates = jax.tree.map(lambda g: -0.1 * g, grads)
        return eqx.apply_updates(model, updates), metrics | {"params": floats(model), "grads": grads}

    model = shown.start()
    for x, target in make_batches():
        model, metrics = step(model, x, target)
        audit.on_step(metrics)


def inside_filter_jit(audit, shown):
    compute = differentiated(shown.forward, eqx.filter_value_and_grad)
    tx = optax.chain(audit_transform(audit, example_metrics(shown)), optax.sgd(0.1))

    @eqx.filter_jit(donate="all")
    def step(model, opt_state, x, target):
        metrics, grads = compute(model, x, target)
        updates, opt_state = tx.update(grads, opt_state, floats(model), metrics=metrics)
        return eqx.apply_updates(model, updates), opt_state

    model = shown.start()
    opt_state = tx.init(floats(model))
    for x, target in make_batches():
        model, opt_state = step(model, opt_state, x, target)
        audit.drain(opt_state)


MODELS = {
    "equinox-returned": (Shown(Model, returned), beside),
    "equinox-captured": (Shown(Model, captured), beside, inside_filter_jit),
    "equinox-captured-in-vmap": (Shown(Model, captured_in_vmap), inside_filter_jit),
}
stateful_model = eqx.nn.make_with_state(StatefulModel)
STATE_HAS_PATHS = isinstance(stateful_model()[1].tree_flatten()[1][0], str)  # since equinox 0.13.1
if STATE_HAS_PATHS:
    MODELS["equinox-state"] = (Shown(stateful_model, stateful), beside, inside_filter_jit)
