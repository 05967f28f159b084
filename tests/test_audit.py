"""The pure pair init and update: abstract, jitted, scanned, donated; headlines; what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audited import drive, records, signal, state, truth, unpack

from moe_rules_callback import (
    Audit,
    HistoryError,
    MetricsError,
    Predicate,
    Rulebook,
)
from moe_rules_callback.language import parse_rule
from moe_rules_callback.state import restored

rng = np.random.default_rng(0)
RULES = {
    "specialised": "0.85 :: high_routing_confidence & low_activation_entropy",
    "uneven": "always[4](high_load_cv) | decreasing_loss",
    "settling": "stable_loss since[8] low_router_entropy",
}


def step(seed: int, sharp: float = 1.0) -> dict[str, Any]:
    z = sharp * np.random.default_rng(seed).normal(size=(2, 3, 8, 4))
    p = (np.exp(z) / np.exp(z).sum(-1, keepdims=True)).astype(np.float32)
    return {"loss": np.float32(2 + seed % 3), "router_probs": {"a": p[0], "b": p[1]}}


STEPS = [step(i, sharp=i / 10) for i in range(40)]


def equal(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_abstract_metrics_do_as_well_as_real_ones() -> None:
    real, abstract = Audit(RULES, top_k=2, signals="all"), Audit(RULES, top_k=2, signals="all")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STEPS[0])
    equal(real.init(STEPS[0]), abstract.init(shapes))
    assert real.schema == abstract.schema
    assert real.schema.layers == ("a", "b")


def test_beside_scanned_and_donated_are_the_same_to_the_bit() -> None:
    audit = Audit(RULES, top_k=2)
    beside = drive(audit, STEPS)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *STEPS)
    scanned, _ = jax.jit(lambda s, xs: jax.lax.scan(lambda c, m: (audit.update(c, m), None), s, xs))(
        audit.init(STEPS[0]), stacked
    )
    equal(beside, scanned)
    donated, update = audit.init(STEPS[0]), jax.jit(audit.update, donate_argnums=0)
    for metrics in STEPS:
        donated = update(donated, metrics)
    equal(beside, donated)


def test_update_without_jit() -> None:
    """Layers of a mapping stand in one order, inside jit and outside of it."""
    audit = Audit(["low_router_entropy"])
    probs = STEPS[9]["router_probs"]
    metrics = {"router_probs": {"z": probs["a"], "a": probs["b"]}}
    eager = unpack(audit, audit.update(audit.init(metrics), metrics))
    jitted = records(audit, [metrics])
    assert eager.schema.layers == ("a", "z")
    np.testing.assert_allclose(eager.signal_value, jitted.signal_value, atol=1e-6)
    assert signal(eager, "router_entropy")[0, 0] != signal(eager, "router_entropy")[0, 1]


def test_steps_and_the_ring() -> None:
    audit = Audit({"gate": "after[7](stable_loss | ~stable_loss)"}, rows=4)
    state_, update = audit.init({"loss": 1.0}), jax.jit(audit.update)
    for number in (None, None, 6, None, None):
        state_ = update(state_, {"loss": 1.0}, number)
    rows = audit.records(jax.tree.map(np.asarray, state_.rows), np.arange(1, 5), np.arange(4.0))
    assert rows.step.tolist() == [1, 6, 7, 8]
    assert rows.step.dtype == np.int64
    assert rows.wall_time.tolist() == [0, 1, 2, 3]


def test_headlines() -> None:
    """The worst layer speaks: the maximum over layers for a risk, the minimum for any other rule."""
    rules = [parse_rule("high_router_entropy", name, kind=kind) for name, kind in
             (("risk", "risk"), ("health", "health"), ("plain", None))]  # fmt: skip
    rows = records(Audit(rules), [{"router_probs": {"flat": np.full((4, 4), 0.25), "sharp": np.eye(4)}}])
    flat, sharp = truth(rows, "risk")[0]
    assert flat[0] > sharp[1]
    np.testing.assert_array_equal(rows.truth[0], [flat, sharp, sharp])
    assert [int(s) for s in rows.state[0]] == [1, 0, 0]


@pytest.mark.parametrize("kind", ["risk", "health"])
def test_a_contradiction_comes_before_truth(kind: Any) -> None:
    """A negative margin turns the bounds around."""
    book = Rulebook("b", (parse_rule("odd", kind=kind),), {"odd": Predicate("x", "high", 0.0, 12.0, -0.05)})
    rows = records(Audit(book), [{"x": 0.0}, {"x": 1.0}])
    assert (truth(rows, "odd")[:, 0, 0] > truth(rows, "odd")[:, 0, 1]).all()
    assert state(rows, "odd").tolist() == [3, 3]


def test_thresholds_are_compared_in_float32() -> None:
    """.9 in float32 is above .9 in float64: only a comparison in float32 finds it reached."""
    lower = float(np.float32(0.9))
    x = np.log(lower / (1 - lower))
    book = Rulebook("b", (parse_rule("0.9 :: p", "r"),), {"p": Predicate("x", "high", 0.0, 1.0, 0.0)})
    rows = records(Audit(book), [{"x": x + d * 1e-7} for d in range(-30, 31)])
    expected = np.where(truth(rows, "r")[:, 0, 0] >= np.float32(0.9), 1, 2)
    assert state(rows, "r").tolist() == expected.tolist()
    assert np.float32(0.9) in truth(rows, "r")[:, 0, 0]


@pytest.mark.parametrize("rules", [{}, []])
@pytest.mark.parametrize("metrics", [STEPS[0], {"loss": 1.0}, {}], ids=["router", "scalar", "nothing"])
def test_no_rules(rules: Any, metrics: dict) -> None:
    rows = records(Audit(rules), [metrics])
    assert rows.state.shape == (1, 0)
    assert rows.truth_layer.shape[:2] == (1, 0)


def test_a_changed_layout_is_refused() -> None:
    audit = Audit(RULES, top_k=2)
    state_ = audit.init(STEPS[0])
    fewer = {"loss": 1.0, "router_probs": {"a": STEPS[0]["router_probs"]["a"]}}
    with pytest.raises(MetricsError) as error:
        audit.update(state_, fewer)
    assert str(error.value) == (
        "the routers differ from those of the first step: (layers, experts, experts per token) are "
        "((('a',), 4, 2),), and were ((('a',), 4, 2), (('b',), 4, 2)). Pass the same layers at every step, "
        "and make a new audit for another model."
    )
    with pytest.raises(MetricsError) as error:
        audit.update(state_, {"router_probs": STEPS[0]["router_probs"]})
    assert str(error.value) == (
        "the metrics of this step lack loss, which the first step had. Pass every metric at every step; "
        "float('nan') stands for a scalar that has no value now."
    )


def test_more_tokens_than_at_init_are_welcome() -> None:
    audit = Audit(["low_router_entropy"])
    state_ = audit.init(STEPS[0])
    longer = jax.tree.map(lambda x: np.concatenate([x, x]) if x.ndim else x, STEPS[0])
    one, two = (unpack(audit, jax.jit(audit.update)(state_, m)) for m in (STEPS[0], longer))
    np.testing.assert_allclose(one.signal_value, two.signal_value, rtol=1e-5)


def test_update_before_init() -> None:
    with pytest.raises(MetricsError, match=r"^the audit has not seen any metrics yet: call init"):
        Audit(RULES).update(None, STEPS[0])  # type: ignore[arg-type]


@functools.cache
def _equations(rules: int) -> int:
    book = [f"{1 + i / 100}*high_routing_confidence & {x}" for i in range(rules // 2)
            for x in ("low_router_entropy", "~stable_loss")]  # fmt: skip
    audit = Audit(book, top_k=2)
    state_ = audit.init(STEPS[0])
    assert len(audit.schema.rules) == rules
    return len(jax.make_jaxpr(audit.update)(state_, STEPS[0]).jaxpr.eqns)


def test_a_hundred_rules_are_hardly_more_equations_than_six() -> None:
    assert _equations(100) <= _equations(6) + 2


@contextlib.contextmanager
def float64() -> Iterator[None]:
    """As `jax.enable_x64()`, which older releases of jax lack."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize(
    "strict",
    [
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.numpy_rank_promotion("raise"),
        float64,
    ],
    ids=["dtype promotion", "rank promotion", "x64"],
)
def test_inside_a_program_with_other_settings(strict: Any) -> None:
    """A training step that is strict, or runs in float64, carries the same state and gets the same rows."""
    rules = {**RULES, "xor": "high_load_gini ^ once(low_loss)"}
    metrics = {**STEPS[0], "token_mask": np.ones((3, 8), bool)}
    plain = drive(Audit(rules, top_k=2, signals="all"), [metrics] * 2)
    with strict():
        other = drive(Audit(rules, top_k=2, signals="all"), [metrics] * 2)
    assert jax.tree.map(lambda x: x.dtype, plain) == jax.tree.map(lambda x: x.dtype, other)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), plain, other)


def test_a_state_of_other_rules_is_refused():
    mine, other = Audit({"r": "previously(high_loss)"}), Audit({"r": "previously(low_loss)"})
    metrics = {"loss": 1.0}
    mine.init(metrics)
    with pytest.raises(MetricsError) as error:
        mine.update(other.init(metrics), metrics)
    assert str(error.value) == (
        "the state is one of another audit, with other rules, predicates or layers. Usual causes: two audits "
        "whose states were exchanged, or a checkpoint from before a rule was changed. Begin with a new "
        "state, audit.init(metrics)."
    )


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"r": "0.9 :: G(high_loss)"}, True),  # only what the truth is compared with
        ({"another": "G(high_loss)"}, True),
        ({"r": "G(low_loss)"}, False),
        ({"r": "F(high_loss)"}, False),
    ],
)
def test_what_a_state_can_be_restored_into(change, kept):
    metrics = {"loss": 1.0}
    begun = Audit({"r": "G(high_loss)"}).init(metrics)
    like = Audit(change).init(metrics)
    if kept:
        jax.tree.map(np.testing.assert_array_equal, restored(begun, like), begun)
        mapping = {field.name: getattr(begun, field.name) for field in dataclasses.fields(begun)}
        jax.tree.map(np.testing.assert_array_equal, restored(mapping, like), begun)
        return
    with pytest.raises(HistoryError) as error:
        restored(begun, like)
    assert str(error.value).startswith("the state to restore is not one of this audit: its `ring` differs.")
