"""Router probabilities out of NNX intermediates, and the audit's state inside an `nnx.Optimizer`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from moe_rules_callback.integrations.flax_nnx import find_router_probs, router_probs
from moe_rules_callback.integrations.optax import audit_transform
from recorder import Recorder, find
from tiny_moe import (
    EXPERTS,
    LAYERS,
    TOKENS,
    NnxBlock,
    NnxModel,
    NnxScanned,
    make_batches,
    make_weights,
    plain_model,
)

from moe_rules_callback.errors import MetricsError

needs_capture = pytest.mark.skipif(not hasattr(nnx, "capture"), reason="nnx.capture came with flax 0.12.6")
sow_warns = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")

X, Y = make_batches()[0]
PROBS = plain_model(make_weights(), X)[1]


def popped(model):
    model(X)
    return nnx.pop(model, nnx.Intermediate)


def captured(model, **options):
    return nnx.capture(model, nnx.Intermediate, **options)(X)[1]


def assert_layers(found, expected):
    assert found.keys() == expected.keys()
    for layer, probs in expected.items():
        np.testing.assert_allclose(found[layer], probs, rtol=1e-6, err_msg=layer)


BY_BLOCK = {f"blocks/{i}": probs for i, probs in enumerate(PROBS)}


def test_assigned_and_popped():
    assert_layers(find_router_probs(popped(NnxModel("assign"))), BY_BLOCK)


@sow_warns
def test_sown_and_popped():
    assert_layers(find_router_probs(popped(NnxModel("sow"))), BY_BLOCK)


@needs_capture
def test_sown_and_captured():
    assert_layers(find_router_probs(captured(NnxModel("sow"))), BY_BLOCK)


@needs_capture
def test_captured_from_a_model_that_records_nothing():
    state = captured(NnxModel(), method_outputs=nnx.Intermediate)
    assert_layers(router_probs(state, "router/__call__"), BY_BLOCK)


def test_bare_values_as_an_optimizer_hands_them_on():
    state = nnx.State(nnx.to_pure_dict(popped(NnxModel("assign"))))
    assert_layers(find_router_probs(state), BY_BLOCK)


@pytest.mark.parametrize("record", ["assign", pytest.param("sow", marks=sow_warns)])
def test_blocks_stacked_for_a_scan_keep_their_layer_axis(record):
    assert_layers(find_router_probs(popped(NnxScanned(record))), {"blocks": jnp.stack(PROBS)})


@needs_capture
def test_blocks_stacked_for_a_scan_captured_without_an_edit():
    state = captured(NnxScanned(), method_outputs=nnx.Intermediate)
    assert_layers(router_probs(state, "router/__call__"), {"blocks": jnp.stack(PROBS)})


@sow_warns
def test_a_block_that_two_parents_share_is_one_layer_with_the_tokens_of_both_calls():
    class Shared(nnx.Module):
        def __init__(self):
            block = NnxBlock(make_weights()[0], "sow")
            self.first, self.second = block, block

        def __call__(self, x):
            x, probs_1 = self.first(x)
            _, probs_2 = self.second(x)
            return probs_1, probs_2

    model = Shared()
    calls = model(X)
    found = find_router_probs(nnx.pop(model, nnx.Intermediate))
    assert_layers(found, {"first": jnp.concatenate(calls)})


@sow_warns
def test_abstract_intermediates_for_the_layout():
    def calls_twice(model):
        model(X)
        return popped(model)

    abstract = nnx.eval_shape(calls_twice, NnxModel("sow"))
    shapes = [probs.shape for probs in router_probs(abstract).values()]
    assert shapes == [(2 * TOKENS, EXPERTS)] * LAYERS


def test_inside_jit():
    found = jax.jit(find_router_probs)(popped(NnxModel("assign")))
    assert_layers(found, BY_BLOCK)


@pytest.mark.parametrize("source", [{}, {"a": {"router_probs": PROBS[0]}}, NnxModel(), None, PROBS])
def test_other_objects_are_left_to_other_adapters(source):
    assert find_router_probs(source) is None


def test_an_empty_state_says_what_was_forgotten():
    with pytest.raises(MetricsError, match="is empty: the model has recorded nothing, or it was popped"):
        find_router_probs(popped(NnxModel()))


def test_an_unknown_name_lists_what_there_is():
    state = nnx.State({"moe": {"router_prob": nnx.Intermediate(PROBS[0])}})
    with pytest.raises(MetricsError) as error:
        find_router_probs(state)
    assert "No intermediate is called 'router_probs'; there are: moe/router_prob." in str(error.value)
    assert "Did you mean router_prob?" in str(error.value)


def test_what_is_no_array_of_probabilities_is_refused():
    state = nnx.State({"moe": {"router_probs": nnx.Intermediate(((PROBS[0], jnp.ones(3)),))}})
    with pytest.raises(MetricsError, match=r"'moe/router_probs' holds a tuple, not router probabilities"):
        find_router_probs(state)
    state = nnx.State({"moe": {"router_probs": nnx.Intermediate(jnp.ones(3))}})
    with pytest.raises(MetricsError, match=r"holds an array of shape \(3,\)"):
        find_router_probs(state)


def make_optimizer(model):
    example = {"loss": jnp.zeros(()), "intermediates": popped(model)}
    tx = optax.chain(audit_transform(Recorder(), example), optax.sgd(0.1))  # type: ignore[arg-type]
    return nnx.Optimizer(model, tx, wrt=nnx.Param)


def update(model, optimizer):
    """One step; the loss that the audit should see."""

    def loss_fn(model):
        y, _ = model(X)
        return jnp.mean((y - Y) ** 2)

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    metrics = {"loss": loss, "intermediates": nnx.pop(model, nnx.Intermediate)}
    optimizer.update(model, grads, metrics=metrics)
    return loss


def test_an_optimizer_carries_the_audit_through_nnx_jit():
    model = NnxModel("assign")
    optimizer = make_optimizer(model)
    step = nnx.jit(update)
    losses = [step(model, optimizer) for _ in range(3)]
    seen = find(optimizer)
    assert jax.tree.leaves(seen.rows) == [3]
    assert jax.tree.leaves(seen.metrics["loss"]) == [losses[-1]]
    assert len(jax.tree.leaves(seen.metrics["intermediates"])) == LAYERS
    assert losses[0] > losses[-1]


def test_the_split_form_carries_the_audit_through_jax_jit():
    model = NnxModel("assign")
    graphdef, state = nnx.split((model, make_optimizer(model)))

    @jax.jit
    def step(state):
        model, optimizer = nnx.merge(graphdef, state)
        loss = update(model, optimizer)
        return nnx.state((model, optimizer)), loss

    state, _ = step(state)
    state, loss = step(state)
    seen = find(nnx.merge(graphdef, state))
    assert jax.tree.leaves(seen.rows) == [2]
    assert jax.tree.leaves(seen.metrics["loss"]) == [loss]
