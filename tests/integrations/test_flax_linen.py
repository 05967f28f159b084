"""Router probabilities out of Linen's `intermediates`, and the `TrainState` that hands metrics on."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import core
from flax import linen as nn
from flax.training.train_state import TrainState
from moe_rules_callback.integrations.flax_linen import AuditTrainState, find_router_probs, router_probs
from moe_rules_callback.integrations.optax import audit_transform
from recorder import Recorder, find
from tiny_moe import LinenBlock, LinenModel, LinenScanned, make_batches, make_weights, plain_model

from moe_rules_callback.errors import MetricsError

X, Y = make_batches()[0]
PROBS = plain_model(make_weights(), X)[1]
BY_BLOCK = {f"block_{i}": probs for i, probs in enumerate(PROBS)}


def updated(model, **options):
    """The collections that `apply` returns beside the output."""
    return model.apply({"params": model.weights()}, X, mutable=["intermediates"], **options)[1]


def assert_layers(found, expected):
    assert found.keys() == expected.keys()
    for layer, probs in expected.items():
        np.testing.assert_allclose(found[layer], probs, rtol=1e-6, err_msg=layer)


@pytest.mark.parametrize("freeze", [dict, core.freeze])
@pytest.mark.parametrize("select", [lambda c: c, lambda c: c["intermediates"]], ids=["updated", "collection"])
def test_sown(freeze, select):
    assert_layers(find_router_probs(freeze(select(updated(LinenModel(sow_probs=True))))), BY_BLOCK)


def test_other_collections_are_passed_over():
    collections = {"batch_stats": {"mean": jnp.ones(3)}, **updated(LinenModel(sow_probs=True))}
    assert_layers(find_router_probs(collections), BY_BLOCK)


def test_captured_from_a_model_that_sows_nothing():
    collections = updated(LinenModel(), capture_intermediates=True)
    assert_layers(router_probs(collections, "router/__call__"), BY_BLOCK)


def test_sown_with_a_reduction_that_makes_no_tuple():
    assert_layers(router_probs({"moe": {"router_probs": PROBS[0]}}), {"moe": PROBS[0]})


def test_blocks_under_scan_keep_their_layer_axis():
    assert_layers(find_router_probs(updated(LinenScanned())), {"blocks": jnp.stack(PROBS)})


def test_a_scan_that_drops_what_is_sown_is_pointed_out():
    collections = updated(LinenScanned(keep=False))
    assert collections == {}
    with pytest.raises(MetricsError) as error:
        find_router_probs(collections)
    assert 'variable_axes={"params": 0, "intermediates": 0}' in str(error.value)


def test_a_block_called_twice_is_one_layer_with_the_tokens_of_both_calls():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = LinenBlock(sow_probs=True, name="block")
            x, probs_1 = block(x)
            _, probs_2 = block(x)
            return probs_1, probs_2

    variables = {"params": {"block": make_weights()[0]}}
    calls, collections = Shared().apply(variables, X, mutable=["intermediates"])
    assert_layers(find_router_probs(collections), {"block": jnp.concatenate(calls)})


def test_inside_jit():
    assert_layers(jax.jit(find_router_probs)(updated(LinenModel(sow_probs=True))), BY_BLOCK)


@pytest.mark.parametrize("source", [None, PROBS, {"a": {"router_probs": PROBS[0]}}])
def test_other_objects_are_left_to_other_adapters(source):
    assert find_router_probs(source) is None


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(MetricsError, match="is called 'probs'; there are: block_0/router_probs, block_1/"):
        router_probs(updated(LinenModel(sow_probs=True)), "probs")


def train(state_type, tx):
    model = LinenModel()
    state = state_type.create(apply_fn=model.apply, params=model.weights(), tx=tx)

    @jax.jit
    def step(state):
        def loss_fn(params):
            return jnp.mean((state.apply_fn({"params": params}, X)[0] - Y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        handed_on = {"metrics": {"loss": loss}} if state_type is AuditTrainState else {}
        return state.apply_gradients(grads=grads, **handed_on), loss

    state, _ = step(state)
    state, _ = step(state)
    return step(state)


AUDIT = audit_transform(Recorder(), {"loss": jnp.zeros(())})  # type: ignore[arg-type]


def test_the_train_state_hands_metrics_on_and_trains_as_before():
    audited, loss = train(AuditTrainState, optax.chain(AUDIT, optax.adam(1e-2)))
    seen = find(audited)
    assert (seen.rows, seen.metrics["loss"], audited.step) == (3, loss, 3)
    bare, _ = train(TrainState, optax.chain(optax.adam(1e-2)))
    for a, b in zip(jax.tree.leaves(audited.params), jax.tree.leaves(bare.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_plain_train_state_is_told_what_to_use_instead():
    with pytest.raises(MetricsError, match=r"flax_linen.AuditTrainState in place of TrainState"):
        train(TrainState, optax.chain(AUDIT, optax.adam(1e-2)))


def test_further_fields_are_replaced_and_the_optimizer_stays():
    class WithStats(AuditTrainState):
        stats: jax.Array

    tx = optax.chain(AUDIT, optax.sgd(0.1))
    params = {"w": jnp.ones(3)}
    state: Any = WithStats.create(apply_fn=None, params=params, tx=tx, stats=jnp.zeros(2))
    state = state.apply_gradients(grads=params, metrics={"loss": jnp.zeros(())}, stats=jnp.ones(2))
    assert state.stats.tolist() == [1.0, 1.0]
    assert state.tx is tx


def test_parameters_overwritten_by_their_gradient_are_kept_from_the_audit():
    params = {"params": {"w": jnp.ones(3)}, "_overwrite_with_gradient": {"scale": jnp.ones(())}}
    grads = {"params": {"w": jnp.ones(3)}, "_overwrite_with_gradient": {"scale": jnp.full((), 7.0)}}
    state = AuditTrainState.create(apply_fn=None, params=params, tx=optax.chain(AUDIT, optax.sgd(0.1)))
    state = state.apply_gradients(grads=grads, metrics={"loss": jnp.zeros(())})
    assert state.params["_overwrite_with_gradient"]["scale"] == 7
    assert list(find(state).metrics["grads"]) == ["w"]
