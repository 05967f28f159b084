"""Norms and similarities over parameter trees, by loops over the same experts laid out in other ways."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback import trees
from moe_rules_callback.errors import MissingSignalError

rng = np.random.default_rng(0)
UP, DOWN = rng.normal(size=(2, 4, 3, 5)).astype(np.float32)  # [layers.., E, d, f], of one layer each
UP[2] *= 0.1
UP, DOWN, BIAS = UP[:4], DOWN[:4], rng.normal(size=(4, 5)).astype(np.float32)


def flat(expert: int, biases: bool) -> np.ndarray:
    parts = [UP[expert].ravel(), DOWN[expert].ravel()] + ([BIAS[expert]] if biases else [])
    return np.concatenate(parts).astype(np.float64)


NORMS = [np.linalg.norm(flat(e, True)) for e in range(4)]
MIN_SHARE = min(NORMS) / max(NORMS)
PAIRS = [(flat(i, False), flat(j, False)) for i, j in combinations(range(4), 2)]
COSINE = sum(a @ b for a, b in PAIRS) / sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in PAIRS)


def one(expert: int) -> dict[str, np.ndarray]:
    return {"up": UP[expert], "down": DOWN[expert], "bias": BIAS[expert]}


LAYOUTS: dict[str, Any] = {
    "stacked": {"mlp": {"experts": {"up": UP, "down": DOWN, "bias": BIAS}}},
    "stacked, in a list of layers": {"layers": [{"experts": {"up": UP, "down": DOWN, "bias": BIAS}}]},
    "a list of experts": {"moe": {"experts": [one(e) for e in range(4)]}},
    "numbered keys": {"moe": {"experts": {str(e): one(e) for e in range(4)}}},
    "numbered names": {"moe": {f"expert_{e}": one(e) for e in range(4)}},
    "scanned layers": {"blocks": {"experts": {n: np.stack([x, x, x]) for n, x in
                                             (("up", UP), ("down", DOWN), ("bias", BIAS))}}},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_in_every_layout(layout: str) -> None:
    tree = {"embed": {"kernel": np.ones((4, 9), np.float32)}, **LAYOUTS[layout]}
    assert trees.expert_min_share(tree, {4}) == pytest.approx(MIN_SHARE, rel=1e-5)
    assert trees.expert_cosine(tree, {4}) == pytest.approx(COSINE, abs=1e-6)


def test_the_worst_layer_counts() -> None:
    dead, same = UP.copy(), UP.copy()
    dead[1], same[:] = 0, UP[0]
    tree = {"a": {"experts": {"w": UP}}, "b": {"experts": {"w": dead}}}
    assert trees.expert_min_share(tree, {4}) == 0
    tree = {"a": {"experts": {"w": UP}}, "b": {"experts": {"w": same}}}
    assert trees.expert_cosine(tree, {4}) == pytest.approx(1, abs=1e-6)
    scanned = {"experts": {"w": np.stack([UP, same])}}  # the axis of 2 counts layers, that of 4 experts
    assert trees.expert_cosine(scanned, {4}) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    "path", ["router", "gate", "gating", "router_weights", "noisy_router", "TopKRouter_0", "MoERouter"]
)
def test_router_share(path: str) -> None:
    tree = {"block": {path: {"kernel": np.full(3, 2.0, np.float32)}, "gate_proj": np.ones(4, np.float32)}}
    assert trees.router_share(tree) == pytest.approx(np.sqrt(12 / 16), rel=1e-6)


def test_a_key_with_slashes_is_several_parts() -> None:
    tree = {"model/~/router": {"w": np.full(1, 3.0, np.float32)}, "model/experts": {"w": UP}}
    assert trees.router_share(tree) == pytest.approx(3 / np.sqrt(9 + np.square(UP).sum()), rel=1e-6)
    assert trees.expert_min_share(tree, {4}) == trees.expert_min_share({"experts": UP}, {4})


@pytest.mark.parametrize("part", ["experts", "expert_0"])
def test_the_gate_of_an_expert_is_no_router(part: str) -> None:
    tree = {
        "router": np.full(1, 3.0, np.float32),
        part: {"gate": {"kernel": np.full((1, 1), 4.0, np.float32)}},
    }
    assert trees.router_share(tree) == pytest.approx(3 / 5)


def test_norm() -> None:
    tree = {
        "a": jnp.full((2, 3), 2.0, jnp.bfloat16),
        "b": [np.ones(4, np.float32), np.arange(3), jax.random.key(0)],  # integers and keys have no norm
        "c": {"count": 7},
    }
    assert trees.norm(tree) == pytest.approx(np.sqrt(4 * 6 + 4), rel=1e-6)
    assert trees.norm({}) == 0
    assert trees.norm({"a": np.full(100, 300, np.float16)}) == pytest.approx(
        3000
    )  # the square overflows float16


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    tree = {
        "router": np.array([bad, 1.0], np.float32),
        "experts": {"w": np.array([[[bad]], [[1.0]]], np.float32)},
    }
    for function in (trees.norm, trees.router_share):
        assert not np.isfinite(function(tree))
    assert not np.isfinite(trees.expert_min_share(tree, {2}))
    assert not np.isfinite(trees.expert_cosine(tree, {2}))
    elsewhere = {"router": np.ones(2, np.float32), "embed": np.array([bad], np.float32)}
    assert np.isnan(trees.router_share(elsewhere))  # not 0, which would read as a starved router


def test_gradients_of_zero() -> None:
    tree = {"router": np.zeros(3, np.float32), "experts": {"w": np.zeros((2, 3, 3), np.float32)}}
    assert trees.norm(tree) == trees.router_share(tree) == trees.expert_min_share(tree, {2}) == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            trees.router_share,
            "router_gradient_share finds no router in 'grads': no part of a path is 'router' or 'gate'. "
            "Paths look like dense/kernel. Pass the share as a scalar metric of that name instead.",
        ),
        (
            trees.expert_min_share,
            "expert_gradient_min_share finds no experts: no part of a parameter path is 'experts'. "
            "Paths look like dense/kernel. Pass the value as a scalar metric of that name instead.",
        ),
        (
            trees.expert_cosine,
            "expert_weight_cosine finds no experts: no part of a parameter path is 'experts'. "
            "Paths look like dense/kernel. Pass the value as a scalar metric of that name instead.",
        ),
    ],
)
def test_nothing_found(function: Any, message: str) -> None:
    with pytest.raises(MissingSignalError) as error:
        function({"dense": {"kernel": np.ones((2, 2), np.float32)}})
    assert str(error.value) == message
