"""When a trace of a jitted function serves another call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback.tracing.arguments import Arguments

X = jnp.ones((2, 3))


def of(*args: Any, **kwargs: Any) -> Arguments:
    return Arguments(lambda *args, **kwargs: None, args, kwargs)


@pytest.mark.parametrize(
    ("other", "serves"),
    [
        (of(X + 1, 3, scale={"a": X}), True),
        (of(np.ones((2, 3), np.float32), 3, scale={"a": X}), True),
        (of(jax.ShapeDtypeStruct((2, 3), jnp.float32), 3, scale={"a": X}), True),
        (of(X, 4, scale={"a": X}), False),
        (of(3, X, scale={"a": X}), False),  # the same leaves elsewhere
        (of(X, X, scale={"a": 3}), False),
        (of(X, 3, scale={"b": X}), False),
        (of(X, 3, scale={"a": X, "b": X}), False),
        (of(X, 3), False),
        (of(X.T, 3, scale={"a": X}), False),
        (of(X.astype(jnp.bfloat16), 3, scale={"a": X}), False),
        (of(jnp.broadcast_to(jnp.asarray(1.0), (2, 3)), 3, scale={"a": X}), False),  # weakly typed
    ],
)
def test_serve(other: Arguments, serves: bool) -> None:
    first = of(X, 3, scale={"a": X})
    for known in (first, first.abstract()):
        assert known.serve(known)
        assert known.serve(other) is serves
        assert known.serve(first)  # whatever it served since


def test_names_are_those_of_the_call_also_without_it() -> None:
    arguments = Arguments(lambda params, x: None, ({"w": X, "b": X},), {"x": X})
    assert arguments.abstract().names == arguments.names == ["b", "w", "x"]
