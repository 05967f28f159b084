"""Whatever the framework and the way in: the same model and data give the same records.

`MODELS` lists how a model shows its probabilities and the loops that train it, with the audit beside the
step or inside it. All are compared with plain JAX beside the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from moe_rules_callback.integrations.optax import audit_transform
from tiny_moe import (
    LAYERS,
    STEPS,
    TOP_K,
    LinenModel,
    LinenScanned,
    NnxModel,
    NnxScanned,
    make_batches,
    make_weights,
    mse,
    plain_model,
)

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.integrations import flax_linen, flax_nnx

RULES = {
    "unsure": "0.6 :: high_router_entropy & ~high_load_cv",
    "learning": "once[3](decreasing_loss) -> high_routing_confidence",
    "starved": "low_router_gradient_share | low_expert_gradient_min_share",
    "growing": "always[2](increasing_weight_norm) & ~high_expert_weight_cosine",
}


@dataclass(frozen=True)
class Shown:
    """A model and how it shows its probabilities.

    `start` makes parameters or an NNX module; `forward(start, x)` gives the output and the part of the
    metrics that is about routers.
    """

    start: Callable[[], Any]
    forward: Callable[[Any, jax.Array], tuple[jax.Array, dict[str, Any]]]
    layer_axis: int | None = None


def returned(model, x):
    y, probs = model(x)
    return y, {"router_probs": probs}


def linen(model, show="returned", layer_axis=None):
    def forward(params, x):
        if show == "returned":
            return returned(lambda x: model.apply({"params": params}, x), x)
        options = {"mutable": ["intermediates"], "capture_intermediates": show == "captured"}
        (y, _), updated = model.apply({"params": params}, x, **options)
        if show == "captured":
            return y, {"router_probs": flax_linen.router_probs(updated, "router/__call__")}
        return y, {"intermediates": updated}

    return Shown(model.weights, forward, layer_axis)


def popped(model, x):
    y, _ = model(x)
    return y, {"intermediates": nnx.pop(model, nnx.Intermediate)}


def captured(model, x):
    (y, _), intermediates = nnx.capture(model, nnx.Intermediate)(x)
    return y, {"intermediates": intermediates}


def captured_outputs(model, x):
    run = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
    (y, _), intermediates = run(x)
    return y, {"router_probs": flax_nnx.router_probs(intermediates, "router/__call__")}


def differentiated(forward, grad=jax.value_and_grad):
    """`(start, x, target) -> metrics of the step, gradients`."""

    def loss_fn(start, x, target):
        y, shown = forward(start, x)
        return mse(y, target), shown

    def compute(start, x, target):
        (loss, shown), grads = grad(loss_fn, has_aux=True)(start, x, target)
        return {"loss": loss, **shown}, grads

    return compute


def example_metrics(shown):
    _, example = shown.forward(shown.start(), make_batches()[0][0])
    return {"loss": jnp.zeros(()), **example}


def beside(audit, shown):
    compute = differentiated(shown.forward)

    @jax.jit
    def step(params, x, target):
        metrics, grads = compute(params, x, target)
        new_params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        return new_params, metrics | {"params": params, "grads": grads}

    params = shown.start()
    for x, target in make_batches():
        params, metrics = step(params, x, target)
        audit.on_step(metrics)


def inside_optax(audit, shown):
    compute = differentiated(shown.forward)
    tx = optax.chain(audit_transform(audit, example_metrics(shown)), optax.sgd(0.1))

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, x, target):
        metrics, grads = compute(params, x, target)
        updates, opt_state = tx.update(grads, opt_state, params, metrics=metrics)
        return optax.apply_updates(params, updates), opt_state

    params = shown.start()
    opt_state = tx.init(params)
    for x, target in make_batches():
        params, opt_state = step(params, opt_state, x, target)
        audit.drain(opt_state)


def inside_train_state(audit, shown):
    compute = differentiated(shown.forward)
    tx = optax.chain(audit_transform(audit, example_metrics(shown)), optax.sgd(0.1))

    @partial(jax.jit, donate_argnums=0)
    def step(state, x, target):
        metrics, grads = compute(state.params, x, target)
        return state.apply_gradients(grads=grads, metrics=metrics)

    state = flax_linen.AuditTrainState.create(apply_fn=None, params=shown.start(), tx=tx)
    for x, target in make_batches():
        state = step(state, x, target)
        audit.drain(state)


def beside_nnx(audit, shown):
    compute = differentiated(shown.forward, nnx.value_and_grad)

    @nnx.jit
    def step(model, optimizer, x, target):
        metrics, grads = compute(model, x, target)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
        return metrics | {"params": params, "grads": grads}

    model = shown.start()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    for x, target in make_batches():
        audit.on_step(step(model, optimizer, x, target))


def nnx_trainer(audit, shown):
    model = shown.start()
    tx = optax.chain(audit_transform(audit, example_metrics(shown)), optax.sgd(0.1))
    compute = differentiated(shown.forward, nnx.value_and_grad)

    def step(model, optimizer, x, target):
        metrics, grads = compute(model, x, target)
        optimizer.update(model, grads, metrics=metrics)

    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), step


def inside_nnx_jit(audit, shown):
    model, optimizer, step = nnx_trainer(audit, shown)
    step = nnx.jit(step)
    for x, target in make_batches():
        step(model, optimizer, x, target)
        audit.drain(optimizer)


def inside_split_and_merge(audit, shown):
    model, optimizer, step = nnx_trainer(audit, shown)
    graphdef, state = nnx.split((model, optimizer))

    @jax.jit
    def pure_step(state, x, target):
        model, optimizer = nnx.merge(graphdef, state)
        step(model, optimizer, x, target)
        return nnx.state((model, optimizer))

    for x, target in make_batches():
        state = pure_step(state, x, target)
        audit.drain(nnx.merge(graphdef, state))


def train(shown, loop):
    """The history of one training run."""
    with RuleAuditCallback(RULES, top_k=TOP_K, layer_axis=shown.layer_axis) as audit:
        loop(audit, shown)
    return audit.history


@cache
def reference():
    return train(PLAIN, beside)


def marks(name):
    if "captured" in name and name.startswith("nnx"):
        return pytest.mark.skipif(not hasattr(nnx, "capture"), reason="nnx.capture came with flax 0.12.6")
    return pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning") if "sown" in name else ()


PLAIN = Shown(make_weights, lambda weights, x: returned(lambda x: plain_model(weights, x), x))
MODELS = {
    "plain": (PLAIN, beside, inside_optax),
    "linen-returned": (linen(LinenModel()), beside),
    "linen-sown": (linen(LinenModel(sow_probs=True), "sown"), beside, inside_train_state),
    "linen-captured": (linen(LinenModel(), "captured"), beside),
    "linen-scan-sown": (linen(LinenScanned(), "sown", layer_axis=0), beside, inside_train_state),
    "nnx-returned": (Shown(NnxModel, returned), beside_nnx, inside_nnx_jit),
    "nnx-assigned": (Shown(lambda: NnxModel("assign"), popped), beside_nnx, inside_split_and_merge),
    "nnx-sown": (Shown(lambda: NnxModel("sow"), popped), beside_nnx),
    "nnx-captured": (Shown(lambda: NnxModel("sow"), captured), beside_nnx, inside_nnx_jit),
    "nnx-captured-outputs": (Shown(NnxModel, captured_outputs), beside_nnx),
    "nnx-scan-returned": (Shown(NnxScanned, returned, 0), beside_nnx),
    "nnx-scan-assigned": (Shown(lambda: NnxScanned("assign"), popped, 0), beside_nnx, inside_nnx_jit),
    "nnx-scan-captured": (Shown(lambda: NnxScanned("sow"), captured, 0), beside_nnx, inside_split_and_merge),
}
WAYS = [
    pytest.param(shown, loop, id=f"{name}-{loop.__name__}", marks=marks(name))
    for name, (shown, *loops) in MODELS.items()
    for loop in loops
]


@pytest.mark.parametrize(("shown", "loop"), WAYS)
def test_every_way_in_gives_the_same_records(shown, loop):
    history, expected = train(shown, loop), reference()
    assert history.sizes == expected.sizes
    for name in ("step", "truth", "truth_layer", "state", "signal_value", "expert_share", "loss"):
        np.testing.assert_allclose(history[name], expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_the_reference_has_something_to_tell():
    history = reference()
    assert dict(history.sizes) | {"step": STEPS, "layer": LAYERS, "rule": len(RULES)} == dict(history.sizes)
    assert np.isfinite(history.truth).all()
    assert np.unique(history.truth).size > STEPS
    assert history.loss[0] > history.loss[-1]
    assert (history.signal_value[..., 0] != history.signal_value[..., 1]).any()
