"""What the conformance suite runs: rules, how a model shows its probabilities, loops, the reference run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from moe_rules_callback.integrations.optax import audit_transform
from tiny_moe import TOP_K, make_batches, make_weights, mse, plain_model

from moe_rules_callback import RuleAuditCallback

RULES = {
    "unsure": "0.6 :: high_router_entropy & ~high_load_cv",
    "learning": "once[3](decreasing_loss) -> high_routing_confidence",
    "starved": "low_router_gradient_share | low_expert_gradient_min_share",
    "growing": "always[2](increasing_weight_norm) & ~high_expert_weight_cosine",
}


@dataclass(frozen=True)
class Shown:
    """A model and how it shows its probabilities.

    `start` makes parameters or a model; `forward(start, x)` gives the output and the part of the metrics
    that is about routers.
    """

    start: Callable[[], Any]
    forward: Callable[[Any, jax.Array], tuple[jax.Array, dict[str, Any]]]
    layer_axis: int | None = None


def returned(model, x):
    y, probs = model(x)
    return y, {"router_probs": probs}


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


def train(shown, loop):
    """The history of one training run."""
    with RuleAuditCallback(RULES, top_k=TOP_K, layer_axis=shown.layer_axis) as audit:
        loop(audit, shown)
    return audit.history


PLAIN = Shown(make_weights, lambda weights, x: returned(lambda x: plain_model(weights, x), x))


@cache
def reference():
    return train(PLAIN, beside)
