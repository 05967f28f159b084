"""Scalars of every kind, arrays that are gone, and tracers."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from audited import records, signal, truth

from moe_rules_callback import Audit, MetricsError, Predicate, RuleAuditCallback, Rulebook, State
from moe_rules_callback.language import parse_formula, parse_rule

BOOK = Rulebook("b", (parse_rule("is_high", "high"),), {"is_high": Predicate("loss", "high", 0.0)})
GONE = (
    "the values of '{}' are gone: its array was donated to a jitted function, or deleted. Call on_step "
    "before the function that it is donated to, or let the step return a copy."
)
TRACED = (
    "on_step was called inside a function that JAX traces, where it would run once and never again. Return "
    "the metrics from the step and call on_step in the loop; or carry a state through it, state = "
    "audit.update(state, metrics), and call audit.drain(state) in the loop."
)
NOT_REAL = (
    "the metric 'loss' is {}; expected a real number. Pass the number that is meant, or leave the metric out."
)


def deleted(value: Any) -> jax.Array:
    array = jnp.asarray(value)
    array.delete()
    return array


VALUES: dict[str, tuple[Any, float]] = {  # and what is recorded
    "an int of 70 bits": (2**70, 2.0**70),
    "an int beyond float32": (10**40, np.inf),
    "an int beyond float64": (-(10**400), -np.inf),
    "a float beyond float32": (1e300, np.inf),
    "float64 beyond float32": (np.float64(-1e300), -np.inf),
    "longdouble": (np.longdouble(0.5), 0.5),
    "masked": (np.ma.masked, np.nan),
    "nan": (np.nan, np.nan),
    "inf of a device": (jnp.float32(jnp.inf), np.inf),
    "float16": (np.float16(0.5), 0.5),
    "bfloat16": (jnp.bfloat16(0.5), 0.5),
    "bool": (np.bool_(True), 1.0),
    "text": ("0.5", np.nan),  # passed over, like the names in trainers' dictionaries
    "none": (None, np.nan),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "complex": (1 + 2j, NOT_REAL.format("a complex")),
    "complex64": (np.complex64(1), NOT_REAL.format("of dtype complex64")),
    "complex of a device": (jnp.complex64(1), NOT_REAL.format("of dtype complex64")),
    "key": (jax.random.key(0), NOT_REAL.format("of dtype key<fry>")),
    "object": (object(), NOT_REAL.format("a object")),
    "decimal": (Decimal("0.5"), NOT_REAL.format("a Decimal")),
    "object array": (np.array(None), NOT_REAL.format("of dtype object")),
    "text array": (np.array("0.5"), NOT_REAL.format("of dtype <U3")),
    "time": (np.timedelta64(1, "s"), NOT_REAL.format("of dtype timedelta64[s]")),
    "mapping": ({}, NOT_REAL.format("a dict")),
    "vector": (
        np.ones(1, np.float32),
        "the signal 'loss' has shape (1,); a signal is a single number. Reduce it first, for instance with "
        "jnp.mean.",
    ),
    "list": (
        [1.0],
        "the signal 'loss' has shape (1,); a signal is a single number. Reduce it first, for instance with "
        "jnp.mean.",
    ),
    "deleted": (deleted(1.0), GONE.format("loss")),
}


@pytest.fixture(scope="module")
def beside() -> Iterator[RuleAuditCallback]:
    """One callback for all cases, so that it compiles once; each case begins and ends with a good step."""
    with RuleAuditCallback(BOOK) as audit:
        audit.on_step({"loss": 1.0})
        yield audit


def after(audit: RuleAuditCallback, before: int) -> tuple[list[float], list[int]]:
    """The loss and the state of the rows since."""
    history = audit.history
    return history.loss.values[before:].tolist(), history.state.values[before:, 0].tolist()


def count(audit: RuleAuditCallback) -> int:
    return len(audit.history.step)


@pytest.mark.parametrize("name", VALUES)
def test_a_scalar_that_has_a_value_or_none(name: str, beside: RuleAuditCallback) -> None:
    given, value = VALUES[name]
    before = count(beside)
    for loss in (1.0, given, 1.0):
        beside.on_step({"loss": loss})
    expected = State.TRUE if np.isfinite(value) else State.UNKNOWN
    np.testing.assert_equal(after(beside, before), ([1.0, value, 1.0], [State.TRUE, expected, State.TRUE]))


@pytest.mark.parametrize("name", REFUSED)
def test_a_scalar_that_is_none(name: str, beside: RuleAuditCallback) -> None:
    given, message = REFUSED[name]
    before = count(beside)
    beside.on_step({"loss": 1.0})
    with pytest.raises(MetricsError) as error:
        beside.on_step({"loss": given})
    assert str(error.value) == message
    beside.on_step({"loss": 2.0})
    assert after(beside, before) == ([1.0, 2.0], [State.TRUE, State.TRUE])


@pytest.mark.parametrize("name", [name for name in REFUSED if name != "deleted"])
def test_inside_a_program_and_at_the_first_step(name: str) -> None:
    given, message = REFUSED[name]
    audit = Audit(BOOK)
    with pytest.raises(MetricsError) as error:
        audit.update(audit.init({"loss": given}), {"loss": given})
    assert str(error.value) == message


@pytest.mark.parametrize(
    "odd",
    [
        jax.random.key(0),
        object(),
        np.datetime64("2020-01-01"),
        np.array("text"),
        datetime.date.today(),
        1j,
        print,
    ],
    ids=lambda odd: type(odd).__name__,
)
def test_what_no_rule_reads_does_no_harm(odd: Any) -> None:
    with RuleAuditCallback([]) as audit:
        audit.on_step({"loss": 1.0, "other": odd})
        assert audit.history.signal.values.tolist() == ["loss"]


def test_keys_that_are_no_names(beside: RuleAuditCallback) -> None:
    before = count(beside)
    with pytest.raises(MetricsError) as error:
        beside.on_step({"loss": 1.0, 0: 2.0})  # type: ignore[dict-item]
    assert str(error.value) == "the metrics have the key 0; a metric has a name, a text. Name it."
    assert after(beside, before) == ([], [])


def test_routers_that_are_gone() -> None:
    with RuleAuditCallback(["high_routing_confidence"]) as audit:
        for _ in range(2):  # as the first step, and later
            with pytest.raises(MetricsError) as error:
                audit.on_step({"router_probs": {"a": deleted(np.eye(4))}})
            assert str(error.value) == GONE.format("router_probs")
            audit.on_step({"router_probs": {"a": jnp.eye(4)}})
        assert audit.history.state.values.tolist() == [[State.TRUE]] * 2


@pytest.mark.parametrize("traced", ["metric", "step", "nothing"])
@pytest.mark.parametrize("first", [True, False])
def test_a_call_inside_a_traced_function_leaves_nothing_behind(traced: str, first: bool) -> None:
    """Even when all that it is given is concrete: what it computes would be traced."""
    with RuleAuditCallback(BOOK) as audit:
        if not first:
            audit.on_step({"loss": 1.0})

        @jax.jit
        def step(x: jax.Array) -> jax.Array:
            audit.on_step({"loss": x if traced == "metric" else 2.0}, x if traced == "step" else None)
            return x

        with pytest.raises(MetricsError) as error:
            step(jnp.int32(3))
        assert str(error.value) == TRACED
        audit.on_step({"loss": 4.0})
        assert audit.history.loss.values.tolist() == ([4.0] if first else [1.0, 4.0])


def test_a_loss_that_is_not_finite_is_passed_over_by_windows() -> None:
    rules = {"lasting": "always[3](is_high)", "before": "previously(is_high)"}
    book = Rulebook("b", tuple(parse_rule(t, n) for n, t in rules.items()), BOOK.predicates)
    losses: Any = [1.0, np.nan, 2.0, np.inf, -np.inf, 3.0, 4.0]
    got = records(Audit(book), [{"loss": loss} for loss in losses])
    bad = ~np.isfinite(losses)
    assert (got.state[bad] == State.UNKNOWN).all()
    np.testing.assert_array_equal(signal(got, "loss")[:, 0], np.float32(losses))
    degrees = [{"is_high": naive.ramp(x, 0.0) if np.isfinite(x) else None} for x in losses]
    for name, text in rules.items():
        expected: Any = naive.truth(parse_formula(text), degrees)
        np.testing.assert_allclose(truth(got, name)[:, 0], expected, atol=1e-6, err_msg=name)
