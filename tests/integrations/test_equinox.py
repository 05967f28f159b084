"""Router probabilities out of an Equinox model that nobody changed, or out of its state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("equinox")

import equinox as eqx
from equinox_moe import STATE_HAS_PATHS, Block, Model, Router, routers, stateful_model
from moe_rules_callback.integrations.equinox import capture, find_router_probs, router_probs
from moe_rules_callback.integrations.optax import audit_transform
from recorder import Recorder, find
from tiny_moe import EXPERTS, LAYERS, TOKENS, WIDTH, make_batches, make_weights, plain_model

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.errors import MetricsError
from moe_rules_callback.tracing import tap

X, Y = make_batches()[0]
PROBS = plain_model(make_weights(), X)[1]
FIRST = PROBS[0]


def assert_layers(found, expected):
    assert found.keys() == expected.keys()
    for layer, probs in expected.items():
        np.testing.assert_allclose(found[layer], probs, rtol=1e-6, err_msg=layer)


def by_router(probs=PROBS):
    return {f"blocks/{i}/router": each for i, each in enumerate(probs)}


def test_captured_and_the_model_stays_as_it_was():
    model = Model()
    (y, returned), probs = capture(model, routers)(X)
    assert_layers(probs, by_router(returned))
    assert_layers(probs, by_router())
    assert eqx.tree_equal(model, Model())
    np.testing.assert_array_equal(y, model(X)[0])


def test_one_router_need_not_be_in_a_list():
    _, probs = capture(Model(), lambda model: model.blocks[1].router)(X)
    assert_layers(probs, {"blocks/1/router": PROBS[1]})


def test_captured_inside_filter_jit_and_filter_grad():
    @eqx.filter_jit
    @eqx.filter_value_and_grad(has_aux=True)
    def loss_fn(model):
        (y, _), probs = capture(model, routers)(X)
        return jnp.mean((y - Y) ** 2), probs

    (loss, probs), grads = loss_fn(Model())
    expected = eqx.filter_value_and_grad(lambda model: jnp.mean((model(X)[0] - Y) ** 2))(Model())
    assert_layers(probs, by_router())
    for found, plain in zip(jax.tree.leaves((loss, grads)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-7)


def test_captured_under_a_vmap_over_sequences():
    _, probs = jax.vmap(capture(Model(), routers))(X.reshape(4, TOKENS // 4, WIDTH))
    assert_layers(probs, by_router([each.reshape(4, TOKENS // 4, EXPERTS) for each in PROBS]))


def test_captured_under_a_vmap_over_single_tokens():
    router = Router(make_weights()[0]["router"]["kernel"], jax.nn.softmax)

    class Gate(eqx.Module):
        router: Router

        def __call__(self, x):
            return self.router(x).max()

    _, probs = jax.vmap(capture(Gate(router), lambda model: model.router))(X)
    assert_layers(probs, {"router": FIRST})


class Twice(eqx.Module):
    block: Block

    def __call__(self, x):
        x, first = self.block(x)
        _, second = self.block(x)
        return first, second


def test_a_router_called_twice_is_one_layer_with_the_tokens_of_both_calls():
    calls, probs = capture(Twice(Block(make_weights()[0])), lambda model: model.block.router)(X)
    assert_layers(probs, {"block/router": jnp.concatenate(calls)})


def test_what_else_a_model_asks_of_its_router_is_answered():
    class Scaled(eqx.Module):
        router: Router

        def __call__(self, x):
            return self.router(x) * self.router.kernel.shape[-1]

    scaled = Scaled(Model().blocks[0].router)
    _, probs = capture(scaled, lambda model: model.router)(X)
    assert_layers(probs, {"router": FIRST})


def inner(transform):
    class Inner(eqx.Module):
        router: Router

        def __call__(self, x):
            return transform(self.router, x)

    return Inner(Model().blocks[0].router)


TRANSFORMS = {
    "vmap": lambda router, x: jax.vmap(router)(x),
    "scan": lambda router, x: jax.lax.scan(lambda carry, token: (carry, router(token)), 0, x),
    "checkpoint": lambda router, x: eqx.filter_checkpoint(router)(x),
    "jit": lambda router, x: eqx.filter_jit(router)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("wrap", [lambda run: run, eqx.filter_jit], ids=["eager", "jitted"])
def test_a_transformation_of_the_models_own_is_pointed_out(transform, wrap):
    run = wrap(capture(inner(TRANSFORMS[transform]), lambda model: model.router))
    with pytest.raises(MetricsError, match="'router' was called inside a transformation of the model's own"):
        run(X)


def test_tap_sees_out_of_such_a_transformation():
    class Vmaps(eqx.Module):
        model: Model

        def __call__(self, x):
            return jax.vmap(self.model)(x)[0]

    _, found = tap(Vmaps(Model()))(X[None])
    assert len(found) == LAYERS
    for probs, expected in zip(found.values(), PROBS, strict=True):
        np.testing.assert_allclose(probs, expected, rtol=1e-6)


def test_a_router_that_is_not_called_is_named():
    run = capture(inner(lambda router, x: x), lambda model: model.router)
    with pytest.raises(MetricsError, match=r"The router 'router' was not called. Let `where` point at"):
        run(X)


def test_a_router_that_returns_more_than_probabilities_is_named():
    run = capture(Model(), lambda model: model.blocks[0])  # a block returns its output, too
    with pytest.raises(MetricsError, match=r"The router 'blocks/0' returned a tuple, not an array. Let"):
        run(X)


needs_paths = pytest.mark.skipif(not STATE_HAS_PATHS, reason="a state knows paths since equinox 0.13.1")


def after_a_call():
    model, state = stateful_model()
    return model(X, state)[1]


@needs_paths
def test_the_state_of_a_model_passing_over_other_state():
    assert_layers(find_router_probs(after_a_call()), {f"blocks/{i}": probs for i, probs in enumerate(PROBS)})


@needs_paths
def test_the_state_inside_jit():
    found = jax.jit(find_router_probs)(after_a_call())
    assert_layers(found, {f"blocks/{i}": probs for i, probs in enumerate(PROBS)})


@needs_paths
def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(
        MetricsError, match="is called 'probs'; there are: blocks/0/calls, blocks/0/router_probs"
    ):
        router_probs(after_a_call(), "probs")


@pytest.mark.parametrize("source", [None, PROBS, {"a": {"router_probs": PROBS[0]}}, Model()])
def test_other_objects_are_left_to_other_adapters(source):
    assert find_router_probs(source) is None


def test_an_optax_loop_carries_the_audit_and_sees_arrays_alone():
    example = {"loss": jnp.zeros(()), "router_probs": by_router()}
    tx = optax.chain(audit_transform(Recorder(), example), optax.adam(1e-2))  # type: ignore[arg-type]

    @eqx.filter_jit
    def step(model, opt_state):
        def loss_fn(model):
            (y, _), probs = capture(model, routers)(X)
            return jnp.mean((y - Y) ** 2), probs

        (loss, probs), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        metrics = {"loss": loss, "router_probs": probs}
        updates, opt_state = tx.update(grads, opt_state, params, metrics=metrics)
        return eqx.apply_updates(model, updates), opt_state, loss

    model: Any = Model()
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    before, losses = model, []
    for _ in range(3):
        before = model
        model, opt_state, loss = step(model, opt_state)
        losses.append(loss)
    seen = find(opt_state)
    assert (seen.rows, seen.metrics["loss"]) == (3, losses[-1])
    assert eqx.tree_equal(seen.metrics["params"], eqx.filter(before, eqx.is_inexact_array))
    assert_layers(seen.metrics["router_probs"], by_router(before(X)[1]))
    assert model.blocks[0].router.score is jax.nn.softmax


def test_rules_about_parameters_take_the_filtered_model():
    model = Model()
    with RuleAuditCallback({"large": "high_weight_norm"}) as audit:
        audit.on_step({"loss": 1.0, "params": eqx.filter(model, eqx.is_inexact_array)})
    arrays = [leaf for leaf in jax.tree.leaves(model) if eqx.is_array(leaf)]
    expected = np.sqrt(sum(np.square(array).sum() for array in arrays))
    assert len(arrays) == 2 * LAYERS
    np.testing.assert_allclose(audit.history.signal_value.sel(signal="weight_norm"), [[expected]], rtol=1e-6)
