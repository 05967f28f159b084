"""Router probabilities from Equinox.

What the model returns needs no adapter. Without touching the model, say where its routers are:

    def loss_fn(model, x, y):
        run = capture(model, lambda model: [block.router for block in model.blocks])
        predicted, probs = jax.vmap(run)(x)                     # called as you would call `model`
        return jnp.mean((predicted - y) ** 2), probs

    (loss, probs), grads = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, x, y)
    audit.on_step({"loss": loss, "router_probs": probs})

The capture goes inside your vmap, as above. Out of a vmap, scan or checkpoint of the model's own it cannot
see; `moe_rules_callback.tracing.tap(loss_fn)` does.

A model that keeps its probabilities in an `eqx.nn.State` (equinox >= 0.13.1; a batch has one size) hands
that over:

    self.router_probs = eqx.nn.StateIndex(jnp.zeros((tokens, experts)))      # in the router
    state = state.set(self.router_probs, probs)
    audit.on_step({"loss": loss, "intermediates": state})

A model has leaves that are no arrays, activations for instance, so rules about parameters, and optax, are
given `params = eqx.filter(model, eqx.is_inexact_array)`. Inside the step:

    tx = optax.chain(audit_transform(audit, example_metrics), optax.adamw(3e-4))
    opt_state = tx.init(params)
    updates, opt_state = tx.update(grads, opt_state, params, metrics={"loss": loss, "router_probs": probs})
    model = eqx.apply_updates(model, updates)
    audit.drain(opt_state)                                                   # in the loop

Orbax saves and restores arrays, and with the optimizer's state the audit's, see `optax`:

    manager.save(step, args=ocp.args.StandardSave(eqx.filter((model, opt_state), eqx.is_array)))
    model, opt_state = eqx.combine(restored, (model, opt_state))
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.hookspecs import hookimpl

from ._sown import layer_name, probs_by_layer

try:
    from jax.extend.core import get_opaque_trace_state
except ImportError:  # where it was before
    from jax.core import get_opaque_trace_state


class _Recording(eqx.Module):
    """A router that notes what it returns; anything else asked of it is answered by the router."""

    router: Any
    note: Callable[[Any], None] = eqx.field(static=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        probs = self.router(*args, **kwargs)
        self.note((probs, get_opaque_trace_state()))
        return probs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.router, name)


def capture(model: Any, where: Callable[[Any], Any]) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """A function that calls `model` and also returns what its routers returned.

    Args:
        model: any callable pytree. It is not changed.
        where: of the model, its routers: a module, or a sequence of modules, as for `eqx.tree_at`.

    Returns:
        `run(*args, **kwargs) -> (output, {path: array})`; a path reads `blocks/0/router`. An array is what
        the router returned; of a router that is called several times, all of it, joined over tokens.

    Raises:
        MetricsError: by `run`: a router was not called, was called inside a transformation of the model's
            own, or returned something else than an array.
    """
    routers = jax.tree.leaves(where(model), is_leaf=lambda node: isinstance(node, eqx.Module))

    def is_router(node: Any) -> bool:
        return any(node is router for router in routers)

    def run(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, jax.Array]]:
        calls: dict[str, list[Any]] = {}

        def recording(path: Any, node: Any) -> Any:
            return (
                _Recording(node, calls.setdefault(layer_name(path), []).append) if is_router(node) else node
            )

        y = jax.tree_util.tree_map_with_path(recording, model, is_leaf=is_router)(*args, **kwargs)
        return y, {layer: _joined(layer, noted) for layer, noted in calls.items()}

    return run


def router_probs(state: eqx.nn.State, name: str = "router_probs") -> dict[str, jax.Array]:
    """Router probabilities by layer, from the state of a model.

    Args:
        state: made by `eqx.nn.make_with_state`, after the call of the model.
        name: the attribute that holds the `StateIndex`.

    Returns:
        Path of the module, such as `blocks/0/router` -> array [.., tokens, experts].

    Raises:
        MetricsError: nothing of that name, or something else than arrays.
    """
    values, paths = state.tree_flatten()  # a path reads "Model.blocks[0].router_probs"
    recorded = (
        (tuple(re.findall(r"\w+", str(path)))[1:], value) for path, value in zip(paths, values, strict=True)
    )
    return probs_by_layer(recorded, name)


@hookimpl
def find_router_probs(source: Any) -> dict[str, jax.Array] | None:
    """Take part in `find_router_probs` for any `eqx.nn.State`."""
    return router_probs(source) if isinstance(source, eqx.nn.State) else None


def _joined(layer: str, calls: list[tuple[Any, Any]]) -> jax.Array:
    """All calls of a router, over tokens. A single token [experts], under a vmap, stays as it is."""
    if not calls:
        fault = "was not called"
    elif any(trace != get_opaque_trace_state() for _, trace in calls):
        fault = "was called inside a transformation of the model's own (vmap, scan, checkpoint, jit)"
    elif not all(eqx.is_array(probs) for probs, _ in calls):
        fault = f"returned a {type(calls[0][0]).__name__}, not an array"
    elif len(calls) == 1:
        return calls[0][0]
    else:
        return jnp.concatenate([jnp.atleast_2d(probs) for probs, _ in calls], axis=-2)
    raise MetricsError(
        f"The router {layer!r} {fault}. Let `where` point at modules that the model calls itself and that "
        "return the probabilities [.., tokens, experts] alone, or use "
        "moe_rules_callback.tracing.tap(loss_fn), which sees into transformations."
    )
