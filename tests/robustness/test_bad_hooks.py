"""What a watched function's routers and the calls of its hook may bring that is no number."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback import MetricsError, RuleAuditCallback, State


def deleted(value: Any) -> jax.Array:
    array = jnp.asarray(value)
    array.delete()
    return array


T, D, E, K = 6, 8, 4, 2
BATCH = jax.random.normal(jax.random.key(1), (T, D))
PARAMS = {
    "router": jax.random.normal(jax.random.key(2), (D, E)),
    "experts": jax.random.normal(jax.random.key(3), (E, D, D)),
}


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    gate, index = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), K)
    weight = (jax.nn.one_hot(index, E) * gate[..., None]).sum(1)
    return jnp.square(
        jnp.einsum("te,tef->tf", weight, jnp.einsum("td,edf->tef", x, params["experts"]))
    ).mean()


def test_tokens_that_are_no_numbers_in_a_watched_function() -> None:
    """Among good steps, one each with a NaN, with nothing else, with infinities, and with no token."""
    rules = ["high_routing_confidence", "low_load_cv"]
    # JAX 0.7.1 cannot gather from a batch without tokens
    empty = BATCH[:0] if jax.__version_info__ >= (0, 8) else BATCH * jnp.nan
    bad = [BATCH.at[2, 0].set(jnp.nan), BATCH * jnp.nan, BATCH.at[0].set(jnp.inf), empty]
    with RuleAuditCallback(rules, flush_every=4) as audit:
        step = jax.jit(jax.value_and_grad(audit.watch(loss_fn)))
        for x in (BATCH, *bad, BATCH, BATCH * 1e30, BATCH):
            loss, _ = step(PARAMS, x)
            audit.on_step({"loss": loss})
        history = audit.history
    states = history.state.values
    assert (states[1:5] == State.UNKNOWN).all()
    assert np.isnan(history.signal_pooled.sel(signal="routing_confidence")[1:5]).all()
    assert np.isnan(history.expert_share[1:5]).all()
    np.testing.assert_array_equal(states[[5, 7]], states[[0, 0]])
    np.testing.assert_allclose(history.truth[[5, 7]], history.truth[[0, 0]], atol=1e-6)
    assert history.signal_pooled.sel(signal="routing_confidence")[6] == 1  # saturated, and sound


REFUSED: list[tuple[Any, str]] = [  # calls of the hook
    (({"loss": 1j}, None), "on_step was given loss. Beside a watched function it takes only scalars"),
    (({"loss": jax.random.key(0)}, None), "on_step was given loss. Beside a watched function"),
    (({"loss": np.ones(1)}, None), "on_step was given loss. Beside a watched function"),
    (({"loss": deleted(1.0)}, None), "the values of 'loss' are gone: its array was donated"),
    (({"loss": 1.0}, deleted(1)), "the values of 'step' are gone: its array was donated"),
    (({"loss": 1.0}, 2.0), "step is 2.0; it is a whole number"),
    (({"loss": 1.0}, jnp.float32(2)), "step is Array(2., dtype=float32); it is a whole number"),
    ((None, None), "the metrics are a NoneType; expected a mapping"),
    (({0: 1.0}, None), "the metrics have the key 0; a metric has a name"),
]
LARGE = {2: 2**70, 4: 10**400, 6: -1e300}


def test_a_refused_call_of_the_hook_keeps_its_row() -> None:
    """Else the scalars of all later calls would stand in the rows of the steps before them."""
    losses: list[float] = []
    with RuleAuditCallback(["high_routing_confidence"], flush_every=4) as audit:
        step = jax.jit(jax.grad(audit.watch(loss_fn)))
        for i, (call, message) in enumerate(REFUSED):
            loss = LARGE.get(i, float(i))
            step(PARAMS, BATCH)
            audit.on_step({"loss": loss, "phase": "train"})
            step(PARAMS, BATCH)
            with pytest.raises(MetricsError) as error:
                audit.on_step(*call)
            assert str(error.value).startswith(message)
            losses += (
                [np.float32(2.0**70), np.inf, -np.inf][list(LARGE).index(i)] if i in LARGE else i,
                np.nan,
            )
        history = audit.history
    np.testing.assert_array_equal(history.loss, losses)
    assert history.step.values.tolist() == list(range(2 * len(REFUSED)))


def test_a_hook_inside_a_traced_function() -> None:
    with RuleAuditCallback([]) as audit:
        watched = audit.watch(loss_fn)

        @jax.jit
        def step(params: Any, x: jax.Array) -> Any:
            loss, grads = jax.value_and_grad(watched)(params, x)
            audit.on_step({"loss": loss})
            return grads

        with pytest.raises(MetricsError) as error:
            step(PARAMS, BATCH)
        assert str(error.value).startswith("on_step was called inside a function that JAX traces")
