"""What a training step hands over, brought into one shape.

    {"loss": (), "router_probs": {"block_0": [batch, time, experts], ..}, "expert_index": {..}}

Router metrics (`router_probs` or `router_logits`, `expert_index`, `token_mask`) come as one array
[.., tokens, experts], as a list of arrays, as a (nested) mapping layer -> array, or stacked on the axis
`layer_axis`. All other leading axes are tokens; they are never flattened, for that would gather arrays
that are sharded on two of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .checks import REAL, is_of, narrow
from .errors import MetricsError
from .routers import Routers

PER_TOKEN = ("router_probs", "router_logits", "expert_index", "token_mask")
ROUTER_METRICS = (*PER_TOKEN, "expert_load")
TREES = ("params", "grads")


def collect(metrics: Mapping[str, Any], top_k: int | None, layer_axis: int | None) -> list[Routers]:
    """The router metrics of one step, one `Routers` for each array that was passed.

    They are not stacked: the probabilities of all layers can be the largest arrays of a step. Layers of a
    mapping stand in natural order (block_2 before block_10): its own order does not survive `jax.jit`.

    Raises:
        MetricsError: shapes or layer names that do not belong together.
    """
    arrays = {key: layers_of(metrics[key], key) for key in PER_TOKEN if key in metrics}
    main = arrays.get("router_probs") or arrays.get("router_logits") or {}
    if empty := [key for key, found in arrays.items() if not found]:
        raise MetricsError(
            f"{empty[0]} holds no array. Pass one for every layer with a router, or leave the key out."
        )
    if arrays.get("token_mask", {}).keys() == {"router"}:  # one mask for all layers
        arrays["token_mask"] = dict.fromkeys(main, arrays["token_mask"]["router"])
    for key, given in arrays.items():
        if odd := given.keys() ^ main.keys():
            raise MetricsError(
                f"{key} and the router probabilities name different layers: {', '.join(sorted(odd))} only on "
                f"one side. Pass both in the same form: two arrays, or two mappings with the same keys."
            )
    return [
        _routers(name, {key: given[name] for key, given in arrays.items()}, top_k, layer_axis)
        for name in sorted(main, key=natural)
    ]


def stacked_names(name: str, n: int) -> tuple[str, ...]:
    """Names of n layers that are stacked in one array."""
    stem = "layer" if name == "router" else name
    return tuple(f"{stem}_{i:0{len(str(n - 1))}}" for i in range(n))


def expert_counts(metrics: Mapping[str, Any]) -> set[int]:
    """The numbers of experts that the routers of a step have."""
    given = next((metrics[key] for key in ROUTER_METRICS if key in metrics), {})
    return {array.shape[-1] for array in layers_of(given, "router_probs").values()}


def scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics that are single real numbers (of Python, or of shape ()), in the order given."""
    return {
        key: value
        for key, value in metrics.items()
        if key not in ROUTER_METRICS + TREES
        and (isinstance(value, int | float) or (getattr(value, "shape", None) == () and is_of(value, *REAL)))
    }


def natural(name: str) -> list[str | int]:
    """Sort key that counts numbers by their value."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", name))]


def layers_of(value: Any, key: str, prefix: str = "") -> dict[str, Any]:
    """Flatten an array, a sequence or a nested mapping into layer name -> array."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for name, inner in value.items():
            found |= layers_of(inner, key, f"{prefix}/{name}" if prefix else str(name))
        return found
    if isinstance(value, Sequence) and not isinstance(value, str):
        width = len(str(len(value) - 1))
        names = (f"{prefix}/{i:0{width}}" if prefix else f"layer_{i:0{width}}" for i in range(len(value)))
        return {name: inner for name, each in zip(names, value, strict=True)
                for name, inner in layers_of(each, key, name).items()}  # fmt: skip
    if not hasattr(value, "shape"):
        raise MetricsError(
            f"{key}{' of ' + prefix if prefix else ''} is a {type(value).__name__}, not an array, a list of "
            f"arrays or a mapping layer -> array. If it is an object of a training framework, pass it as "
            f"'intermediates': moe_rules_callback.integrations knows some."
        )
    return {prefix or "router": value}


def _routers(name: str, given: dict[str, Any], top_k: int | None, layer_axis: int | None) -> Routers:
    lead = given["router_probs"] if "router_probs" in given else given["router_logits"]
    if lead.ndim < (2 if layer_axis is None else 3) or not lead.shape[-1]:
        stacked = "" if layer_axis is None else f" with the layers on axis {layer_axis}"
        raise MetricsError(
            f"the router array of {name} has shape {lead.shape}; expected [.., tokens, experts]{stacked}. "
            f"Pass the probabilities of all tokens, before experts are chosen."
        )
    tokens_shape = lead.shape[:-1]
    if layer_axis is not None:
        layer_axis = _axis_of_layers(layer_axis, lead.shape, name)

    def layered(key: str, axes: int) -> jax.Array | None:
        """[n, T, ..] of a metric whose shape is tokens_shape and `axes` more axes."""
        if key not in given:
            return None
        x = jnp.asarray(given[key])
        if layer_axis is not None and key == "token_mask" and x.ndim == len(tokens_shape) - 1:
            x = jnp.broadcast_to(jnp.expand_dims(x, layer_axis), tokens_shape)  # one for all layers
        if x.ndim != len(tokens_shape) + axes or x.shape[: len(tokens_shape)] != tokens_shape:
            raise MetricsError(
                f"{key} of {name} has shape {x.shape}, which does not belong to router probabilities of "
                f"shape {lead.shape}: all axes but the last must agree."
            )
        if key == "router_logits" and x.shape != lead.shape:
            raise MetricsError(
                f"router_logits of {name} have shape {x.shape}, and the probabilities {lead.shape}. Pass "
                f"those that the probabilities are computed from, or leave them out."
            )
        return x[None] if layer_axis is None else jnp.moveaxis(x, layer_axis, 0)

    probs, logits, index = layered("router_probs", 1), layered("router_logits", 1), layered("expert_index", 1)
    mask = layered("token_mask", 0)
    n, experts = (1 if layer_axis is None else lead.shape[layer_axis]), lead.shape[-1]
    k = top_k if index is None else index.shape[-1]
    if k is not None and not 1 <= k <= experts:
        raise MetricsError(
            f"{k} experts per token do not fit the {experts} experts of {name}. The last axis of "
            f"expert_index (or top_k) counts the experts that a token uses, that of router_probs all experts."
        )
    return Routers(
        (name,) if layer_axis is None else stacked_names(name, n),
        experts,
        k,
        None if probs is None else probs.astype(jnp.float32),
        None if logits is None else logits.astype(jnp.float32),
        None if index is None else narrow(index),
        None if mask is None else mask if mask.dtype == bool else mask > 0,
    )


def _axis_of_layers(axis: int, shape: tuple[int, ...], name: str) -> int:
    """The axis counted from the front."""
    found = axis + len(shape) if axis < 0 else axis
    if not 0 <= found < len(shape) - 1 or not shape[found]:
        raise MetricsError(
            f"layer_axis={axis} does not count layers in the router array of {name}, shape {shape}: "
            f"it is an axis before the last, which counts experts, and has a layer at least."
        )
    return found
