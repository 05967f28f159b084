"""Taps in models of Flax Linen and NNX, which know nothing of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")
import optax
from flax import nnx
from models import LinenNet, NnxNet, NnxScanned
from routed import E, T, softmax, tokens

from moe_rules_callback.tracing import discover_routers, tap

X = tokens()
KERNELS = [f"layers/{i}/router/kernel" for i in range(2)]


def loss_of(model, x):
    return jnp.square(model(x)).sum()


def test_linen_under_scan_and_remat() -> None:
    model = LinenNet()
    variables = model.init(jax.random.key(0), X)

    def loss(variables, x):
        return jnp.square(jnp.asarray(model.apply(variables, x))).sum()

    plain = jax.jit(jax.value_and_grad(loss))(variables, X)
    (out, taps), grads = jax.jit(jax.value_and_grad(tap(loss), has_aux=True))(variables, X)
    jax.tree.map(np.testing.assert_array_equal, (out, grads), plain)
    (probs,) = taps.values()
    assert list(taps) == ["params/layers/router/kernel"]
    assert probs.shape == (3, T, E)
    kernel = variables["params"]["layers"]["router"]["kernel"]
    np.testing.assert_allclose(probs[0], softmax(np.asarray(X) @ np.asarray(kernel[0])), atol=1e-6)


def test_an_nnx_model_is_tapped_and_keeps_its_state() -> None:
    model = NnxNet(nnx.Rngs(0))
    out, taps = tap(lambda model, x: model(x))(model, X)
    assert [int(layer.calls[...]) for layer in model.layers] == [1, 1]
    np.testing.assert_allclose(out, model(X), atol=1e-6)
    assert list(taps) == KERNELS
    first = np.asarray(model.layers[0].router.kernel[...])
    np.testing.assert_allclose(taps[KERNELS[0]], softmax(np.asarray(X) @ first), atol=1e-6)


def test_layers_stacked_for_nnx_scan() -> None:
    (router,) = discover_routers(lambda model, x: model(x), NnxScanned(nnx.Rngs(0)), X)
    assert (router.name, router.layers) == ("layers/router/kernel", (3,))


def test_the_loss_of_an_nnx_step() -> None:
    """As a trainer does it: nnx.jit around nnx.value_and_grad around the loss, which alone is tapped."""

    @nnx.jit
    def plain(model, optimizer, x):
        loss, grads = nnx.value_and_grad(loss_of)(model, x)
        optimizer.update(model, grads)
        return loss

    @nnx.jit
    def tapped(model, optimizer, x):
        (loss, taps), grads = nnx.value_and_grad(tap(loss_of), has_aux=True)(model, x)
        optimizer.update(model, grads)
        return loss, taps

    (a, tx_a), (b, tx_b) = (make_nnx() for _ in range(2))
    for turn in range(2):
        loss, taps = tapped(a, tx_a, X)
        assert loss == plain(b, tx_b, X)
        assert int(a.layers[0].calls[...]) == turn + 1
        assert list(taps) == KERNELS
    jax.tree.map(np.testing.assert_array_equal, nnx.state(a), nnx.state(b))


@pytest.mark.parametrize("donate", [(), (0, 1)])
def test_a_whole_nnx_step_from_outside(donate: tuple[int, ...]) -> None:
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(loss_of)(model, x)
        optimizer.update(model, grads)
        return loss

    (a, tx_a), (b, tx_b) = (make_nnx() for _ in range(2))
    plain, tapped = nnx.jit(step), tap(nnx.jit(step, donate_argnums=donate))
    for _ in range(2):
        before = np.asarray(a.layers[0].router.kernel[...])
        loss, taps = tapped(a, tx_a, X)
        assert loss == plain(b, tx_b, X)
        np.testing.assert_allclose(taps[KERNELS[0]], softmax(np.asarray(X) @ before), atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, nnx.state((a, tx_a)), nnx.state((b, tx_b)))


def make_nnx() -> tuple[NnxNet, nnx.Optimizer]:
    model = NnxNet(nnx.Rngs(0))
    return model, nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
