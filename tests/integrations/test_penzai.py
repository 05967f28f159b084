"""Router probabilities out of selected Penzai layers; named axes put in order."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("penzai")

from moe_rules_callback.integrations.optax import audit_transform
from moe_rules_callback.integrations.penzai import capture, find_router_probs, router_probs
from penzai import pz
from penzai.toolshed import basic_training
from penzai.toolshed.save_intermediates import SaveIntermediate
from penzai_moe import Block, Router, start, start_stacked
from recorder import Recorder, find
from tiny_moe import EXPERTS, TOKENS, TOP_K, make_batches, make_weights, plain_model

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.errors import MetricsError

X, Y = make_batches()[0]
OUTPUT, PROBS = plain_model(make_weights(), X)
BY_ROUTER = {f"sublayers/{i}/router": probs for i, probs in enumerate(PROBS)}
NAMED = pz.nx.wrap(X).tag("tokens", "width")


def routers(model):
    return pz.select(model).at_instances_of(Router)


def unfrozen():
    """The model with parameters that can be changed, as its constructors make it."""
    return pz.nn.Sequential([Block.of(weights, f"block_{i}") for i, weights in enumerate(make_weights())])


def mse(y):
    return jnp.mean((y.unwrap("tokens", "width") - Y) ** 2)


def assert_layers(found, expected):
    assert found.keys() == expected.keys()
    for layer, probs in expected.items():
        np.testing.assert_allclose(found[layer], probs, rtol=1e-6, err_msg=layer)


@pytest.mark.parametrize("make", [start, unfrozen])
def test_captured_and_the_model_stays_as_it_was(make):
    model = make()
    y, probs = capture(routers(model))(NAMED)
    assert_layers(probs, BY_ROUTER)
    np.testing.assert_allclose(y.unwrap("tokens", "width"), OUTPUT, rtol=1e-5)
    assert pz.select(model).at_instances_of(SaveIntermediate).is_empty()


def test_captured_inside_jit_and_grad():
    @jax.jit
    def compute(model):
        def loss_fn(model):
            y, probs = capture(routers(model))(NAMED)
            return mse(y), probs

        return jax.value_and_grad(loss_fn, has_aux=True)(model)

    (_, probs), grads = compute(start())
    expected = jax.grad(lambda model: mse(model(NAMED)))(start())
    assert_layers(probs, BY_ROUTER)
    for found, plain in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, plain, rtol=1e-5, atol=1e-7)


def test_layers_of_a_stack_keep_their_axis():
    _, probs = capture(routers(start_stacked()))(NAMED)
    assert_layers(probs, {"stacked_sublayers/router": jnp.stack(PROBS)})


def test_axes_come_in_the_order_of_the_array_with_the_experts_last():
    shape = {"batch": 2, "experts": EXPERTS, "tokens": TOKENS}
    array = pz.nx.wrap(jnp.arange(2 * EXPERTS * TOKENS).reshape(*shape.values())).tag(*shape)
    assert_layers(router_probs(array), {"router": jnp.moveaxis(array.unwrap(*shape), 1, -1)})
    assert router_probs(array, experts="batch")["router"].shape == (EXPERTS, TOKENS, 2)


def test_named_arrays_in_any_structure():
    named = [pz.nx.wrap(probs).tag("tokens", "experts") for probs in PROBS]
    assert_layers(find_router_probs(named[0]), {"router": PROBS[0]})
    assert_layers(find_router_probs(named), {"0": PROBS[0], "1": PROBS[1]})
    assert_layers(jax.jit(find_router_probs)({"a": named[0]}), {"a": PROBS[0]})


def test_state_variables_by_their_labels():
    def recording(path, router):
        variable = pz.StateVariable(value=None, label=f"block_{path[1].idx}")
        return pz.nn.Sequential([router, SaveIntermediate(variable)])

    model = routers(start()).apply(recording, with_keypath=True)
    model(NAMED)
    _, variables = pz.unbind_state_vars(model, freeze=True)
    assert_layers(find_router_probs(variables), {"block_0": PROBS[0], "block_1": PROBS[1]})


@pytest.mark.parametrize("source", [None, (), {}, PROBS, {"a": {"router_probs": PROBS[0]}}, unfrozen()])
def test_other_objects_are_left_to_other_adapters(source):
    assert find_router_probs(source) is None


def test_another_name_of_the_axis_is_asked_for():
    with pytest.raises(MetricsError) as error:
        capture(routers(start()), experts="expert")(NAMED)
    assert str(error.value) == (
        "The router probabilities of 'sublayers/0/router' are a NamedArray with the axes "
        "['tokens', 'experts']; expected a NamedArray with the axis 'expert'. Name the one that counts the "
        "experts: capture(selection, experts=...) or router_probs(arrays, experts=...)."
    )


def test_a_layer_that_returns_more_is_named():
    @pz.pytree_dataclass
    class Chooses(pz.nn.Layer):
        def __call__(self, x, /, **_):
            return x, x

    with pytest.raises(MetricsError, match=r"of '' are a tuple with the axes \[\]; expected a NamedArray"):
        capture(pz.select(Chooses()))(NAMED)


def test_a_router_that_is_not_called_is_named():
    @pz.pytree_dataclass
    class Skips(pz.nn.Layer):
        router: Any

        def __call__(self, x, /, **_):
            return x

    run = capture(pz.select(Skips(start())).at(lambda model: model.router))
    with pytest.raises(MetricsError, match=r"The router 'router' was not called. Select layers that the"):
        run(NAMED)


def test_an_optax_loop_over_unbound_parameters_carries_the_audit():
    unbound, params = pz.unbind_params(unfrozen(), freeze=True)
    example = {"loss": jnp.zeros(()), "router_probs": BY_ROUTER}
    tx = optax.chain(audit_transform(Recorder(), example), optax.adam(1e-2))  # type: ignore[arg-type]

    @jax.jit
    def step(params, opt_state):
        def loss_fn(params):
            y, probs = capture(routers(pz.bind_variables(unbound, params)))(NAMED)
            return mse(y), probs

        (loss, probs), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        metrics = {"loss": loss, "router_probs": probs}
        updates, opt_state = tx.update(grads, opt_state, params, metrics=metrics)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = tx.init(params)
    losses = []
    for _ in range(3):
        params, opt_state, loss = step(params, opt_state)
        losses.append(loss)
    seen = find(opt_state)
    assert (seen.rows, seen.metrics["loss"]) == (3, losses[-1])
    assert losses[0] > losses[-1]


def test_gradients_put_into_the_model_are_known_by_name():
    unbound, params = pz.unbind_params(unfrozen(), freeze=True)
    grads = jax.grad(lambda params: mse(pz.bind_variables(unbound, params)(NAMED)))(params)
    with RuleAuditCallback({"starved": "low_router_gradient_share"}) as audit:
        audit.on_step({"loss": 1.0, "grads": pz.bind_variables(unbound, grads)})
    plain = jax.grad(lambda weights: jnp.mean((plain_model(weights, X)[0] - Y) ** 2))(make_weights())
    share = optax.tree.norm([layer["router"] for layer in plain]) / optax.tree.norm(plain)
    found = audit.history.signal_value.sel(signal="router_gradient_share")
    np.testing.assert_allclose(found, [[share]], rtol=1e-5)


def test_the_trainer_of_the_toolshed_returns_what_the_audit_takes():
    def loss_fn(*, model, state, rng, **_):
        y, probs = capture(routers(model))(NAMED)
        return mse(y), state, {"loss": mse(y), "router_probs": probs}

    trainer = basic_training.StatefulTrainer.build(jax.random.key(0), unfrozen(), optax.sgd(0.1), loss_fn)
    with RuleAuditCallback({"unsure": "high_router_entropy"}, top_k=TOP_K) as audit:
        for _ in range(3):
            audit.on_step(trainer.step())
    assert audit.history.layer.values.tolist() == list(BY_ROUTER)
    assert audit.history.loss[0] > audit.history.loss[-1]
