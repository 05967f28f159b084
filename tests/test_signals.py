"""Every signal of a router against its twin, its range, and values that everybody knows."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rules_callback.metrics import collect
from moe_rules_callback.signals import MODEL_SIGNALS, ROUTER_SIGNALS, WINDOW_SIGNALS, shipped
from moe_rules_callback.statistics import NEED_LOGITS, measure

OF_PROBS = [name for name, signal in ROUTER_SIGNALS.items() if not NEED_LOGITS & set(signal.needs)]
NEEDS = {need for name in OF_PROBS for need in ROUTER_SIGNALS[name].needs} - {"recent_load"}
T = 24


def compute(
    metrics: dict[str, Any], top_k: int | None = None, layer_axis: int | None = None
) -> dict[str, Any]:
    """Name -> values [layers + 1] of a single row, pooled last."""

    @jax.jit
    def signals(metrics):
        (statistics,) = measure(collect(metrics, top_k, layer_axis), NEEDS)
        statistics.values["recent_load"] = statistics["load"]
        return {name: ROUTER_SIGNALS[name].compute(statistics) for name in OF_PROBS}

    return jax.tree.map(np.asarray, signals(metrics))


def agree(got: dict[str, Any], layer: int, expected: dict[str, float], atol: float = 2e-6) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name][layer], value, rtol=1e-5, atol=atol, err_msg=name)


def softmax(shape: tuple[int, ...], seed: int, scale: float = 2.0) -> np.ndarray:
    z = scale * np.random.default_rng(seed).normal(size=shape)
    return (np.exp(z) / np.exp(z).sum(-1, keepdims=True)).astype(np.float32)


def choose(probs: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Indices that are not the k most probable: as a router with noise or a bias picks them."""
    noise = np.random.default_rng(seed).gumbel(size=probs.shape)
    return np.argsort(-(np.log(probs) + noise), axis=-1)[..., :k].astype(np.int32)


@pytest.mark.parametrize(
    ("experts", "k"), [(1, 1), (2, 1), (2, 2), (4, 2), (5, 4), (8, 1), (8, 3), (8, 8), (64, 6)]
)
@pytest.mark.parametrize("indexed", [True, False], ids=["expert_index", "top_k"])
def test_experts_and_k(experts: int, k: int, indexed: bool) -> None:
    probs = softmax((T, experts), seed=experts)
    index = choose(probs, k, seed=k) if indexed else None
    metrics = {"router_probs": probs} | ({"expert_index": index} if indexed else {})
    got = compute(metrics, None if indexed else k)
    agree(got, 0, naive.router_signals(probs, k, index))
    agree(got, 1, naive.router_signals(probs, k, index))  # one layer is its own pool


def test_sigmoid_affinities_are_normalised() -> None:
    affinity = (1 / (1 + np.exp(-np.random.default_rng(0).normal(size=(T, 8))))).astype(np.float32)
    agree(compute({"router_probs": affinity}, 2), 0, naive.router_signals(affinity, 2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_read_as_it_is(dtype: Any) -> None:
    probs = jnp.asarray(softmax((T, 8), 1), dtype)
    exact = np.asarray(probs, np.float32)
    index = choose(exact, 2, 0)
    agree(compute({"router_probs": probs, "expert_index": index}), 0, naive.router_signals(exact, 2, index))


def test_padding_is_left_out() -> None:
    probs, mask = softmax((T, 8), 2), np.arange(T) % 3 > 0
    index = choose(probs, 2, 0)
    got = compute({"router_probs": probs, "expert_index": index, "token_mask": mask})
    agree(got, 0, naive.router_signals(probs, 2, index, mask))


def test_layers_and_the_pool() -> None:
    """Every token counts once in the pool; a collapse in one layer is plain in that layer alone."""
    probs = softmax((3, 2, 12, 8), 3)  # [layers, batch, time, experts]
    probs[1] = np.eye(8)[0] * 0.93 + 0.07 / 8
    index = np.argsort(-probs, axis=-1)[..., :2]
    got = compute({"router_probs": probs, "expert_index": index}, layer_axis=0)
    for layer in range(3):
        agree(got, layer, naive.router_signals(probs[layer].reshape(T, 8), 2, index[layer].reshape(T, 2)))
    agree(got, 3, naive.router_signals(probs.reshape(-1, 8), 2, index.reshape(-1, 2)))


def test_one_expert_takes_everything() -> None:
    probs = np.tile(np.eye(8, dtype=np.float32)[5], (T, 1))
    got = {name: value[0] for name, value in compute({"router_probs": probs}, 1).items()}
    assert got["expert_imbalance"] == pytest.approx(1)
    assert got["load_cv"] == pytest.approx(math.sqrt(7))
    assert got["load_cv_normalised"] == pytest.approx(1)
    assert got["max_violation"] == pytest.approx(7)
    assert got["effective_experts"] == pytest.approx(1)
    assert got["dead_expert_fraction"] == pytest.approx(7 / 8)
    assert got["load_gini"] == pytest.approx(7 / 8)
    assert got["load_balancing_loss"] == pytest.approx(8)
    assert got["router_entropy"] == pytest.approx(0)
    assert got["routing_confidence"] == got["routing_margin"] == pytest.approx(1)


def test_perfect_balance_without_knowledge() -> None:
    """Uniform probabilities, loads dealt out evenly."""
    probs, index = np.full((T, 8), 1 / 8, np.float32), np.arange(2 * T).reshape(T, 2) % 8
    got = {name: value[0] for name, value in compute({"router_probs": probs, "expert_index": index}).items()}
    assert got["load_cv"] == got["load_gini"] == got["max_violation"] == pytest.approx(0, abs=1e-6)
    assert got["load_balancing_loss"] == pytest.approx(1)
    assert got["effective_experts"] == pytest.approx(8)
    assert got["router_entropy"] == pytest.approx(1)
    assert got["router_mutual_information"] == got["boundary_margin"] == pytest.approx(0, abs=1e-6)
    assert got["expert_coactivation"] == pytest.approx(1)  # 0 always with 1, 2 with 3, ..


def test_a_deterministic_balanced_router_knows_everything() -> None:
    got = compute({"router_probs": np.tile(np.eye(8, dtype=np.float32), (3, 1))}, 1)
    assert got["router_mutual_information"][0] == pytest.approx(1)


RANGES = {
    "router_entropy": (0, 1),
    "routing_confidence": (1 / 8, 1),
    "routing_margin": (0, 1),
    "boundary_margin": (-1, 1),  # below 0 where a bias or noise chooses
    "router_mutual_information": (0, 1),
    "load_cv": (0, math.sqrt(8 / 2 - 1)),
    "load_cv_normalised": (0, 1),
    "load_cv_living": (0, 1),
    "expert_imbalance": (0, 1),
    "max_violation": (0, 8 / 2 - 1),
    "effective_experts": (1, 8),
    "dead_expert_fraction": (0, 1),
    "load_gini": (0, 1 - 1 / 8),
    "load_balancing_loss": (0, 8),
    "expert_coactivation": (0, 1),
    "router_tokens": (T, T),
}


@jax.jit
def _of_eight(probs, index):
    (statistics,) = measure(collect({"router_probs": probs, "expert_index": index}, None, None), NEEDS)
    statistics.values["recent_load"] = statistics["load"]
    return {name: ROUTER_SIGNALS[name].compute(statistics)[0] for name in OF_PROBS}


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0, 500.0]), st.booleans())
def test_ranges(seed: int, scale: float, same: bool) -> None:
    """From uniform to saturated, tokens alike or not, selection by probability or by chance."""
    rng = np.random.default_rng(seed)
    z = scale * rng.normal(size=(1 if same else T, 8)) * np.ones((T, 1))
    probs = np.exp(z - z.max(-1, keepdims=True))
    probs = (probs / probs.sum(-1, keepdims=True)).astype(np.float32)
    by = probs if seed % 2 else rng.random(probs.shape)
    got = _of_eight(probs, np.argsort(-by, axis=-1, kind="stable")[:, :2])
    assert got.keys() == RANGES.keys()
    for name, (low, high) in RANGES.items():
        assert low - 1e-5 <= got[name] <= high + 1e-5, name


def test_shipped_names_are_those_of_the_field() -> None:
    assert shipped().keys() == ROUTER_SIGNALS.keys() | MODEL_SIGNALS.keys() | WINDOW_SIGNALS.keys()
    assert all(signal.long_name for signal in shipped().values())


@pytest.mark.parametrize("name", shipped())
def test_what_to_pass_for_a_signal(name: str) -> None:
    signal = shipped()[name]
    everything = frozenset({"loss", "validation_loss", "params", "grads", "router_probs", "router_logits"})
    assert signal.missing(everything, True) == ""
    assert signal.missing(frozenset(), True) != ""
    if name in ROUTER_SIGNALS:
        assert signal.missing(frozenset(), True) == "'router_probs' (or 'router_logits')"
        without_k = signal.missing(everything, False)
        assert without_k in ("", "'expert_index' or top_k=")
