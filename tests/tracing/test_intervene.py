"""Faults planted in a model that knows nothing of it, each seen by its effect."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed import (
    ROUTER,
    E,
    logits_of,
    parameters,
    run_gathered,
    sigmoid_gate,
    soft_top_k,
    softmax,
    softmax_after,
    tokens,
)

from moe_rules_callback.errors import TracingError
from moe_rules_callback.tracing import intervene, tap

PARAMS, X = parameters(), tokens()


def loss(params: Any, x: jax.Array) -> jax.Array:
    return jnp.square(soft_top_k(params, x)).sum()


def test_a_killed_expert_gets_no_probability_and_no_gradient() -> None:
    killed = intervene(loss, {ROUTER: lambda logits: logits.at[..., 3].set(-1e9)})
    _, taps = jax.jit(tap(killed))(PARAMS, X)
    expected = np.delete(logits_of(PARAMS, X), 3, axis=-1)
    np.testing.assert_array_equal(taps[ROUTER][:, 3], 0)
    np.testing.assert_allclose(np.delete(taps[ROUTER], 3, axis=-1), softmax(expected), atol=1e-6)
    grads = jax.jit(jax.grad(killed))(PARAMS, X)["experts"]["up"]
    assert not grads[3].any()
    assert grads.any(axis=(1, 2)).sum() > 1


def test_a_frozen_router_learns_nothing() -> None:
    frozen = intervene(loss, {ROUTER: jax.lax.stop_gradient})
    value, grads = jax.jit(jax.value_and_grad(frozen))(PARAMS, X)
    assert value == jax.jit(loss)(PARAMS, X)
    assert not grads["router"]["kernel"].any()
    assert grads["experts"]["up"].any()


def test_scaled_logits() -> None:
    _, taps = jax.jit(tap(intervene(loss, {f"{ROUTER}@logits": lambda logits: 10 * logits})))(PARAMS, X)
    np.testing.assert_allclose(taps[ROUTER], softmax(10 * logits_of(PARAMS, X)), atol=1e-5)


@pytest.mark.parametrize("site", [f"{ROUTER}@indices", "//top_k"])
def test_shifted_indices(site: str) -> None:
    def shift(*results: jax.Array) -> Any:
        index = (results[-1] + 1) % E
        return index if len(results) == 1 else (results[0], index)

    def expected(params: Any, x: jax.Array) -> jax.Array:
        weights, index = jax.lax.top_k(jax.nn.softmax(x @ params["router"]["kernel"]), 2)
        weights = weights / weights.sum(-1, keepdims=True)
        return run_gathered(params, x, weights, (index + 1) % E)

    shifted = jax.jit(intervene(soft_top_k, {site: shift}))(PARAMS, X)
    np.testing.assert_allclose(shifted, expected(PARAMS, X), atol=1e-6)
    assert abs(shifted - soft_top_k(PARAMS, X)).max() > 0.01


def test_probabilities_and_scores() -> None:
    even = {f"{ROUTER}@probabilities": lambda probs: jnp.full_like(probs, 1 / E)}
    out = jax.jit(intervene(sigmoid_gate, even))(PARAMS, X)
    expected = run_gathered(PARAMS, X, jnp.full((6, 2), 1 / E), jnp.tile(jnp.arange(2), (6, 1)))
    np.testing.assert_allclose(out, expected, atol=1e-6)


def test_in_every_layer_of_a_scan() -> None:
    params = parameters(layers=3)

    def model(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(lambda x, p: (x + soft_top_k(p, x), None)), x, params)[0]

    even = intervene(model, {ROUTER: lambda logits: 0 * logits})
    _, taps = jax.jit(tap(even))(params, X)
    np.testing.assert_allclose(taps[ROUTER], np.full((3, 6, E), 1 / E), atol=1e-6)


def test_logits_that_are_read_twice_are_changed_for_both() -> None:
    """The inner jit hands the logits on to an auxiliary loss, and chooses by them too."""

    @jax.jit
    def layer(params, x):
        logits = x @ params["router"]["kernel"]
        chosen, index = jax.lax.top_k(logits, 2)
        return run_gathered(params, x, jax.nn.softmax(chosen), index), logits

    change = {ROUTER: lambda logits: logits.at[..., 0].set(50.0)}
    out, logits = intervene(layer, change)(PARAMS, X)
    assert (logits[:, 0] == 50).all()
    alone = run_gathered(PARAMS, X, jnp.ones((6, 1)), jnp.zeros((6, 1), int))
    np.testing.assert_allclose(out, alone, atol=1e-5)


def test_a_module_and_a_value_inside_it() -> None:
    """The router's module begins with the matmul that makes the logits, and both are changed."""
    models = pytest.importorskip("models")
    model = models.LinenMoE()
    variables = model.init(jax.random.key(0), X)
    name = "params/router/kernel"
    changes = {name: jnp.square, '//module_call[@type="Dense"]': lambda logits: 3 * logits}
    _, taps = jax.jit(tap(intervene(model.apply, changes)))(variables, X)
    logits = np.asarray(X) @ np.asarray(variables["params"]["router"]["kernel"])
    np.testing.assert_allclose(taps[name], softmax(3 * logits**2), atol=1e-6)
    only = intervene(model.apply, {'//module_call[@type="LinenMoE"]': lambda y: y * 0, name: jnp.square})
    assert not only(variables, X)[0].any()


def test_a_change_of_shape_is_refused() -> None:
    with pytest.raises(TracingError) as error:
        intervene(loss, {ROUTER: lambda logits: logits[:, :4]})(PARAMS, X)
    message = f"The replacement of {ROUTER} returns float32[6,4], where float32[6,8] is needed"
    assert message in str(error.value)


def test_unknown_sites() -> None:
    with pytest.raises(
        TracingError, match=r"No selection is fed by rooter/kernel\. Did you mean router/kernel\?"
    ):
        intervene(loss, {"rooter/kernel": jnp.zeros_like})(PARAMS, X)
    with pytest.raises(TracingError, match="Nothing in the function matches '//approx_top_k'"):
        intervene(loss, {"//approx_top_k": jnp.zeros_like})(PARAMS, X)
    with pytest.raises(TracingError, match=r"has no probabilities .*: its gate is 'softmax after'"):
        intervene(softmax_after, {f"{ROUTER}@probabilities": jnp.zeros_like})(PARAMS, X)
