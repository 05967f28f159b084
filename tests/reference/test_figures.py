"""Figures against counting by hand."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback.plots import read_affinity
from reference import figures

# 6 tokens of two domains, 3 experts, 2 a token.
EXPERTS = jnp.array([[0, 1], [0, 2], [1, 0], [2, 1], [2, 0], [2, 1]])
DOMAIN = jnp.array([0, 0, 0, 1, 1, 1])


def test_tally_counts_choices_by_rank_domain_and_expert():
    expected = np.zeros((2, 2, 3))
    for experts, domain in zip(np.asarray(EXPERTS), np.asarray(DOMAIN), strict=True):
        for rank, expert in enumerate(experts):
            expected[rank, domain, expert] += 1
    np.testing.assert_array_equal(figures.tally(EXPERTS, DOMAIN, 2, 3), expected)


def test_routing_figures_by_hand():
    table = figures.tally(EXPERTS, DOMAIN, 2, 3)
    # Domain 0 chooses expert 0 first twice of three times, domain 1 expert 2 always.
    assert float(figures.routing_accuracy(table)) == pytest.approx(5 / 6)
    assert float(figures.busiest_expert_share(table)) == pytest.approx(3 / 6)
    # Expert 0 is used by all tokens of domain 0, expert 2 by all of domain 1.
    assert float(figures.domain_specialisation(table)) == pytest.approx(1)


def test_uniform_routing_gives_the_baselines():
    table = jnp.full((2, 3, 8), 5.0)
    assert float(figures.routing_accuracy(table)) == pytest.approx(1 / 8)
    assert float(figures.domain_specialisation(table)) == pytest.approx(2 / 8)


def test_a_domain_without_tokens_is_left_out():
    table = figures.tally(EXPERTS[:3], DOMAIN[:3], 2, 3)
    assert float(figures.domain_specialisation(table)) == pytest.approx(1)
    assert float(figures.routing_accuracy(table)) == pytest.approx(2 / 3)


def test_of_routing_reports_the_worst_layer():
    even = jnp.full((1, 1, 4), 25.0)
    uneven = jnp.array([[[60.0, 38.0, 2.0, 0.0]]])
    got = figures.of_routing(jnp.stack([even, uneven]))
    assert got["experts_used"] == 2
    assert got["least_expert_share"] == 0
    assert got["routing_accuracy"] == pytest.approx((0.25 + 0.6) / 2)


def test_the_affinity_of_domains_is_what_plots_read(tmp_path):
    table = figures.tally(EXPERTS, DOMAIN, 3, 3)  # no token of the third domain
    figures.write_affinity(tmp_path / "affinity.csv", table[None], ["prose", "code", "none"])
    affinity = read_affinity(tmp_path / "affinity.csv")
    assert affinity.rows == ["layer_0 prose", "layer_0 code", "layer_0 none"]
    assert affinity.experts == ["expert_0", "expert_1", "expert_2"]
    want = [[1 / 2, 1 / 3, 1 / 6], [1 / 6, 1 / 3, 1 / 2], [np.nan] * 3]
    np.testing.assert_allclose(affinity.values, want, atol=1e-4)


def test_text_entropy_of_alternating_and_of_independent_bytes():
    alternating = np.frombuffer(b"ab" * 5000, np.uint8)
    unigram, bigram = figures.text_entropy([alternating])
    assert unigram == pytest.approx(math.log(2), abs=1e-6)
    assert bigram == pytest.approx(0, abs=1e-3)
    independent = np.random.default_rng(0).integers(0, 4, 200_000).astype(np.uint8)
    assert figures.text_entropy([independent]) == pytest.approx((math.log(4), math.log(4)), abs=1e-3)


def test_text_entropy_counts_a_short_text_as_much_as_a_long_one():
    constant, other = np.zeros(10_000, np.uint8), np.ones(100, np.uint8)
    assert figures.text_entropy([constant, other])[0] == pytest.approx(math.log(2))
