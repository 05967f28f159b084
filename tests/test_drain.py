"""The audit inside the step: `drain` finds its state and reads its rows, each once and in order."""

from __future__ import annotations

import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import make

from moe_rules_callback import (
    MetricsError,
    RuleAuditCallback,
)
from moe_rules_callback.delivery import Delivery


def train(audit: RuleAuditCallback, calls: int, rows: int, wrap=lambda state: state) -> None:
    """`calls` calls of a jitted, donating function that takes `rows` steps each."""

    def call(state: Any, x: jax.Array) -> Any:
        def step(state: Any, x: jax.Array) -> tuple[Any, None]:
            return audit.update(state, {"x": x}), None

        return jax.lax.scan(step, state, x)[0]

    call = jax.jit(call, donate_argnums=0)
    state = audit.init({"x": jax.ShapeDtypeStruct((), jnp.float32)})
    for i in range(calls):
        state = call(state, jnp.arange(i * rows, (i + 1) * rows, dtype=jnp.float32))
        audit.drain(wrap(state))


@pytest.mark.parametrize(("calls", "rows"), [(11, 1), (9, 3), (7, 6), (5, 8)])
def test_drain_keeps_up_with_the_rows_of_a_call(calls, rows, audit, seen, caplog):
    train(audit, calls, rows)
    audit.close()
    assert seen.steps == seen.x == list(range(calls * rows))
    assert caplog.messages == []


def test_drain_does_not_send_more_often_than_it_must(audit, seen):
    train(audit, 3, 1)
    audit.flush()
    before = len(seen.batches)
    state = audit._outgoing.latest
    update = jax.jit(audit.update)
    for _ in range(12):
        audit.drain(state := update(state, {"x": 0.0}))
    audit.flush()
    assert [len(batch) for batch in seen.batches[before:]] == [4, 4, 4]


def test_drain_keeps_up_where_calls_of_many_rows_and_of_one_take_turns(audit, seen, caplog):
    state = audit.init({"x": jax.ShapeDtypeStruct((), jnp.float32)})
    step = jax.jit(lambda state, x: jax.lax.scan(lambda s, x: (audit.update(s, {"x": x}), None), state, x)[0])
    rows = [6, 6, 6, *[1] * 12] * 3
    for n in rows:
        audit.drain(state := step(state, jnp.zeros(n)))
        assert audit._outgoing._delivery.wait(time.monotonic() + 60)  # as fast as the trainer
    audit.close()
    assert seen.steps == list(range(sum(rows)))
    assert caplog.messages == []


def test_drain_sends_at_once_what_is_wanted(audit, seen):
    train(audit, 2, 1)
    audit.flush()
    before = len(seen.batches)
    state, update = audit._outgoing.latest, jax.jit(audit.update)
    for call in range(4):
        audit._outgoing._delivery.wanted |= call == 1
        audit.drain(state := update(state, {"x": 0.0}))
    audit.flush()
    assert [len(batch) for batch in seen.batches[before:]] == [2, 2]
    assert not audit._outgoing._delivery.wanted


def test_the_last_rows_come_although_the_device_was_behind(audit, seen, monkeypatch):
    computed, deliver = threading.Event(), Delivery._deliver

    def late(self, *snapshot):
        computed.wait(60)
        deliver(self, *snapshot)

    monkeypatch.setattr(Delivery, "_deliver", late)
    train(audit, 22, 1)
    threading.Timer(0.2, computed.set).start()
    audit.close()
    assert seen.steps[-8:] == list(range(14, 22))


def test_drain_reports_once_what_a_call_of_many_rows_overwrote(audit, seen, caplog):
    train(audit, 3, 20)
    audit.close()
    assert seen.steps == seen.x == [*range(12, 20), *range(32, 40), *range(52, 60)]
    assert [message.split(":")[0] for message in caplog.messages] == [
        "the state comes with 20 rows and holds the last 8",
        "12 rows were overwritten before they were read",
    ]


class Optimizer(NamedTuple):
    step: int
    inner: Any


@pytest.mark.parametrize("wrap", [
    lambda state: {"params": np.zeros(3), "audit": state},
    lambda state: (None, [state]),
    lambda state: Optimizer(3, Optimizer(4, state)),
])  # fmt: skip
def test_drain_finds_the_state_in_a_tree(wrap, audit, seen):
    train(audit, 3, 2, wrap)
    audit.close()
    assert seen.steps == list(range(6))


def test_drain_without_a_state_says_so_and_closing_does_not_say_it_again(seen):
    audit = make(seen)
    audit.init({"x": 0.0})
    with pytest.raises(MetricsError) as error, audit:
        audit.drain({"params": np.zeros(3)})
    assert str(error.value) == (
        "drain found no AuditState in what it was given. Pass the state that audit.update returned, or the "
        "optimizer state of a transformation made with moe_rules_callback.integrations.optax."
    )
    assert seen.events == ["on_train_start", "on_train_end"]


def test_drain_in_a_function_that_is_traced(seen):
    audit = make(seen)
    state = audit.init({"x": 0.0})

    @jax.jit
    def step(state):
        audit.drain(state := audit.update(state, {"x": 0.0}))
        return state

    with pytest.raises(MetricsError) as error:
        step(state)
    assert str(error.value) == (
        "drain was called inside a function that JAX traces, where it would run once and never again. Return "
        "the state from the step and call audit.drain(state) in the loop."
    )
    audit.drain(audit.update(state, {"x": 1.0}))
    audit.close()
    assert seen.x == [1.0]


def test_drain_before_init(audit):
    with pytest.raises(MetricsError, match="has not seen any metrics yet"):
        audit.drain({})


def test_closing_after_the_state_was_donated_keeps_what_was_drained(audit, seen):
    step = jax.jit(audit.update, donate_argnums=0)
    state = audit.init({"x": 0.0})
    audit.drain(state := step(state, {"x": 0.0}))
    audit.flush()
    audit.drain(state := step(state, {"x": 0.0}))
    audit.drain(state := step(state, {"x": 0.0}))
    audit.flush()
    audit.drain(state := step(state, {"x": 0.0}))
    step(state, {"x": 0.0})  # an exception may well come after this
    audit.close()
    assert seen.steps == [0, 1, 2]
    assert seen.events[-1] == "on_train_end"
