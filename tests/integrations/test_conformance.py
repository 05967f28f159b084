"""Whatever the framework and the way in: the same model and data give the same records.

`MODELS` lists how a model shows its probabilities and the loops that train it, with the audit beside the
step or inside it; those of the frameworks in `OTHERS` are in a module `<framework>_moe` each. All are
compared with plain JAX beside the step.
"""

from __future__ import annotations

import importlib
from functools import partial
from importlib.util import find_spec

import jax
import numpy as np
import optax
import pytest
from conformance import (
    PLAIN,
    RULES,
    Shown,
    beside,
    differentiated,
    example_metrics,
    inside_optax,
    reference,
    returned,
    train,
)
from flax import nnx
from moe_rules_callback.integrations.optax import audit_transform
from tiny_moe import LAYERS, STEPS, LinenModel, LinenScanned, NnxModel, NnxScanned, make_batches

from moe_rules_callback.integrations import flax_linen, flax_nnx


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


def marks(name):
    if "captured" in name and name.startswith("nnx"):
        return pytest.mark.skipif(not hasattr(nnx, "capture"), reason="nnx.capture came with flax 0.12.6")
    return pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning") if "sown" in name else ()


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
OTHERS = ("equinox", "penzai", "haiku")
ABSENT = [framework for framework in OTHERS if find_spec(framework) is None]
for framework in OTHERS:
    if framework not in ABSENT:
        MODELS |= importlib.import_module(f"{framework}_moe").MODELS
WAYS = [
    pytest.param(shown, loop, id=f"{name}-{loop.__name__}", marks=marks(name))
    for name, (shown, *loops) in MODELS.items()
    for loop in loops
] + [pytest.param(None, None, id=name, marks=pytest.mark.skip(f"{name} is not installed")) for name in ABSENT]


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
