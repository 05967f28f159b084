"""Routers of every kind are found and described; what only looks like one is not, and it is said why."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from routed import D, E, K, KINDS, ROUTER, T, Kind, parameters, soft_top_k, tokens

from moe_rules_callback.tracing import discover_routers

PARAMS, X = parameters(), tokens()


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_router_is_found_and_described(kind: Kind) -> None:
    (router,) = discover_routers(kind.layer, PARAMS, X)
    assert router.name == ROUTER
    assert (router.experts, router.k) == (E, kind.k)
    assert (router.gate, router.kind) == (kind.gate, kind.kind)
    assert (router.noisy, router.biased) == (kind.noisy, kind.biased)
    assert router.expert_choice is kind.expert_choice
    assert router.layers == ()
    assert f"({kind.layer.__name__})" in router.source
