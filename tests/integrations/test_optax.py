"""The gradient transformation: what the audit sees, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from moe_rules_callback.integrations.optax import audit_transform
from recorder import Recorder, find

from moe_rules_callback import Audit
from moe_rules_callback.errors import MetricsError

PARAMS = {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.3)}
EXAMPLE = {"loss": jnp.zeros(())}
AUDIT = audit_transform(Recorder(), EXAMPLE)  # type: ignore[arg-type]


def loss_fn(params, x):
    return jnp.sum((params["w"] * x + params["b"]) ** 2)


def train(tx, steps=3, **extra):
    """Parameters and optimizer state after `steps` jitted steps; inputs are 1, 2, 3, .."""

    @jax.jit
    def step(params, opt_state, x):
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        updates, opt_state = tx.update(grads, opt_state, params, metrics={"loss": loss}, **extra)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = PARAMS, tx.init(PARAMS)
    for i in range(steps):
        params, opt_state = step(params, opt_state, jnp.float32(i + 1))
    return params, opt_state


def grad_norm(opt_state):
    return np.linalg.norm(np.hstack(jax.tree.leaves(find(opt_state).metrics["grads"])))


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), a, b)


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.parametrize("position", [0, 1, 2])
def test_leaves_training_as_it_was_to_the_bit(position):
    audit = audit_transform(Audit(["high_gradient_norm & increasing_weight_norm -> high_loss"]), EXAMPLE)
    rest = [optax.clip_by_global_norm(0.5), optax.adam(1e-2)]
    bare, _ = train(optax.chain(*rest))
    audited, _ = train(optax.chain(*rest[:position], audit, *rest[position:]))
    assert_same_bits(audited, bare)


def test_sees_metrics_gradients_and_the_parameters_before_the_update():
    _, opt_state = train(optax.chain(AUDIT, optax.sgd(1e-3)), steps=1)
    seen = find(opt_state)
    loss, grads = jax.value_and_grad(loss_fn)(PARAMS, 1.0)
    assert seen.rows == 1
    np.testing.assert_allclose(seen.metrics["loss"], loss, rtol=1e-6)
    assert_same_bits(seen.metrics["params"], PARAMS)
    assert_close(seen.metrics["grads"], grads)


def test_place_in_the_chain_decides_which_gradients_are_seen():
    clip = optax.clip_by_global_norm(0.5)
    raw = grad_norm(train(optax.chain(AUDIT, clip, optax.sgd(1.0)), steps=1)[1])
    clipped = grad_norm(train(optax.chain(clip, AUDIT, optax.sgd(1.0)), steps=1)[1])
    assert raw > 1
    assert clipped == pytest.approx(0.5)


def test_inside_inject_hyperparams():
    make = optax.inject_hyperparams(lambda learning_rate: optax.chain(AUDIT, optax.sgd(learning_rate)))
    params, opt_state = train(make(learning_rate=1e-2))
    assert find(opt_state).rows == 3
    assert_close(params, train(optax.chain(optax.sgd(1e-2)))[0])


def test_inside_partition_sees_its_share_of_the_gradients():
    groups: dict[Hashable, Any] = {"audited": optax.chain(AUDIT, optax.sgd(1e-2)), "other": optax.sgd(1e-2)}
    _, opt_state = train(optax.partition(groups, {"w": "audited", "b": "other"}), steps=1)
    (grads,) = jax.tree.leaves(find(opt_state).metrics["grads"])
    np.testing.assert_allclose(grads, jax.grad(loss_fn)(PARAMS, 1.0)["w"], rtol=1e-6)


def test_inside_multi_steps_one_row_for_an_emitted_update():
    _, opt_state = train(optax.MultiSteps(optax.chain(AUDIT, optax.sgd(1e-2)), 2), steps=4)
    seen = find(opt_state)
    assert seen.rows == 2
    params, _ = train(optax.MultiSteps(optax.sgd(1e-2), 2), steps=2)
    third, fourth = (jax.grad(loss_fn)(params, x) for x in (3.0, 4.0))
    assert_close(seen.metrics["grads"], jax.tree.map(lambda a, b: (a + b) / 2, third, fourth))
    np.testing.assert_allclose(seen.metrics["loss"], loss_fn(params, 4.0), rtol=1e-6)


def test_outside_multi_steps_a_row_for_every_micro_batch():
    inner = optax.MultiSteps(optax.sgd(1e-2), 2).gradient_transformation()
    _, opt_state = train(optax.chain(AUDIT, inner), steps=4)
    assert find(opt_state).rows == 4


def test_inside_apply_if_finite_a_rejected_step_leaves_no_row():
    tx = optax.with_extra_args_support(optax.apply_if_finite(optax.chain(AUDIT, optax.sgd(1e-2)), 5))
    opt_state = tx.init(PARAMS)
    for gradient in (1.0, jnp.nan):
        grads = jax.tree.map(lambda p, g=gradient: jnp.full_like(p, g), PARAMS)
        _, opt_state = tx.update(grads, opt_state, PARAMS, metrics=EXAMPLE)
    assert find(opt_state).rows == 1


def test_abstract_example_metrics():
    tx = audit_transform(Recorder(), {"loss": jax.ShapeDtypeStruct((), jnp.float32)})  # type: ignore[arg-type]
    assert find(jax.eval_shape(tx.init, PARAMS)).rows.shape == ()


def test_other_extra_arguments_are_left_to_their_transformations():
    tx = optax.chain(AUDIT, optax.sgd(1e-2), optax.contrib.reduce_on_plateau())
    _, opt_state = train(tx, steps=2, value=1.0)
    assert find(opt_state).rows == 2


@pytest.mark.parametrize(("missing", "extra"), [("metrics", {}), ("params", {"metrics": EXAMPLE})])
def test_what_is_missing_is_named_with_the_call_that_passes_it(missing, extra):
    tx = optax.chain(AUDIT, optax.sgd(1e-2))
    with pytest.raises(MetricsError, match=rf"got no `{missing}`. Call tx.update\(grads, opt_state, params"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS if missing == "metrics" else None, **extra)
