"""Taps in models that are pytrees: Equinox with functions among the leaves, Penzai with named axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed import logits_of, parameters, run_gathered, softmax, tokens

from moe_rules_callback.tracing import tap

PARAMS, X = parameters(), tokens()


def test_equinox() -> None:
    eqx = pytest.importorskip("equinox")

    class Layer(eqx.Module):
        gate: Any
        experts: dict[str, jax.Array]
        score: Callable[[jax.Array], jax.Array]  # a leaf that is no array

        def __call__(self, x):
            weights, index = jax.lax.top_k(self.score(jax.vmap(self.gate)(x)), 2)
            return run_gathered({"experts": self.experts}, x, weights, index)

    gate = eqx.nn.Linear(4, 8, use_bias=False, key=jax.random.key(0))
    gate = eqx.tree_at(lambda gate: gate.weight, gate, PARAMS["router"]["kernel"].T)
    layer = Layer(gate, PARAMS["experts"], jax.nn.softmax)

    def loss(layer, x):
        return jnp.square(layer(x)).sum()

    @eqx.filter_jit
    def step(layer, x):
        value, grads = eqx.filter_value_and_grad(loss)(layer, x)
        return value, eqx.apply_updates(layer, jax.tree.map(lambda g: -0.1 * g, grads))

    value, updated = step(layer, X)
    (tapped_value, tapped), taps = tap(step)(layer, X)
    assert eqx.tree_equal((tapped_value, tapped), (value, updated))
    assert list(taps) == ["gate/weight"]
    np.testing.assert_allclose(taps["gate/weight"], softmax(logits_of(PARAMS, X)), atol=1e-6)

    tapped_loss = eqx.filter_value_and_grad(tap(loss), has_aux=True)
    (inside, taps), _ = eqx.filter_jit(tapped_loss)(layer, X)
    assert inside == value
    assert list(taps) == ["gate/weight"]


def test_penzai() -> None:
    pz = pytest.importorskip("penzai.pz")
    kernel = pz.nx.wrap(PARAMS["router"]["kernel"]).tag("width", "experts")
    params = {"router": kernel, "experts": PARAMS["experts"]}

    def route(kernel, x):
        weights, index = jax.lax.top_k(jax.nn.softmax(x @ kernel), 2)
        return run_gathered(params, x, weights, index)

    def model(params, x):
        return pz.nx.nmap(route)(params["router"].untag("width", "experts"), x).unwrap()

    out, taps = jax.jit(tap(model))(params, X)
    np.testing.assert_array_equal(out, jax.jit(model)(params, X))
    assert list(taps) == ["router"]
    np.testing.assert_allclose(taps["router"], softmax(logits_of(PARAMS, X)), atol=1e-6)
