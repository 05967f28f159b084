"""Trainings that the tests of resumed runs kill and resume, one for each integration.

training = WAYS["optax"](audit)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import optax
from conformance import PLAIN, Shown, differentiated, example_metrics, returned
from flax import nnx
from moe_rules_callback.integrations.optax import audit_transform
from resuming import Training, batch
from tiny_moe import TOP_K, LinenModel, NnxModel, make_weights, plain_model

from moe_rules_callback import RouterProbe, RuleAuditCallback
from moe_rules_callback.integrations import flax_linen


def pure(audit: RuleAuditCallback) -> Training:
    """`audit.init` and `audit.update`, and a probe beside them."""
    probe = RouterProbe(_route, top_k=TOP_K, every=6, reference=make_weights())
    compute, (_, metrics) = differentiated(PLAIN.forward), PLAIN.forward(make_weights(), batch(0)[0])
    weights = make_weights()
    scalars = dict.fromkeys(("routing_flip_rate", "router_saturation", "router_noise_repetition"), 0.0)
    scalars |= {"router_probe_age": 0.0, "loss": 0.0}
    carry = {"params": weights, "probe": probe.init(weights), "audit": audit.init(metrics | scalars)}

    @partial(jax.jit, donate_argnums=0)
    def step(carry, x, target):
        metrics, grads = compute(carry["params"], x, target)
        number = carry["audit"].step + 1
        key = jax.random.fold_in(jax.random.key(0), number)
        probed, scalars = probe.update(carry["probe"], number, carry["params"], key)
        params = jax.tree.map(lambda p, g: p - 0.01 * g, carry["params"], grads)
        state = audit.update(carry["audit"], metrics | scalars)
        return {"params": params, "probe": probed, "audit": state}

    return Training(carry, step)


def _route(weights, key):
    x = batch(0)[0]
    logits = [x @ layer["router"]["kernel"] for layer in weights]
    return logits if key is None else [a + 0.1 * jax.random.normal(key, a.shape) for a in logits]


def in_optax(shown: Shown, audit: RuleAuditCallback) -> Training:
    compute = differentiated(shown.forward)
    tx = optax.chain(audit_transform(audit, example_metrics(shown)), optax.adam(1e-2))

    @partial(jax.jit, donate_argnums=0)
    def step(carry, x, target):
        metrics, grads = compute(carry["params"], x, target)
        updates, opt_state = tx.update(grads, carry["opt_state"], carry["params"], metrics=metrics)
        return {"params": optax.apply_updates(carry["params"], updates), "opt_state": opt_state}

    params = shown.start()
    return Training({"params": params, "opt_state": tx.init(params)}, step)


def bfloat16() -> Any:
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_weights())


def linen(audit: RuleAuditCallback) -> Training:
    model = LinenModel(sow_probs=True)

    def forward(params, x):
        (y, _), updated = model.apply({"params": params}, x, mutable=["intermediates"])
        return y, {"intermediates": updated}

    shown = Shown(model.weights, forward)
    compute = differentiated(forward)
    tx = optax.chain(audit_transform(audit, example_metrics(shown)), optax.adam(1e-2))

    @partial(jax.jit, donate_argnums=0)
    def step(state, x, target):
        metrics, grads = compute(state.params, x, target)
        return state.apply_gradients(grads=grads, metrics=metrics)

    state = flax_linen.AuditTrainState.create(apply_fn=model.apply, params=model.weights(), tx=tx)
    return Training(state.replace(step=jnp.int32(0)), step)


def _nnx(audit: RuleAuditCallback) -> tuple[Any, Any, Callable[..., Any]]:
    shown = Shown(NnxModel, returned)
    compute = differentiated(shown.forward, nnx.value_and_grad)
    tx = optax.chain(audit_transform(audit, example_metrics(shown)), optax.adam(1e-2))
    model = shown.start()

    def step(model, optimizer, x, target):
        metrics, grads = compute(model, x, target)
        optimizer.update(model, grads, metrics=metrics)

    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), step


def in_nnx(audit: RuleAuditCallback) -> Training:
    model, optimizer, update = _nnx(audit)
    update = nnx.jit(update)

    def step(carry, x, target):
        update(*carry, x, target)
        return carry

    def put(carry, arrays):
        nnx.update(carry, arrays)
        return carry

    return Training((model, optimizer), step, nnx.state, put, lambda carry: carry[1])


def in_split_nnx(audit: RuleAuditCallback) -> Training:
    model, optimizer, update = _nnx(audit)
    graphdef, state = nnx.split((model, optimizer))

    @partial(jax.jit, donate_argnums=0)
    def step(state, x, target):
        model, optimizer = nnx.merge(graphdef, state)
        update(model, optimizer, x, target)
        return nnx.state((model, optimizer))

    return Training(state, step, drained=lambda state: nnx.merge(graphdef, state))


def in_equinox(audit: RuleAuditCallback) -> Training:
    import equinox as eqx
    from equinox_moe import Model, captured, floats

    shown = Shown(Model, captured)
    compute = differentiated(captured, eqx.filter_value_and_grad)
    tx = optax.chain(audit_transform(audit, example_metrics(shown)), optax.adam(1e-2))

    @eqx.filter_jit(donate="all")
    def update(carry, x, target):
        model, opt_state = carry
        metrics, grads = compute(model, x, target)
        updates, opt_state = tx.update(grads, opt_state, floats(model), metrics=metrics)
        return eqx.apply_updates(model, updates), opt_state

    model = Model()
    return Training(
        (model, tx.init(floats(model))),
        update,
        lambda carry: eqx.filter(carry, eqx.is_array),
        lambda carry, arrays: eqx.combine(arrays, carry),
    )


def _shown_in(module: str, name: str) -> Callable[[RuleAuditCallback], Training]:
    return lambda audit: in_optax(importlib.import_module(module).MODELS[name][0], audit)


WAYS: dict[str, Callable[[RuleAuditCallback], Training]] = {
    "pure": pure,
    "optax": partial(in_optax, PLAIN),
    "optax-bfloat16": partial(in_optax, Shown(bfloat16, lambda w, x: returned(partial(plain_model, w), x))),
    "linen": linen,
    "nnx": in_nnx,
    "nnx-split": in_split_nnx,
    "equinox": in_equinox,
    "penzai": _shown_in("penzai_moe", "penzai-captured"),
    "haiku": _shown_in("haiku_moe", "haiku-recorded"),
}
PRESENT = [name for name in WAYS if name not in ("equinox", "penzai", "haiku") or find_spec(name)]
