"""Wrong or hostile values of router metrics: what rests on them is UNKNOWN in that row, nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import naive
import numpy as np
import pytest
from audited import signal, state, truth
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from moe_rules_callback import Audit, Records, State
from moe_rules_callback.routers import LEAST, MOST

T, E, K, ALPHA = 6, 4, 2, 0.75
RULES = {
    "sure": f"{ALPHA} :: high_routing_confidence",
    "sharp": f"{ALPHA} :: low_router_entropy",
    "uneven": f"{ALPHA} :: high_load_cv_normalised",
    "lasting": "once(low_router_entropy) & previously(high_routing_confidence)",
    "apart": "high_x",
}
OF_PROBS, OF_INDEX = {"sure", "sharp", "lasting"}, {"uneven"}
ALL = OF_PROBS | OF_INDEX
FINITE = np.float32(np.finfo(np.float32).tiny)  # below it XLA takes a number for 0
Update = Callable[..., Any]


def good(i: int) -> dict[str, Any]:
    z = 2 * np.random.default_rng(i).normal(size=(T, E))
    p = (np.exp(z) / np.exp(z).sum(-1, keepdims=True)).astype(np.float32)
    index = np.argsort(-p, axis=-1)[:, :K].astype(np.int32)
    return {"router_probs": p, "expert_index": index, "token_mask": np.ones(T, bool), "x": np.float32(i)}


@pytest.fixture(scope="module")
def audit() -> Audit:
    audit = Audit(RULES)
    audit.init(good(0))
    return audit


@pytest.fixture(scope="module")
def update(audit: Audit) -> Update:
    return jax.jit(audit.update)


def rows(audit: Audit, update: Update, run: list[dict[str, Any]]) -> Records:
    state_ = audit.plan.init()
    for metrics in run:
        state_ = update(state_, metrics)
    return audit.records(np.asarray(state_.rows), np.arange(len(run)), np.zeros(len(run)))


def _probs(**rows_of: Any) -> Callable[[dict[str, Any]], None]:
    """A token with these probabilities."""

    def change(metrics: dict[str, Any]) -> None:
        metrics["router_probs"][3] = rows_of["token"]

    return change


def _index(value: int) -> Callable[[dict[str, Any]], None]:
    def change(metrics: dict[str, Any]) -> None:
        metrics["expert_index"][2, 1] = value

    return change


def _no_token(metrics: dict[str, Any]) -> None:
    metrics["token_mask"][:] = False


NAN, INF = np.nan, np.inf
BAD: dict[str, tuple[Callable[[dict[str, Any]], None], set[str]]] = {
    "nan": (_probs(token=[NAN, 0.5, 0.3, 0.2]), OF_PROBS),
    "inf": (_probs(token=[INF, 0.5, 0.3, 0.2]), OF_PROBS),
    "-inf": (_probs(token=[-INF, 0.5, 0.3, 0.2]), OF_PROBS),
    "negative": (_probs(token=[-0.1, 0.5, 0.3, 0.3]), OF_PROBS),
    "negative by rounding": (_probs(token=[-1e-7, 0.5, 0.3, 0.2]), OF_PROBS),
    "no positive": (_probs(token=[0.0, 0.0, 0.0, 0.0]), OF_PROBS),
    "sum overflows": (_probs(token=[3e38, 3e38, 3e38, 3e38]), OF_PROBS),
    "s ln s overflows": (_probs(token=[3e37, 3e37, 3e37, 3e37]), OF_PROBS),
    "parts underflow": (_probs(token=[2e-38, 1e-38, 1e-38, 1e-38]), OF_PROBS),
    "subnormal": (_probs(token=[1e-45, 1e-45, 1e-45, 1e-45]), OF_PROBS),
    "index below 0": (_index(-1), OF_INDEX),
    "index of no expert": (_index(E), OF_INDEX),
    "index of int32's ends": (_index(np.iinfo(np.int32).min), OF_INDEX),
    "all tokens masked": (_no_token, ALL),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_step_among_good_ones(name: str, audit: Audit, update: Update) -> None:
    """Rules over it are UNKNOWN in its row; windows pass over it, so that later rows are as without it."""
    change, affected = BAD[name]
    run = [good(i) for i in range(7)]
    without, unharmed = rows(audit, update, run[:3] + run[4:]), rows(audit, update, run)
    change(run[3])
    got = rows(audit, update, run)
    others = [0, 1, 2, 4, 5, 6]
    for rule in RULES:
        if rule in affected:
            assert state(got, rule)[3] == State.UNKNOWN, rule
            np.testing.assert_array_equal(truth(got, rule)[3], [[0, 1]], err_msg=rule)
            np.testing.assert_array_equal(truth(got, rule)[others], truth(without, rule), err_msg=rule)
        else:
            np.testing.assert_array_equal(truth(got, rule), truth(unharmed, rule), err_msg=rule)
    for at, of in (("routing_confidence", OF_PROBS), ("load_cv_normalised", OF_INDEX)):
        assert np.isnan(signal(got, at)[3]).all() == (of <= affected)
    np.testing.assert_array_equal(np.isnan(got.expert_share[3]), affected >= OF_INDEX)
    assert signal(got, "x")[:, 0].tolist() == list(range(7))


@pytest.mark.parametrize("name", [name for name in BAD if "masked" not in name])
def test_padding_may_hold_anything(name: str, audit: Audit, update: Update) -> None:
    clean, harmed = good(3), good(3)
    BAD[name][0](harmed)
    for metrics in (clean, harmed):
        metrics["token_mask"][[2, 3]] = False
    one, other = (rows(audit, update, [metrics]) for metrics in (clean, harmed))
    np.testing.assert_array_equal(one.truth_layer, other.truth_layer)
    np.testing.assert_array_equal(one.signal_value, other.signal_value)


def test_experts_named_twice(audit: Audit, update: Update) -> None:
    """By hashing, or by sampling with replacement: a share of assignments."""
    metrics = good(0)
    metrics["expert_index"][:] = 1
    got = rows(audit, update, [metrics])
    assert signal(got, "load_cv_normalised")[0, 0] == pytest.approx(np.sqrt(3), rel=1e-6)
    np.testing.assert_array_equal(got.expert_share[0, 0], [0, 1, 0, 0])


token = arrays.arrays(
    np.float32,
    E,
    elements=st.one_of(st.floats(0, 1, width=32), st.floats(width=32), st.sampled_from([0.0, 1e30, 1e-30])),
)
tokens = st.lists(st.one_of(token, st.just(np.full(E, 0.25, np.float32))), min_size=T, max_size=T)


@given(tokens, st.lists(st.booleans(), min_size=T, max_size=T), st.integers(0, 2**31))
def test_whatever_the_probabilities_are(
    audit: Audit, update: Update, probs: list[np.ndarray], mask: list[bool], seed: int
) -> None:
    index = np.random.default_rng(seed).integers(0, E, (T, K)).astype(np.int32)
    given_ = {"router_probs": np.array(probs), "expert_index": index, "token_mask": np.array(mask)}
    got = rows(audit, update, [{**given_, "x": np.float32(0)}])
    lower, upper = got.truth_layer[0, :, 0].T
    assert (lower >= 0).all()
    assert (lower <= upper).all()
    assert (upper <= 1).all()
    alphas = np.array([rule.threshold for rule in got.schema.rules], np.float32)
    expected = [naive.classify(pair, a) for pair, a in zip(got.truth_layer[0, :, 0], alphas, strict=True)]
    assert got.state[0].tolist() == expected

    seen = np.array(probs, np.float64)[np.array(mask)]
    seen = np.where(np.abs(seen) < FINITE, 0, seen)
    with np.errstate(invalid="ignore", over="ignore"):
        total = seen.sum(-1)
        sound = (seen >= 0).all(-1) & (total > LEAST) & (total < MOST)
        near = np.isclose(total, LEAST, rtol=1e-3, atol=0) | np.isclose(total, MOST, rtol=1e-3, atol=0)
    if near.any():
        return
    verdicts = {rule: int(state(got, rule)[0]) for rule in ("sure", "sharp")}
    if not len(seen) or not sound.all():
        assert set(verdicts.values()) == {State.UNKNOWN}
        assert np.isnan(signal(got, "routing_confidence")).all()
        return
    p = seen / total[:, None]
    entropy = np.mean([naive.entropy(x) for x in p]) / np.log(E)
    ramps = {"sure": naive.ramp(p.max(-1).mean(), 0.35), "sharp": _falling(entropy, 0.6)}
    for rule, (low, high) in ramps.items():
        np.testing.assert_allclose(truth(got, rule)[0, 0], (low, high), atol=2e-4)
        if min(abs(low - ALPHA), abs(1 - high - ALPHA)) > 1e-3:
            assert verdicts[rule] == naive.classify((low, high), ALPHA)


def _falling(x: float, offset: float) -> tuple[float, float]:
    return naive.sigmoid(-12 * (x - (offset - 0.05))), naive.sigmoid(-12 * (x - (offset + 0.05)))


LOGITS: dict[str, tuple[list[float], list[float] | None]] = {  # a token's logits and its probabilities
    "1e30": ([1e30, -1e30, 0.0, 0.0], [1, 0, 0, 0]),
    "the ends of float32": ([3.4e38, -3.4e38, 0.0, 0.0], [1, 0, 0, 0]),
    "some masked": ([0.0, 0.0, -INF, -INF], [0.5, 0.5, 0, 0]),
    "all masked": ([-INF] * 4, None),
    "inf": ([INF, 0.0, 0.0, 0.0], None),
    "nan": ([NAN, 0.0, 0.0, 0.0], None),
}


@pytest.fixture(scope="module")
def of_logits() -> tuple[Audit, Update]:
    audit = Audit({"sure": "high_routing_confidence", "calm": "low_router_z_loss"}, top_k=K)
    audit.init({"router_logits": np.zeros((T, E), np.float32)})
    return audit, jax.jit(audit.update)


@pytest.mark.parametrize("name", LOGITS)
def test_logits(name: str, of_logits: tuple[Audit, Update]) -> None:
    given_, probs = LOGITS[name]
    logits = np.zeros((T, E), np.float32)
    logits[1] = given_
    got = rows(*of_logits, [{"router_logits": np.zeros((T, E), np.float32)}, {"router_logits": logits}])
    confidence = np.nan if probs is None else (max(probs) + 0.25 * (T - 1)) / T
    np.testing.assert_allclose(signal(got, "routing_confidence")[:, 0], [0.25, confidence], rtol=1e-6)
    expected = State.UNKNOWN if probs is None else naive.classify(naive.ramp(confidence, 0.35), 0.75)
    assert state(got, "sure")[1] == expected
    calm = np.isfinite(signal(got, "router_z_loss")[1, 0])
    assert calm == (name == "some masked")  # the square of what is huge overflows
    assert calm or state(got, "calm")[1] == State.UNKNOWN
