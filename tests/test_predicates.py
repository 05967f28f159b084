"""Names to predicates, and predicates to truth intervals."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest

from moe_rules_callback.errors import UnknownNameError
from moe_rules_callback.judges import Judges
from moe_rules_callback.predicates import SENSES, TUTORIAL, Predicate, resolve
from moe_rules_callback.signals import WINDOW_SIGNALS, Signal, scalar, shipped

SIGNALS = shipped() | {"loss": scalar("loss"), "queue_length": scalar("queue_length")}


def judged(predicates: list[Predicate], values: np.ndarray, size: tuple[int, int] = (8, 2)) -> np.ndarray:
    """Truth [rows, predicates, 2] while the signals take values [rows, signals], in one layer."""
    order = sorted({p.signal for p in predicates})
    judges = Judges(predicates, order, SIGNALS, [size])

    def row(carry, x):
        state, i = carry
        state, truth, bad = judges.update(state, x[:, None], i)
        return (state, i + 1), (truth[:, 0], bad[:, 0])

    start = judges.init(1), jnp.int32(0)
    _, (truth, bad) = jax.jit(lambda xs: jax.lax.scan(row, start, xs))(jnp.asarray(values, jnp.float32))
    expected = ~np.isfinite(np.asarray(values)[:, [order.index(p.signal) for p in predicates]])
    np.testing.assert_array_equal(bad, expected)
    return np.asarray(truth)


@pytest.mark.parametrize(
    ("name", "offset", "degree"),
    [
        ("high_routing_confidence", 0.35, lambda x: x),
        ("low_activation_entropy", 0.4, lambda x: 1 - x),
        ("high_expert_imbalance", 0.2, lambda x: x),
        ("low_expert_imbalance", 0.5, lambda x: 1 - x),
    ],
)
def test_the_tutorials_ramps(name: str, offset: float, degree) -> None:
    x = np.linspace(0, 1, 21)
    got = judged([resolve(name, {}, SIGNALS)], x[:, None])[:, 0]
    np.testing.assert_allclose(got, [naive.ramp(degree(v), offset) for v in x], atol=1e-6)


@pytest.mark.parametrize(
    ("name", "offset", "degree"),
    [
        ("increasing_weight_magnitude", 0.5, naive.rising),
        ("decreasing_loss", 0.4, lambda y: 1 - naive.rising(y)),
        ("stable_loss", 0.5, naive.steadiness),
    ],
)
@pytest.mark.parametrize("slope", [-0.01, 0.0, 0.003, 0.05])
def test_the_tutorials_trends(name: str, offset: float, degree, slope: float) -> None:
    y = 2 + slope * np.arange(32) + 0.02 * np.random.default_rng(0).normal(size=32)
    got = judged([resolve(name, {}, SIGNALS)], y[:, None])[:, 0]
    assert (got[:31] == [0, 1]).all()  # not known before 32 rows
    np.testing.assert_allclose(got[31], naive.ramp(degree(y), offset), atol=1e-4)


def test_the_tutorials_names_are_all_there() -> None:
    assert len(TUTORIAL) == 7
    for name in TUTORIAL:
        assert resolve(name, {}, SIGNALS) is TUTORIAL[name]


@pytest.mark.parametrize("sense", SENSES)
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (8, 2), (256, 8)])
def test_every_sense_of_every_signal(sense: str, size: tuple[int, int]) -> None:
    """They resolve, keep 0 <= L <= U <= 1, and rise or fall with the signal as their name says.

    A trend survives a row that is not finite; `program` makes rules over it unknown there.
    """
    predicates = [resolve(f"{sense}_{name}", {}, SIGNALS) for name in SIGNALS]
    names = sorted(SIGNALS)
    noise = 1e-3 * np.random.default_rng(0).normal(size=(40, len(names)))
    levels = np.concatenate([np.linspace(0, 100, 10), [1e-30, -1e30, 1e30, np.nan, np.inf]])
    values = np.concatenate([noise[:35], levels[:, None] * np.ones(len(names))])
    truth = judged(predicates, values, size)
    assert np.isfinite(truth).all()
    assert (truth >= 0).all()
    assert (truth <= 1).all()
    assert (truth[..., 0] <= truth[..., 1]).all()
    if sense in ("high", "low"):
        assert (truth[-2:] == [0, 1]).all()
        signs = np.diff(truth[35:45, [SIGNALS[p.signal].ramps is not None for p in predicates]], axis=0)
        assert (signs >= 0).all() if sense == "high" else (signs <= 0).all()


SHIPPED_RAMPS = [name for name, signal in SIGNALS.items() if signal.ramps is not None]


@pytest.mark.parametrize("name", sorted(set(SHIPPED_RAMPS) - set(WINDOW_SIGNALS)))
def test_shipped_ramps_turn_where_they_say(name: str) -> None:
    for experts, k in ((4, 2), (64, 6)):
        ramps = SIGNALS[name].ramps
        assert ramps is not None
        for sense, (offset, scale) in ramps(experts, k).items():
            x = np.array([offset - scale / 2, offset, offset + scale / 2])
            predicate = resolve(f"{sense}_{name}", {}, SIGNALS)
            truth = judged([predicate], x[:, None], (experts, k)).mean(-1)[:, 0]
            expected = [naive.sigmoid(-6), 0.5, naive.sigmoid(6)]
            np.testing.assert_allclose(truth, expected if sense == "high" else expected[::-1], atol=2e-3)


def test_a_users_scalar_is_judged_by_its_own_history() -> None:
    """high_ is three standard deviations above the last 32 rows, low_ below; unknown until then."""
    y = 5 + np.random.default_rng(0).normal(size=34)
    past = y[:32]
    y[32], y[33] = past.mean() + 3 * past.std(ddof=1), np.nan
    both = [resolve(f"{sense}_queue_length", {}, SIGNALS) for sense in ("high", "low")]
    high, low = judged(both, y[:, None])[31:].swapaxes(0, 1)
    assert (high[0] == [0, 1]).all()  # 32 rows before, and this one
    np.testing.assert_allclose(high[1], naive.ramp(0.5, 0.5), atol=1e-4)
    np.testing.assert_allclose(low[1], naive.ramp(-0.5, 0.5), atol=1e-4)
    assert (high[2] == [0, 1]).all()
    spike = np.where(np.arange(33) == 32, 12.0, past.mean() + 0 * y[:33])
    spike[:32] = past
    assert judged([resolve("high_queue_length", {}, SIGNALS)], spike[:, None])[32, 0, 0] > 0.95
    assert judged([resolve("low_queue_length", {}, SIGNALS)], spike[:, None])[32, 0, 1] < 0.01


def test_own_ramps_are_in_units_of_the_signal() -> None:
    own = Predicate("queue_length", "low", offset=100.0, slope=0.1, margin=5.0)
    got = judged([own], np.array([[80.0], [100.0], [130.0]]))[:, 0]
    np.testing.assert_allclose(got, [naive.ramp(-x, -100, 0.1, 5) for x in (80, 100, 130)], atol=1e-6)


def test_a_margin_of_a_hair_is_no_contradiction() -> None:
    x = np.random.default_rng(0).uniform(-2, 2, 3000)
    thin = [
        Predicate("loss", "high", 0.1, slope, margin) for slope in (1, 7, 90) for margin in (0, 1e-8, 1e-7)
    ]
    truth = judged(thin, x[:, None])
    assert (truth[..., 0] <= truth[..., 1]).all()


def test_several_windows_of_one_signal() -> None:
    predicates = [Predicate("loss", "increasing", window=w) for w in (4, 8)] + [
        Predicate("loss", "stable", window=8)
    ]
    y = np.random.default_rng(3).normal(size=8) + 9
    truth = judged(predicates, y[:, None])
    np.testing.assert_allclose(truth[7, 0], naive.ramp(naive.rising(y[4:]), 0.5), atol=1e-4)
    np.testing.assert_allclose(truth[7, 1], naive.ramp(naive.rising(y), 0.5), atol=1e-4)
    np.testing.assert_allclose(truth[7, 2], naive.ramp(naive.steadiness(y), 0.5), atol=1e-4)
    assert (truth[2] == [0, 1]).all()


def test_what_wins() -> None:
    own = {"high_load_cv": Predicate("load_cv", "high", 0.9), "busy": Predicate("queue_length", "high", 3.0)}
    assert resolve("high_load_cv", own, SIGNALS).offset == 0.9
    assert resolve("busy", own, SIGNALS).signal == "queue_length"
    assert resolve("high_activation_entropy", {}, SIGNALS) == Predicate("router_entropy", "high")
    mine = SIGNALS | {"weight_magnitude": Signal(lambda m: m["x"], ("x",))}
    assert resolve("stable_weight_magnitude", {}, mine).signal == "weight_magnitude"
    assert resolve("stable_weight_magnitude", {}, SIGNALS).signal == "weight_norm"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "high_router_entropi",
            "no predicate is called 'high_router_entropi': 'router_entropi' is neither a shipped signal nor "
            "a scalar that this step passes. Did you mean high_router_entropy, ",
        ),
        (
            "load_cv",
            "no predicate is called 'load_cv': a predicate is one of high_X, low_X, increasing_X, "
            "decreasing_X, stable_X for a signal X. Did you mean ",
        ),
        (
            "zzz",
            "no predicate is called 'zzz': a predicate is one of high_X, low_X, increasing_X, decreasing_X, "
            "stable_X for a signal X. Define it under [predicates.zzz] in a rule file, or pass the scalar in "
            "the metrics of every step, or conclude it by a rule, evidence -> zzz.",
        ),
        ("high_", "no predicate is called 'high_': '' is neither a shipped signal nor a scalar"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(UnknownNameError) as error:
        resolve(name, {}, SIGNALS)
    assert str(error.value).startswith(message)
