"""Watched losses and steps in the loops that people write, in every framework: rows against NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from moe_rules_callback import RuleAuditCallback

X = jax.random.normal(jax.random.key(0), (32, 8))
Y = jnp.roll(X, 1, axis=1)
STEPS = 3
Watch = Callable[..., Any]
Told = tuple[Any, list[jax.Array]]  # loss, then the router's weights [8, 4] that it was computed with
Loop = Callable[[Watch], Any]


def experts(probs: jax.Array, x: jax.Array, kernels: jax.Array) -> jax.Array:
    gate, index = jax.lax.top_k(probs, 2)
    return (gate[..., None] * jnp.einsum("td,tkdf->tkf", x, kernels[index])).sum(1)


class NnxMoe(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.router = nnx.Linear(8, 4, use_bias=False, rngs=rngs)
        self.experts = nnx.Param(0.3 * jax.random.normal(rngs.params(), (4, 8, 8)))
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dropout(experts(jax.nn.softmax(self.router(x)), x, self.experts[...]))


def nnx_loop(watch: Watch, whole_step: bool) -> Any:
    model: Any = NnxMoe(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)

    def loss_fn(model: NnxMoe) -> jax.Array:
        return jnp.square(model(X) - Y).mean()

    loss_fn = loss_fn if whole_step else watch(loss_fn)

    @nnx.jit
    def step(model: NnxMoe, optimizer: nnx.Optimizer) -> jax.Array:
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    step = watch(step) if whole_step else step
    for _ in range(STEPS):
        before = jnp.copy(model.router.kernel[...])
        yield step(model, optimizer), [before]


class LinenMoe(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(nn.Dense(4, use_bias=False, name="router")(x))
        return experts(probs, x, self.param("experts", nn.initializers.normal(0.3), (4, 8, 8)))


def linen(watch: Watch, inner: bool) -> Any:
    """A TrainState whose loss, or whose model, is watched."""
    model: Any = LinenMoe()
    params = model.init(jax.random.key(0), X)["params"]
    apply = watch(model.apply) if inner else model.apply
    state = TrainState.create(apply_fn=apply, params=params, tx=optax.adamw(1e-2))

    @jax.jit
    def step(state: TrainState) -> Any:
        def loss_fn(params: Any) -> jax.Array:
            return jnp.square(state.apply_fn({"params": params}, X) - Y).mean()

        loss, grads = jax.value_and_grad(loss_fn if inner else watch(loss_fn))(state.params)
        return state.apply_gradients(grads=grads), loss

    for _ in range(STEPS):
        before = state.params["router"]["kernel"]
        state, loss = step(state)
        yield loss, [before]


class EquinoxMoe(eqx.Module):
    router: eqx.nn.Linear
    experts: jax.Array

    def __call__(self, token: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(self.router(token))
        gate, index = jax.lax.top_k(probs, 2)
        return (gate[:, None] * jnp.einsum("d,kdf->kf", token, self.experts[index])).sum(0)


def equinox(watch: Watch) -> Any:
    """The model sees one token, and is vmapped."""
    router = eqx.nn.Linear(8, 4, use_bias=False, key=jax.random.key(0))
    model = EquinoxMoe(router, 0.3 * jax.random.normal(jax.random.key(1), (4, 8, 8)))

    @watch
    def loss_fn(model: EquinoxMoe, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.square(jax.vmap(model)(x) - y).mean()

    @eqx.filter_jit
    def step(model: EquinoxMoe, x: jax.Array, y: jax.Array) -> Any:
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, x, y)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -0.1 * g, grads)), loss

    for _ in range(STEPS):
        before = model.router.weight.T
        model, loss = step(model, X, Y)
        yield loss, [before]


def haiku(watch: Watch) -> Any:
    def net(x: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(hk.Linear(4, with_bias=False, name="router")(x))
        kernels = hk.get_parameter("experts", (4, 8, 8), init=hk.initializers.RandomNormal(0.3))
        return jnp.square(experts(probs, x, kernels) - Y).mean()

    transformed = hk.without_apply_rng(hk.transform(net))
    params = transformed.init(jax.random.key(0), X)
    step = jax.jit(jax.value_and_grad(watch(transformed.apply)))
    for _ in range(STEPS):
        loss, grads = step(params, X)
        yield loss, [params["router"]["w"]]
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)


def multi_steps(watch: Watch) -> Any:
    """optax accumulates the gradients of two calls."""
    model: Any = LinenMoe()
    params: Any = model.init(jax.random.key(0), X)
    tx = optax.MultiSteps(optax.adam(1e-2), 2)
    state = tx.init(params)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(model.apply(params, x)).mean()

    value_and_grad = jax.jit(jax.value_and_grad(watch(loss_fn, forwards_per_step=2)))
    update = jax.jit(tx.update)
    for _ in range(STEPS):
        before = params["params"]["router"]["kernel"]
        for half in (X[:16], X[16:]):
            loss, grads = value_and_grad(params, half)
            updates, state = update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
        yield loss, [before]


def scanned_steps(watch: Watch) -> Any:
    """All steps in one jitted scan."""
    model: Any = LinenMoe()
    params: Any = model.init(jax.random.key(0), X)

    def loss_fn(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(model.apply(params, x) - Y).mean()

    watched = watch(loss_fn)

    @jax.jit
    def train(params: Any, xs: jax.Array) -> Any:
        def body(params: Any, x: jax.Array) -> Any:
            loss, grads = jax.value_and_grad(watched)(params, x)
            kernel = params["params"]["router"]["kernel"]
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), (loss, kernel)

        return jax.lax.scan(body, params, xs)[1]

    for loss, kernel in zip(*train(params, jnp.stack([X] * STEPS)), strict=True):
        yield loss, [kernel]


def scanned_layers(watch: Watch) -> Any:
    """Linen's lifted scan over rematerialised layers."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> Any:
            return X + 0 * LinenMoe(name="moe")(x), None  # every layer sees X

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
            )
            return layers(name="layers")(x, None)[0]

    model: Any = Stack()
    params: Any = model.init(jax.random.key(0), X)
    step = jax.jit(jax.value_and_grad(watch(lambda params: jnp.square(model.apply(params, X)).mean())))
    for _ in range(STEPS):
        loss, _ = step(params)
        yield loss, list(params["params"]["layers"]["moe"]["router"]["kernel"])


LOOPS: dict[str, Loop] = {
    "nnx loss": lambda watch: nnx_loop(watch, whole_step=False),
    "nnx step": lambda watch: nnx_loop(watch, whole_step=True),
    "linen loss": lambda watch: linen(watch, inner=False),
    "linen model": lambda watch: linen(watch, inner=True),
    "equinox": equinox,
    "haiku": haiku,
    "optax.MultiSteps": multi_steps,
    "scanned steps": scanned_steps,
    "scanned layers": scanned_layers,
}


def entropy(kernel: Any) -> float:
    """Mean normalised entropy over the tokens of X."""
    logits = np.asarray(X, np.float64) @ np.asarray(kernel, np.float64)
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    return float(-(probs * np.log(probs)).sum(-1).mean() / np.log(4))


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_rows_are_those_of_the_routers_weights(loop: Loop) -> None:
    bare = [loss for loss, _ in loop(lambda fn, **options: fn)]
    with RuleAuditCallback({"r": "low_router_entropy"}) as audit:
        expected = []
        for loss, kernels in loop(audit.watch):
            audit.on_step({"loss": loss})
            expected.append([entropy(kernel) for kernel in kernels])
        rows = audit.history
    np.testing.assert_array_equal(rows.loss, bare)
    np.testing.assert_allclose(rows.signal_value.sel(signal="router_entropy"), expected, atol=1e-5)
