"""A linear regression in each framework, as its own guide writes it, with one line for the audit.

The expected losses and norms are those of gradient descent in NumPy.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moe_rules_callback import RuleAuditCallback

STEPS, TREND, RATE = 36, 32, 0.1  # TREND: rows that a slope is taken over
X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
Y = (X @ [[1.0], [-2.0], [0.5]] + 0.3).astype(np.float32)


def mse(predicted):
    return jnp.mean((predicted - Y) ** 2)


def with_linen(audit):
    nn = pytest.importorskip("flax.linen")
    from flax.training.train_state import TrainState

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1, kernel_init=nn.initializers.zeros)(x)

    params = Model().init(jax.random.key(0), X)["params"]
    state = TrainState.create(apply_fn=Model().apply, params=params, tx=optax.sgd(RATE))

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda params: mse(state.apply_fn({"params": params}, X)))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    for _ in range(STEPS):
        params = state.params
        state, loss = step(state)
        audit.on_step({"loss": loss, "params": params})


def with_nnx(audit):
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.zeros((3, 1)))
            self.b = nnx.Param(jnp.zeros(1))

        def __call__(self, x):
            return x @ self.w + self.b

    model = Model()
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: mse(model(X)))(model)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
        return loss, params

    for _ in range(STEPS):
        loss, params = step(model, optimizer)
        audit.on_step({"loss": loss, "params": params})


def with_equinox(audit):
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        w: jax.Array
        b: jax.Array

        def __call__(self, x):
            return x @ self.w + self.b

    @eqx.filter_jit
    def step(model):
        loss, grads = eqx.filter_value_and_grad(lambda model: mse(jax.vmap(model)(X)))(model)
        return eqx.apply_updates(model, jax.tree.map(lambda g: -RATE * g, grads)), loss

    model = Model(jnp.zeros((3, 1)), jnp.zeros(1))
    for _ in range(STEPS):
        params = eqx.filter(model, eqx.is_inexact_array)
        model, loss = step(model)
        audit.on_step({"loss": loss, "params": params})


def with_penzai(audit):
    pz = pytest.importorskip("penzai.pz")

    model = pz.nn.Affine.from_config(
        name="affine",
        init_base_rng=jax.random.key(0),
        input_axes={"features": 3},
        output_axes={"out": 1},
        linear_initializer=pz.nn.zero_initializer,
    )
    x = pz.nx.wrap(jnp.asarray(X)).tag("batch", "features")

    @jax.jit
    def step(model):
        loss, grads = jax.value_and_grad(lambda model: mse(model(x).unwrap("batch", "out")))(model)
        return jax.tree.map(lambda p, g: p - RATE * g, model, grads), loss

    model = pz.freeze_params(model)
    for _ in range(STEPS):
        params = model
        model, loss = step(model)
        audit.on_step({"loss": loss, "params": params})


def with_haiku(audit):
    hk = pytest.importorskip("haiku")

    model = hk.without_apply_rng(hk.transform(lambda x: hk.Linear(1, w_init=jnp.zeros)(x)))

    @jax.jit
    def step(params):
        loss, grads = jax.value_and_grad(lambda params: mse(model.apply(params, X)))(params)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), loss

    params = model.init(jax.random.key(0), X)
    for _ in range(STEPS):
        before = params
        params, loss = step(params)
        audit.on_step({"loss": loss, "params": before})


@cache
def descent():
    """Loss and norm of the parameters before each step [STEPS]."""
    x = np.hstack([X, np.ones((len(X), 1))]).astype(np.float64)
    w, told = np.zeros((4, 1)), []
    for _ in range(STEPS):
        residual = x @ w - Y
        told.append((np.mean(residual**2), np.linalg.norm(w)))
        w = w - RATE * 2 / len(x) * x.T @ residual
    return np.transpose(told)


@pytest.mark.parametrize("walk", [with_linen, with_nnx, with_equinox, with_penzai, with_haiku])
def test_linear_regression(walk):
    with RuleAuditCallback({"learning": "0.9 :: decreasing_loss & increasing_weight_norm"}) as audit:
        walk(audit)
    history, (loss, norm) = audit.history, descent()
    np.testing.assert_allclose(history.loss, loss, rtol=0, atol=1e-5)
    np.testing.assert_allclose(history.signal_value.sel(signal="weight_norm").squeeze(), norm, rtol=1e-5)
    unknown = TREND - 1  # until the window of a trend has filled
    assert history.state.sel(rule="learning").values.tolist() == [2] * unknown + [1] * (STEPS - unknown)
