"""What a trainer hands over that is no number, no step and no router metric: refused here, in words.

What is merely a bad value (NaN, a negative probability, an index that is no expert) passes: it makes the
signals that rest on it NaN, and the rules over these UNKNOWN in that row.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .errors import MetricsError

REAL = (jnp.floating, jnp.integer, jnp.bool_)
_SCORES = "floating-point numbers [.., tokens, experts]. Indices of the experts chosen go to expert_index"
_DTYPES: dict[str, tuple[tuple[Any, ...], str]] = {
    "router_probs": ((jnp.floating,), _SCORES),
    "router_logits": ((jnp.floating,), _SCORES),
    "expert_index": ((jnp.integer,), "integers [.., tokens, k]"),
    "token_mask": (REAL, "booleans, or numbers above 0 where a token counts"),
    "expert_load": (REAL, "real numbers [experts]"),
}


def is_of(value: Any, *kinds: Any) -> bool:
    """Whether it has a dtype of these kinds; keys of random numbers and times have none of them."""
    dtype = getattr(value, "dtype", None)
    return isinstance(dtype, np.dtype) and _belongs(dtype, kinds)


@functools.cache  # it is asked at every step
def _belongs(dtype: np.dtype, kinds: tuple[Any, ...]) -> bool:
    return dtype.kind not in "mM" and any(jnp.issubdtype(dtype, kind) for kind in kinds)


def named(metrics: Any) -> dict[str, Any]:
    """The metrics without names and what is absent, which trainers' dictionaries also hold.

    Raises:
        MetricsError: they are no mapping, or one of something else than names.
    """
    if not isinstance(metrics, Mapping):
        raise MetricsError(
            f"the metrics are a {type(metrics).__name__}; expected a mapping such as "
            f"{{'loss': loss, 'router_probs': probs}}. Does the step return them, and in this place?"
        )
    if odd := [key for key in metrics if not isinstance(key, str)]:
        raise MetricsError(f"the metrics have the key {odd[0]!r}; a metric has a name, a text. Name it.")
    return {
        key: value for key, value in metrics.items() if not (value is None or isinstance(value, str | bytes))
    }


def check_dtypes(metrics: Mapping[str, Any]) -> None:
    """What cannot be meant is refused before it is cast to something that can.

    Raises:
        MetricsError: a router metric of another dtype than it has, or a list of numbers for an array.
    """
    for key, (kinds, expected) in _DTYPES.items():
        for path, leaf in jax.tree_util.tree_flatten_with_path(metrics.get(key))[0]:
            if is_of(leaf, *kinds):
                continue
            layer = jax.tree_util.keystr(path, simple=True, separator="/")
            dtype = getattr(leaf, "dtype", None)
            what = f"is a {type(leaf).__name__}" if dtype is None else f"has dtype {dtype}"
            raise MetricsError(
                f"{key}{' of ' + layer if layer else ''} {what}; expected {expected}. A list holds one array "
                f"for each layer, not numbers."
            )


def check_alive(metrics: Mapping[str, Any]) -> None:
    """What has no values any more is refused by its name.

    Raises:
        MetricsError: an array was donated or deleted.
    """
    for key, value in metrics.items():
        arrays = (leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, jax.Array))
        if any(array.is_deleted() for array in arrays if not isinstance(array, Tracer)):
            raise MetricsError(
                f"the values of '{key}' are gone: its array was donated to a jitted function, or deleted. "
                f"Call on_step before the function that it is donated to, or let the step return a copy."
            )


def real(value: Any, name: str) -> Any:
    """A metric as float32: of NumPy on the host, inf where it does not fit; what is of JAX stays there.

    Raises:
        MetricsError: it is no real number, nor an array of them.
    """
    if isinstance(value, int | float):
        try:
            return _float32(value)
        except OverflowError:  # beyond float64
            return np.float32(math.inf if value > 0 else -math.inf)
    array = value if isinstance(value, jax.Array) else np.asanyarray(value)
    if isinstance(array, np.ma.MaskedArray):
        array = array.filled(math.nan)
    if not is_of(array, *REAL):
        what = f"of dtype {array.dtype}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
        raise MetricsError(
            f"the metric '{name}' is {what}; expected a real number. Pass the number that is meant, or leave "
            f"the metric out."
        )
    return jnp.asarray(array, jnp.float32) if isinstance(array, jax.Array) else _float32(array)


@np.errstate(over="ignore")
def _float32(value: Any) -> Any:
    return np.float32(value)


def step_number(step: Any) -> int | jax.Array:
    """A step's number: an int, or an array of JAX as it is, since looking at it waits for the device.

    Raises:
        MetricsError: it is no whole number, or out of range.
    """
    if isinstance(step, jax.Array):
        if step.shape == () and is_of(step, jnp.integer):
            return step
    elif not isinstance(step, bool | np.bool_):
        try:
            if 0 <= (number := operator.index(step)) < 2**31:
                return number
        except TypeError:
            pass
    raise MetricsError(f"step is {step!r}; it is a whole number, at least 0 and below 2**31.")


def narrow(index: Any) -> Any:
    """Indices of 64 bits as int32; those that do not fit stay large: a cast might make them experts."""
    if index.dtype.itemsize <= 4:
        return index
    where, largest = np.where if isinstance(index, np.ndarray) else jnp.where, 2**31 - 1
    return where((index >= 0) & (index < largest), index, largest).astype(np.int32)
