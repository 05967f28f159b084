"""Sampling noise: against drawing batches again and again, and what it makes of intervals."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback import Predicate, RuleAuditCallback, Rulebook, State, parse_rule
from moe_rules_callback.records import Records
from moe_rules_callback.replay import replay, replay_history
from moe_rules_callback.signals import ROUTER_SIGNALS

X = jnp.float32(0.3)
EVEN: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    # of loads [draws, E]: root mean square of what even routing gives by chance
    "load_cv": lambda q, e, k: q.std(-1) / q.mean(-1),
    "load_cv_normalised": lambda q, e, k: q.std(-1) / q.mean(-1) / np.sqrt(e / k - 1),
}


def drawn(tokens: int, experts: int, k: int, draws: int = 400) -> np.ndarray:
    """Loads [draws, E] where each token takes k experts by chance."""
    order = np.random.default_rng(0).random((draws, tokens, experts)).argsort(-1)[..., :k]
    return (order[..., None] == np.arange(experts)).sum((1, 2)) / (tokens * k)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(32, 8, 1), (64, 8, 2), (16, 4, 3)])
def test_noise_of_even_loads(tokens: int, experts: int, k: int) -> None:
    loads = drawn(tokens, experts, k)
    for name, of in EVEN.items():
        noise = ROUTER_SIGNALS[name].noise
        assert noise is not None
        expected = np.sqrt(np.square(of(loads, experts, k)).mean())
        assert float(noise(X, jnp.float32(tokens), experts, k)) == pytest.approx(expected, rel=0.1)


def test_noise_of_the_busiest_expert_is_not_less_than_what_chance_gives() -> None:
    loads = drawn(64, 8, 2)
    noise = ROUTER_SIGNALS["max_violation"].noise
    assert noise is not None
    by_chance = loads.max(-1) / loads.mean(-1) - 1
    assert np.median(by_chance) < float(noise(X, jnp.float32(64), 8, 2)) < 2.5 * by_chance.mean()


def test_noise_of_a_mean_bounds_that_of_any_numbers_in_0_to_1() -> None:
    rng = np.random.default_rng(1)
    noise = ROUTER_SIGNALS["routing_confidence"].noise
    assert noise is not None
    for a, b in ((0.2, 0.2), (1, 3), (8, 2)):
        values = rng.beta(a, b, (2000, 25))
        bound = float(noise(jnp.float32(values.mean()), jnp.float32(25), 8, 2))
        assert values.mean(1).std() <= bound * 1.05


P = {
    "uneven": Predicate("load_cv", "high", 0.5, 12.0, 0.02, sampling=2.0),
    "uneven_0": Predicate("load_cv", "high", 0.5, 12.0, 0.02),
    "falling": Predicate("router_entropy", "decreasing", sampling=2.0),
}
BOOK = Rulebook("test", tuple(parse_rule(name, name) for name in P), P)


def routed(tokens: int, rows: int = 1) -> np.ndarray:
    """Probabilities [rows, tokens, 8] of a router that prefers two experts."""
    logits = np.random.default_rng(0).gumbel(size=(rows, tokens, 8)) + np.array([4, 4, 0, 0, 0, 0, 0, 0])
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def row(records: Records, name: str) -> tuple[np.ndarray, int]:
    i = records.schema.rule_names.index(name)
    return records.truth[0, i], int(records.state[0, i])


def test_few_tokens_make_a_wide_interval_and_no_verdict() -> None:
    few, many = (replay({"router_probs": routed(n)}, BOOK, top_k=2) for n in (4, 4096))
    (lower, upper), state = row(few, "uneven")
    assert state == State.UNKNOWN
    assert row(few, "uneven_0")[1] == row(many, "uneven")[1] == row(many, "uneven_0")[1] == State.TRUE
    n = few.schema.signal_names.index("router_tokens")
    assert (few.signal_value[0, n, 0], many.signal_value[0, n, 0]) == (4, 4096)
    # The twin of the ramp.
    cv = few.signal_value[0, few.schema.signal_names.index("load_cv"), 0]
    wide = 0.02 + 2 * np.sqrt((8 - 2) / (2 * 4))
    expected = 1 / (1 + np.exp(-12 * (cv - 0.5 + np.array([-wide, wide]))))
    np.testing.assert_allclose([lower, upper], expected, atol=1e-5)


def test_trends_are_not_widened() -> None:
    assert row(replay({"router_probs": routed(4)}, BOOK, top_k=2), "falling")[1] == State.UNKNOWN


def test_loads_alone_do_not_tell_how_many_tokens_there_were() -> None:
    records = replay({"expert_load": np.full((1, 8), 0.125)}, Rulebook("t", BOOK.rules[:2], P), top_k=2)
    assert "router_tokens" not in records.schema.signal_names
    np.testing.assert_array_equal(records.truth[0, 0], records.truth[0, 1])


def test_layers_of_different_sizes() -> None:
    rng = np.random.default_rng(0)
    probs = [rng.dirichlet(np.ones(e), (1, n)) for e, n in ((4, 16), (8, 256))]
    records = replay({"router_probs": probs}, Rulebook("t", BOOK.rules[:2], P), top_k=1)
    truth = records.truth_layer[0]
    for layer, (e, n) in enumerate(((4, 16), (8, 256))):
        z = np.log(truth[:, layer] / (1 - truth[:, layer])).astype(np.float64)
        width = np.diff(z)[:, 0] / 24
        assert width[0] - width[1] == pytest.approx(2 * np.sqrt((e - 1) / n), rel=1e-3)


def test_a_history_is_judged_again_with_its_noise() -> None:
    with RuleAuditCallback(BOOK, top_k=2) as audit:
        for probs in routed(8, 40):
            audit.on_step({"router_probs": probs})
        history = audit.history
    again = replay_history(history)
    np.testing.assert_array_equal(again.state, history["state"])
