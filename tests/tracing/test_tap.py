"""A tapped function returns what it returned before, to the bit, and the routers' probabilities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed import KINDS, ROUTER, Kind, parameters, tokens

from moe_rules_callback.tracing import tap

PARAMS, X = parameters(), tokens()


def assert_same_bits(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_values_and_gradients(kind: Kind) -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(kind.layer(params, x)).sum()

    plain, grads = jax.jit(jax.value_and_grad(loss))(PARAMS, X)
    (tapped, taps), tapped_grads = jax.jit(jax.value_and_grad(tap(loss), has_aux=True))(PARAMS, X)
    assert_same_bits((tapped, tapped_grads), (plain, grads))
    assert list(taps) == [ROUTER]
    np.testing.assert_allclose(taps[ROUTER], kind.expected(PARAMS, X), atol=1e-6)
