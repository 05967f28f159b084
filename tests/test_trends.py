"""What windows say, against polyfit, median and std; noise, units, gaps and rounding."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rules_callback import trends

W = 32
rng = np.random.default_rng(0)
TIME = np.arange(W)


def ask(function: Any, *series: Any) -> np.ndarray:
    """A function of `trends` on series (oldest value first), each a channel."""
    rows = np.array(series, np.float32).T
    return np.asarray(jax.jit(function)(rows, np.arange(len(rows))[::-1]))


def shaken(function: Any, series: Any) -> np.ndarray:
    """The same with the rows where a ring would have them."""
    rows, age = np.array([series], np.float32).T, np.arange(len(series))[::-1]
    return np.asarray(function(np.roll(rows, 5, 0), np.roll(age, 5)))


def noisy(slope: float, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    return slope * TIME + noise * np.random.default_rng(seed).normal(size=W)


@pytest.mark.parametrize("slope", [-3.0, -0.05, 0.0, 0.02, 0.1, 1.0])
def test_rising_is_the_slope_over_its_standard_error(slope: float) -> None:
    y = noisy(slope) + 7
    assert ask(trends.rising, y)[0] == pytest.approx(naive.rising(y), abs=1e-4)
    assert shaken(trends.rising, y)[0] == pytest.approx(naive.rising(y), abs=1e-4)
    gaps = y.copy()
    gaps[[3, 17, 31]] = np.nan, np.inf, -np.inf
    assert ask(trends.rising, gaps)[0] == pytest.approx(naive.rising(gaps), abs=1e-4)


def test_clear_trends_and_none() -> None:
    up, down = noisy(1.0), noisy(-1.0)
    assert ask(trends.rising, up, down) == pytest.approx([1, 0], abs=1e-6)
    for constant in (0.0, 1.0, -2.3, 1e-6, 1e6):
        assert ask(trends.rising, np.full(W, constant)) == pytest.approx([0.5])


@pytest.mark.parametrize(("memory", "alarms"), [(0.0, 0.03), (0.5, 0.08)])
def test_noise_is_no_trend(memory: float, alarms: float) -> None:
    """White noise, and noise that resembles the row before; .64 is where `increasing_` turns TRUE."""
    random, noise = np.random.default_rng(1), np.zeros((2000, W))
    for i in range(1, W):
        noise[:, i] = memory * noise[:, i - 1] + random.normal(size=2000)
    told = ask(trends.rising, *noise)
    assert np.median(told) == 0.5
    assert told.mean() == pytest.approx(0.5, abs=0.02)
    assert (np.abs(told - 0.5) > 0.14).mean() < alarms


@pytest.mark.parametrize("level", [1e-3, 1.0, 2.3, 1e4])
def test_float32_rounding_is_no_trend(level: float) -> None:
    """The last bit of a value that stands still: as a staircase, as a ramp, as noise."""
    bit = np.spacing(np.float32(level))
    wiggles = [1 * (TIME > 15), 1 * (TIME == 31), rng.integers(-1, 2, W), TIME % 2, -1 * (TIME > 3)]
    for wiggle in wiggles:
        assert 0.25 < ask(trends.rising, np.float32(level) + bit * wiggle)[0] < 0.75


@given(
    st.integers(0, 2**31),
    st.sampled_from([1e-8, 1e-3, 1.0, 1e3, 1e8]),
    st.floats(-5, 5),
    st.floats(-0.3, 0.3),
)
def test_units_do_not_matter(seed: int, scale: float, shift: float, slope: float) -> None:
    y = noisy(slope, seed=seed)
    moved = (y + shift) * scale
    for function in (trends.rising, trends.spike_score):
        here, there = ask(_jitted[function], y), ask(_jitted[function], moved)
        np.testing.assert_allclose(there, here, atol=2e-3, rtol=2e-3)
    flipped = ask(_jitted[trends.rising], -y)
    np.testing.assert_allclose(flipped, 1 - ask(_jitted[trends.rising], y), atol=1e-4)
    steady = ask(_jitted[trends.steadiness], 10 + y)
    np.testing.assert_allclose(ask(_jitted[trends.steadiness], scale * (10 + y)), steady, atol=2e-3)


_jitted = {f: jax.jit(f) for f in (trends.rising, trends.spike_score, trends.steadiness)}


def test_steadiness() -> None:
    assert ask(trends.steadiness, np.full(W, 2.3), np.zeros(W)) == pytest.approx([1, 1])
    drift = 2 * (1 + 0.02 * (TIME / 31 - 0.5))  # 2 % over the window
    assert ask(trends.steadiness, drift)[0] == pytest.approx(0.8, abs=1e-3)
    assert ask(trends.steadiness, 5 * drift, drift[::-1]) == pytest.approx([0.8, 0.8], abs=1e-3)
    assert ask(trends.steadiness, TIME + 1.0)[0] == 0
    for y in (5 + 0.05 * rng.normal(size=W), -(5 + 0.01 * TIME)):
        assert ask(trends.steadiness, y)[0] == pytest.approx(naive.steadiness(y), abs=1e-4)
        y[[0, 9]] = np.nan
        assert ask(trends.steadiness, y)[0] == pytest.approx(naive.steadiness(y), abs=1e-4)


def test_spike_score() -> None:
    y = 3 + rng.normal(size=129)
    expected = (y[-1] - y[:-1].mean()) / y[:-1].std(ddof=1)
    assert ask(trends.spike_score, y)[0] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    y[-1] = 3 + 9 * y[:-1].std(ddof=1)
    assert ask(trends.spike_score, y)[0] == pytest.approx(9, abs=0.3)
    y[[4, 5]] = np.nan, np.inf
    past = y[:-1][np.isfinite(y[:-1])]
    assert ask(trends.spike_score, y)[0] == pytest.approx((y[-1] - past.mean()) / past.std(ddof=1), rel=1e-3)
    assert np.isnan(ask(trends.spike_score, [*y[:-1], np.nan])[0])
    assert ask(trends.spike_score, np.full(129, 2.3))[0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("window", [31, 32])
def test_resistant_slope(window: int) -> None:
    y = rng.normal(size=window) + 0.3 * np.arange(window)
    half = window // 2
    expected = (np.median(y[-half:]) - np.median(y[:-half])) / (window / 2)
    assert ask(trends.resistant_slope, y)[0] == pytest.approx(expected, rel=1e-4)
    assert shaken(trends.resistant_slope, y)[0] == pytest.approx(expected, rel=1e-4)
    line = 0.25 * np.arange(window) + 3
    assert ask(trends.resistant_slope, line)[0] == pytest.approx(0.25, rel=1e-5)
    line[-4] = 1e6  # a spike in a half moves its median by half a row at most
    assert ask(trends.resistant_slope, line)[0] == pytest.approx(0.25, abs=0.25 / window)


def missed(y: np.ndarray) -> float:
    """`level_shift` by a fitted polynomial and its covariance."""
    t = np.arange(len(y))
    old, new = np.isfinite(y) & (t < len(y) - 8), np.isfinite(y) & (t >= len(y) - 8)
    (slope, level), cov = np.polyfit(t[old], y[old], 1, cov=True)
    at = np.array([t[new].mean(), 1])
    residual = y[old] - slope * t[old] - level
    error = at @ cov @ at + residual.var(ddof=2) / new.sum()
    return (y[new].mean() - at @ [slope, level]) / np.sqrt(error)


def test_level_shift() -> None:
    y = 3 - 0.02 * np.arange(64) + 0.1 * np.random.default_rng(3).normal(size=64)
    for change in (0.0, 0.3, -1.0):
        y[-8:] += change
        assert ask(trends.level_shift, y)[0] == pytest.approx(missed(y), rel=1e-3)
        assert shaken(trends.level_shift, y)[0] == pytest.approx(missed(y), rel=1e-3)
    assert missed(y) < -10
    y[[0, 20, 61]] = np.nan
    assert ask(trends.level_shift, y)[0] == pytest.approx(missed(y), rel=1e-3)
    y[-8:] = np.nan
    assert np.isnan(ask(trends.level_shift, y)[0])
    assert ask(trends.level_shift, np.full(64, 2.3))[0] == pytest.approx(0, abs=0.5)
    assert abs(ask(trends.level_shift, 7 - 0.25 * np.arange(64))[0]) < 0.5


@pytest.mark.parametrize(
    "function",
    [trends.rising, trends.steadiness, trends.spike_score, trends.resistant_slope, trends.level_shift],
)
def test_nothing_finite_is_nan(function: Any) -> None:
    assert np.isnan(ask(function, np.full(W, np.nan))).all()


def newest(rows: jax.Array, age: jax.Array) -> jax.Array:
    return jnp.where((age == 0)[:, None], rows, 0).sum(0)


def oldest(rows: jax.Array, age: jax.Array) -> jax.Array:
    return jnp.where((age == rows.shape[0] - 1)[:, None], rows, 0).sum(0)


def test_lookbacks_keep_windows_apart() -> None:
    """Results come in the order asked for, each from its own channel, window and layer."""
    wanted = [(oldest, 3, 1), (newest, 5, 0), (oldest, 5, 0), (newest, 3, 0), (oldest, 3, 0)]
    lookbacks = trends.Lookbacks(wanted)
    rings = lookbacks.init(layers=2)
    assert [ring.shape for ring in rings] == [(3, 2, 2), (5, 1, 2)]
    series = np.random.default_rng(2).normal(size=(12, 2, 2)).astype(np.float32)  # [rows, channels, layers]
    update = jax.jit(lookbacks.update)
    for row in range(12):
        rings, got = update(rings, series[row], jnp.int32(row))
        for i, (function, window, channel) in enumerate(wanted):
            if row + 1 < window:
                assert np.isnan(got[i]).all()
            else:
                back = 0 if function is newest else window - 1
                np.testing.assert_array_equal(got[i], series[row - back, channel])


def test_no_lookbacks() -> None:
    lookbacks = trends.Lookbacks([])
    rings, got = lookbacks.update(lookbacks.init(2), jnp.zeros((3, 2)), jnp.int32(0))
    assert rings == ()
    assert got.shape == (0, 2)
