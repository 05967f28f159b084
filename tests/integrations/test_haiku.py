"""Router probabilities out of Haiku's state, recorded by the router or from outside."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

pytest.importorskip("haiku")

import haiku as hk
from haiku_moe import Block, blocks, recorded, recorded_in_stack, weights, weights_of_stack
from moe_rules_callback.integrations.haiku import find_router_probs, recording, router_probs
from moe_rules_callback.integrations.optax import audit_transform
from recorder import Recorder, find
from tiny_moe import EXPERTS, TOKENS, WIDTH, make_batches, make_weights, plain_model

from moe_rules_callback.errors import MetricsError

X, Y = make_batches()[0]
OUTPUT, PROBS = plain_model(make_weights(), X)
BY_ROUTER = {f"block_{i}/router": probs for i, probs in enumerate(PROBS)}


def model_of(forward):
    return hk.without_apply_rng(hk.transform_with_state(forward))


def run(forward, params=None):
    """Output and state of a call, with the state that init gives going in."""
    model = model_of(forward)
    _, state = model.init(jax.random.key(0), X)
    return jax.jit(model.apply)(weights() if params is None else params, state, X)


def assert_layers(found, expected):
    assert found.keys() == expected.keys()
    for layer, probs in expected.items():
        np.testing.assert_allclose(found[layer], probs, rtol=1e-6, err_msg=layer)


def test_recorded_from_outside():
    y, state = run(recorded)
    assert_layers(find_router_probs(state), BY_ROUTER)
    np.testing.assert_allclose(y, OUTPUT, rtol=1e-5)


def test_recorded_by_the_block_itself():
    _, state = run(partial(blocks, set_state=True))
    assert_layers(find_router_probs(state), {f"block_{i}": probs for i, probs in enumerate(PROBS)})


def test_layers_of_a_stack_keep_their_axis():
    _, state = run(recorded_in_stack, weights_of_stack())
    assert_layers(find_router_probs(state), {"stack/block/router": jnp.stack(PROBS)})


def test_other_state_is_passed_over():
    def forward(x):
        hk.BatchNorm(create_scale=False, create_offset=False, decay_rate=0.9)(x, is_training=True)
        return recorded(x)

    _, state = run(forward)
    assert len(state) > len(PROBS)
    assert_layers(find_router_probs(state), BY_ROUTER)


def test_outside_the_context_nothing_is_recorded():
    def forward(x):
        with recording(lambda module: module.name == "router"):
            x, _ = Block("block_0")(x)
        return Block("block_1")(x)[0]

    _, state = run(forward)
    assert_layers(find_router_probs(state), {"block_0/router": PROBS[0]})


def test_of_several_calls_the_last_counts():
    def forward(x):
        with recording(lambda module: module.name == "router"):
            block = Block("block_0")
            x, _ = block(x)
            return block(x)[1]

    last, state = run(forward)
    assert_layers(find_router_probs(state), {"block_0/router": last})


def test_a_batch_of_another_length():
    model = model_of(recorded)
    _, state = model.init(jax.random.key(0), X)
    _, state = model.apply(weights(), state, X[: TOKENS // 2])
    assert_layers(router_probs(state), {name: probs[: TOKENS // 2] for name, probs in BY_ROUTER.items()})


def test_abstract_state_for_the_layout():
    _, state = jax.eval_shape(model_of(recorded).init, jax.random.key(0), jnp.zeros((TOKENS, WIDTH)))
    assert [probs.shape for probs in router_probs(state).values()] == [(TOKENS, EXPERTS)] * len(PROBS)


OTHERS = [None, {}, PROBS, {"a": PROBS[0]}, {"norm": {"mean": PROBS[0]}}]
FLAX = [{"intermediates": {"router_probs": (PROBS[0],)}}, nnx.State({"moe": {"router_probs": PROBS[0]}})]


@pytest.mark.parametrize("source", OTHERS + FLAX)
def test_other_objects_are_left_to_other_adapters(source):
    assert find_router_probs(source) is None


def test_an_empty_state_says_what_was_forgotten():
    with pytest.raises(
        MetricsError, match=r"state is empty: no router has recorded anything. Call the model"
    ):
        router_probs(run(lambda x: blocks(x)[0])[1])


def test_an_unknown_name_lists_what_there_is():
    _, state = run(recorded)
    with pytest.raises(MetricsError, match="'probs'; there are: block_0/router/router_probs, block_1/"):
        router_probs(state, "probs")


def test_a_module_that_returns_more_is_named():
    def forward(x):
        with recording(lambda module: module.name == "block_0"):  # it returns its output, too
            return blocks(x)[0]

    with pytest.raises(MetricsError, match="'block_0/router_probs' holds a tuple, not router probabilities"):
        router_probs(run(forward)[1])


def test_an_optax_loop_carries_the_audit():
    model = model_of(recorded)
    _, state = model.init(jax.random.key(0), X)
    example = {"loss": jnp.zeros(()), "intermediates": state}
    tx = optax.chain(audit_transform(Recorder(), example), optax.adam(1e-2))  # type: ignore[arg-type]

    @jax.jit
    def step(params, state, opt_state):
        def loss_fn(params):
            y, new_state = model.apply(params, state, X)
            return jnp.mean((y - Y) ** 2), new_state

        (loss, state_after), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        metrics = {"loss": loss, "intermediates": state_after}
        updates, opt_state = tx.update(grads, opt_state, params, metrics=metrics)
        return optax.apply_updates(params, updates), state_after, opt_state, loss

    params = weights()
    opt_state = tx.init(params)
    losses = []
    for _ in range(3):
        params, state, opt_state, loss = step(params, state, opt_state)
        losses.append(loss)
    seen = find(opt_state)
    assert (seen.rows, seen.metrics["loss"]) == (3, losses[-1])
    assert_layers(find_router_probs(seen.metrics["intermediates"]), find_router_probs(state))
    assert losses[0] > losses[-1]
