"""Means over tokens: what one bad token does to them, and how layers are grouped and pooled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from moe_rules_callback.metrics import collect
from moe_rules_callback.statistics import NEED_LOGITS, STATISTICS, measure

NAMES = sorted(set(STATISTICS) - NEED_LOGITS)
OF_PROBS = sorted(set(NAMES) - {"load", "pairs"})  # with expert_index these two need no probabilities
rng = np.random.default_rng(0)
P = rng.dirichlet(np.ones(4), 6).astype(np.float32)
INDEX = np.argsort(-P, axis=-1)[:, :2].astype(np.int32)


@jax.jit
def _six(metrics: dict[str, Any]) -> dict[str, jax.Array]:
    (statistics,) = measure(collect(metrics, 2, None), NAMES)
    return {name: value[:-1] for name, value in statistics.values.items()}


def statistics(probs: Any, index: Any = None, mask: Any = None) -> dict[str, np.ndarray]:
    """Of one layer of 6 tokens over 4 experts: one program for each set of metrics."""
    given = {"router_probs": probs, "expert_index": index, "token_mask": mask}
    given = {key: np.asarray(x) for key, x in given.items() if x is not None}
    return {name: np.asarray(x)[0] for name, x in _six(given).items()}


@pytest.mark.parametrize(
    "row",
    [
        [-0.1, 0.5, 0.3, 0.3],
        [np.nan, 0.5, 0.3, 0.2],
        [0.2, 0.3, np.inf, 0.1],
        [-np.inf, 0.5, 0.3, 0.2],
        [0, 0, 0, 0],
        [3e38, 3e38, 3e38, 3e38],
    ],
    ids=["negative", "nan", "inf", "-inf", "all zero", "overflow"],
)
def test_a_token_that_is_no_distribution_makes_every_number_nan(row: list[float]) -> None:
    probs = P.copy()
    probs[3] = row
    for name, value in statistics(probs).items():
        assert np.isnan(value).all(), name
    for name, value in statistics(probs, INDEX).items():
        assert np.isnan(value).all() == (name in OF_PROBS), name


def test_such_a_token_does_no_harm_where_it_is_padding() -> None:
    probs, index, mask = P.copy(), INDEX.copy(), np.arange(6) != 3
    probs[3], index[3] = np.nan, -1
    got, clean = statistics(probs, index, mask), statistics(P, INDEX, mask)
    for name in NAMES:
        np.testing.assert_array_equal(got[name], clean[name], err_msg=name)


@pytest.mark.parametrize("bad", [-1, 4, 1000])
def test_an_index_that_is_no_expert_is_nan(bad: int) -> None:
    index = INDEX.copy()
    index[2, 1] = bad
    got = statistics(P, index)
    for name in ("load", "pairs", "boundary"):
        assert np.isnan(got[name]).all(), name
    assert np.isfinite(got["entropy"])


def test_an_expert_used_twice_by_a_token_counts_twice() -> None:
    """As hashing or sampling with replacement does: the load is a share of assignments."""
    got = statistics(P, np.tile([[1, 1]], (6, 1)))
    np.testing.assert_allclose(got["load"], [0, 1, 0, 0])
    np.testing.assert_allclose(got["pairs"], np.diag([0, 1, 0, 0]))


def test_no_tokens_left() -> None:
    for name, value in statistics(P, INDEX, np.zeros(6, bool)).items():
        assert np.isnan(value).all(), name


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint32, np.int32])
def test_dtypes_of_indices(dtype: Any) -> None:
    np.testing.assert_array_equal(statistics(P, INDEX.astype(dtype))["load"], statistics(P, INDEX)["load"])


def test_uint8_indices_of_256_experts() -> None:
    (routers,) = collect(
        {"router_probs": np.ones((2, 256)), "expert_index": np.array([[255], [0]], np.uint8)}, None, None
    )
    (measured,) = measure([routers], ["load"])
    np.testing.assert_array_equal(np.flatnonzero(measured["load"][0]), [0, 255])


def test_ties_go_to_the_first_expert_as_in_top_k() -> None:
    probs = np.full((6, 4), 0.25, np.float32)
    got = statistics(probs)
    np.testing.assert_allclose(got["load"], [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(got["first"], [1, 0, 0, 0])
    assert got["margin"] == got["boundary"] == 0
    _, index = jax.lax.top_k(probs, 2)
    np.testing.assert_array_equal(statistics(probs, index)["load"], got["load"])


def test_selection_without_index_is_top_k() -> None:
    got, expected = statistics(P), statistics(P, INDEX)
    for name in NAMES:
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-6, err_msg=name)


def test_layers_are_grouped_by_experts_and_k_and_pooled_by_tokens() -> None:
    q = rng.dirichlet(np.ones(4), 6).astype(np.float32)
    other = rng.dirichlet(np.ones(3), 6).astype(np.float32)
    mask = {"a": np.ones(6, bool), "b": np.ones(6, bool), "c": np.arange(6) < 2}
    routers = collect({"router_probs": {"a": P, "b": other, "c": q}, "token_mask": mask}, 2, None)
    groups = measure(routers, ["entropy", "load"])
    assert [(g.experts, g.k, g["load"].shape) for g in groups] == [(4, 2, (3, 4)), (3, 2, (2, 3))]
    entropies = [np.mean([naive.entropy(x) for x in rows]) for rows in (P, q[:2])]
    np.testing.assert_allclose(groups[0]["entropy"][:2], entropies, rtol=1e-5)
    np.testing.assert_allclose(groups[0]["entropy"][2], np.average(entropies, weights=[6, 2]), rtol=1e-5)


def test_logits() -> None:
    logits = rng.normal(size=(6, 4)).astype(np.float32)
    (measured,) = measure(collect({"router_logits": logits}, 2, None), NEED_LOGITS)
    expected = naive.logit_signals(logits)
    np.testing.assert_allclose(jnp.sqrt(measured["logit_square"][0]), expected["router_logit_rms"], rtol=1e-5)
    np.testing.assert_allclose(measured["log_partition_square"][0], expected["router_z_loss"], rtol=1e-5)


def test_a_layer_without_tokens_does_not_count_in_the_pool() -> None:
    probs = np.random.default_rng(0).dirichlet(np.ones(4), size=(2, 6)).astype(np.float32)
    some, none = np.ones(6, bool), np.zeros(6, bool)
    for masks, expected in (((some, none), probs[0].max(-1).mean()), ((none, none), np.nan)):
        by_layer = [dict(zip("ab", values, strict=True)) for values in (probs, masks)]
        routers = collect({"router_probs": by_layer[0], "token_mask": by_layer[1]}, None, None)
        (measured,) = measure(routers, ["confidence"])
        np.testing.assert_allclose(measured["confidence"][-1], expected, rtol=1e-6)
