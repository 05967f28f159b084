"""What a model has recorded on its way, by path -> router probabilities by layer.

    [(("blocks", 2, "moe", "router_probs"), (probs,))]  ->  {"blocks/2/moe": probs}

Flax, Haiku and Equinox record values under the path of a module: an array where it was assigned, a tuple
with one entry per call of the module where it was sown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moe_rules_callback.errors import MetricsError, closest

Entry = tuple[tuple[Any, ...], Any]  # path, value


def probs_by_layer(recorded: Iterable[Entry], name: str) -> dict[str, jax.Array]:
    """The entries called `name`.

    Args:
        recorded: pairs of a path and an array [.., tokens, experts] or a tuple of such arrays.
        name: last part of the path, or its last parts: `"router/__call__"`.

    Returns:
        Path of the module -> array [.., tokens, experts]. A module that was called several times
        (shared, or in a loop) is one layer that has seen the tokens of all its calls.

    Raises:
        MetricsError: nothing is called `name`, or what is called so is no array.
    """
    paths = {"/".join(map(str, path)): value for path, value in recorded}
    layers = {
        path.removesuffix(name).rstrip("/") or name: _joined(path, value)
        for path, value in paths.items()
        if f"/{path}".endswith(f"/{name}")
    }
    if not layers:
        raise MetricsError(
            f"No intermediate is called {name!r}; there are: {', '.join(sorted(paths))}."
            f"{closest(name, {path.rpartition('/')[2] for path in paths})}\n"
            f"Record the router's probabilities as {name!r}, or call this module's "
            "router_probs(intermediates, name=...) and pass its result as the metric `router_probs`."
        )
    return layers


def layer_name(path: Iterable[Any]) -> str:
    """Path of a node in a pytree, as `jax.tree_util` gives it: `blocks/2/router`."""
    return "/".join(str(key).strip(".[]'") for key in path)


def _joined(path: str, value: Any) -> jax.Array:
    calls = value if isinstance(value, tuple) else (value,)
    for call in calls:
        if getattr(call, "ndim", 0) < 2:
            raise MetricsError(
                f"The intermediate {path!r} holds {_described(call)}, not router probabilities "
                "[.., tokens, experts]. Record the probabilities alone, as one array, in each call."
            )
    if len(calls) == 1:
        return calls[0]
    if any(isinstance(call, jax.ShapeDtypeStruct) for call in calls):
        return jax.eval_shape(_concatenate, calls)
    return _concatenate(calls)


def _concatenate(calls: Sequence[jax.Array]) -> jax.Array:
    """Over the tokens."""
    return jnp.concatenate(calls, axis=-2)


def _described(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" if shape is None else f"an array of shape {shape}"
