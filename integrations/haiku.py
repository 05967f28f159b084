"""Router probabilities from Haiku, by way of its state.

What the model returns needs no adapter. Without touching the model, say which modules are its routers:

    def forward(x):
        with recording(lambda module: isinstance(module, Router)):
            return Model()(x)

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = model.init(key, x)
    y, state = model.apply(params, state, x)
    audit.on_step({"loss": loss, "intermediates": state})

or record in the router itself: `hk.set_state("router_probs", probs)`. Out of `hk.layer_stack` come arrays
with a leading layer axis: `RuleAuditCallback(rules, layer_axis=0)`. Of a router that is called several
times the last call counts. Other state, of a batch norm for instance, is passed over.

Inside the step parameters are a plain pytree, as optax and `audit_transform` take them:

    example = {"loss": jnp.zeros(()), "intermediates": state}
    tx = optax.chain(audit_transform(audit, example), optax.adamw(3e-4))
    metrics = {"loss": loss, "intermediates": state}
    updates, opt_state = tx.update(grads, opt_state, params, metrics=metrics)
    audit.drain(opt_state)                                                  # in the loop

Orbax saves and restores `opt_state` with the parameters, and in it the audit's state, see `optax`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import haiku as hk
import jax

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.hookspecs import hookimpl

from ._sown import probs_by_layer


def recording(is_router: Callable[[hk.Module], bool]) -> AbstractContextManager[Any]:
    """A context in which what routers return becomes their state `router_probs`.

    Args:
        is_router: of a module, whether its `__call__` returns router probabilities [.., tokens, experts]. It
            may ask for the class or for `module.name`.
    """

    def record(call: Callable[..., Any], args: Any, kwargs: Any, context: hk.MethodContext) -> Any:
        returned = call(*args, **kwargs)
        if context.method_name == "__call__" and is_router(context.module):
            hk.set_state("router_probs", returned)
        return returned

    return hk.intercept_methods(record)


def router_probs(state: Mapping[str, Any], name: str = "router_probs") -> dict[str, jax.Array]:
    """Router probabilities by layer, from the state that `apply` returned.

    Args:
        state: module -> name -> value.
        name: the name given to `hk.set_state`.

    Returns:
        Name of the module, such as `model/block_0/router` -> array [.., tokens, experts].

    Raises:
        MetricsError: there is nothing, nothing of that name, or something else than arrays.
    """
    if not state:
        raise MetricsError(
            "Haiku's state is empty: no router has recorded anything. Call the model inside "
            "recording(is_router) in the function given to hk.transform_with_state, and pass the state that "
            "apply returns."
        )
    recorded = [
        ((module, key), (value,)) for module, values in state.items() for key, value in values.items()
    ]
    return probs_by_layer(recorded, name)


@hookimpl
def find_router_probs(source: Any) -> dict[str, jax.Array] | None:
    """Take part in `find_router_probs` for a state in which a module has recorded an array `router_probs`."""
    if not isinstance(source, dict) or not all(isinstance(values, dict) for values in source.values()):
        return None
    recorded = any(hasattr(values.get("router_probs"), "shape") for values in source.values())
    return router_probs(source) if recorded else None
