"""RuleAuditCallback beside the step: rows, metrics, closing, histories."""

from __future__ import annotations

import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import HOT, make

from moe_rules_callback import (
    HistoryError,
    MetricsError,
    Predicate,
    RuleAuditCallback,
    Rulebook,
    State,
    delivery,
    events,
    open_history,
)

SOON = 60.0  # seconds that only a failing test waits


@pytest.mark.skipif(
    jax.__version_info__ < (0, 10), reason="seen on 0.7.1: jit itself waits for a callback on CPU"
)
def test_on_step_returns_before_the_device_has_the_metrics(audit, seen):
    gate = threading.Event()

    @jax.jit
    def busy(a: jax.Array) -> jax.Array:  # a program whose arguments are ready may run before it returns
        return jax.lax.fori_loop(0, 200, lambda _, b: jnp.tanh(b @ a), a)[0, 0]

    @jax.jit
    def held(a: jax.Array) -> jax.Array:
        def wait(_: Any) -> np.ndarray:
            assert gate.wait(SOON)
            return np.array(7, np.float32)

        return jax.pure_callback(wait, jax.ShapeDtypeStruct((), jnp.float32), a)

    a = jnp.eye(400)
    gate.set()
    audit.on_step({"x": held(busy(a))})  # compiles
    audit.flush()
    gate.clear()
    pending = held(busy(a))
    for _ in range(9):  # more than two flushes
        audit.on_step({"x": pending})
    assert not pending.is_ready()
    assert len(seen.x) == 1
    gate.set()
    audit.flush()
    assert seen.x == [7] * 10


@pytest.mark.parametrize("steps", [1, 3, 4, 5, 8, 9])
def test_all_rows_once_and_in_order_around_a_flush(steps, seen):
    with make(seen) as audit:
        for x in range(steps):
            audit.on_step({"x": x})
    assert seen.steps == seen.x == list(range(steps))


def test_flush_history_and_closing_twice_neither_lose_nor_repeat_rows(audit, seen):
    for count in (1, 2, 4, 3):
        for _ in range(count):
            audit.on_step({"x": 0.0})
        audit.flush()
        assert audit.history.step.values.tolist() == seen.steps == list(range(seen.steps[-1] + 1))
    audit.flush()
    audit.on_step({"x": 0.0})
    audit.close()
    audit.close()
    audit.flush()
    assert audit.history.step.values.tolist() == seen.steps == list(range(11))
    assert (seen.events[0], seen.events[-1], seen.events.count("on_train_end")) == (
        "on_train_start", "on_train_end", 1,
    )  # fmt: skip


def test_steps_are_numbered_by_the_trainer_or_from_the_last(audit, seen):
    for step in (None, None, 1000, None, np.int64(5), jnp.int32(5), None):
        audit.on_step({"x": 0.0}, step)
    audit.flush()
    assert seen.steps == [0, 1, 1000, 1001, 5, 5, 6]  # recorded as they come


def test_a_scalar_may_be_of_any_kind_and_absent(audit, seen):
    given = [
        1.5, 2, True, 2**40, float("inf"), np.float64(0.1), np.float16(0.5), np.int64(3), np.array(4.0), None,
        jnp.float32(0.25), jnp.bfloat16(0.5), jnp.int32(6),
    ]  # fmt: skip
    for value in given:
        audit.on_step({"loss": 1.0} if value is None else {"loss": 1.0, "x": value})
    x = audit.history.signal_value.sel(signal="x", layer="model")
    expected = [np.nan if value is None else np.float32(value) for value in given]
    np.testing.assert_array_equal(x, expected)
    unknown = audit.history.state.sel(rule="hot") == State.UNKNOWN
    np.testing.assert_array_equal(unknown, ~np.isfinite(np.array(expected)))


def test_python_and_numpy_numbers_share_one_compilation(audit):
    for metrics in ({"x": 1}, {"x": 0.5}, {"x": np.float64(2)}, {}, {"x": True}):
        audit.on_step(metrics)
    assert audit._beside._row._cache_size() == 1


def test_a_scalar_that_comes_late_is_reported_once_and_left_out(audit, caplog):
    for metrics in ({"x": 0.0}, {"x": 0.0, "val_loss": 1.0}, {"x": 0.0, "val_loss": 1.0}):
        audit.on_step(metrics)
    assert "val_loss" not in audit.history.signal
    assert caplog.messages == [
        "not recorded, because the first step did not have it: val_loss. "
        "Pass float('nan') for what has no value yet."
    ]


@pytest.mark.parametrize("mode", [
    lambda: jax.debug_nans(True), lambda: jax.transfer_guard("disallow"), jax.checking_leaks, jax.disable_jit,
])  # fmt: skip
def test_a_trainer_that_looks_for_its_own_faults_does_not_find_them_here(mode, audit, seen):
    metrics = {"x": jnp.float32(1), "router_probs": jnp.full((2, 4), 0.25)}
    with mode():
        for _ in range(2):
            audit.on_step(metrics)
        audit.on_step({"router_probs": metrics["router_probs"]})
        audit.flush()
    np.testing.assert_array_equal(seen.x, [1, 1, np.nan])


@pytest.mark.parametrize(("given", "kind"), [(None, "NoneType"), (zip(), "zip"), ([1.0], "list")])
@pytest.mark.parametrize("steps_before", [0, 1])
def test_metrics_that_are_no_mapping(given, kind, steps_before):
    with make() as audit:
        for _ in range(steps_before):
            audit.on_step({"x": 0.0})
        with pytest.raises(MetricsError) as error:
            audit.on_step(given)
    assert str(error.value) == (
        f"the metrics are a {kind}; expected a mapping such as {{'loss': loss, 'router_probs': probs}}. "
        "Does the step return them, and in this place?"
    )


def test_on_step_inside_a_jitted_function(audit):
    @jax.jit
    def train_step(x: jax.Array) -> None:
        audit.on_step({"x": x})

    with pytest.raises(MetricsError) as error:
        train_step(jnp.float32(0))
    assert str(error.value) == (
        "on_step was called inside a function that JAX traces, where it would run once and never again. "
        "Return the metrics from the step and call on_step in the loop; or carry a state through it, "
        "state = audit.update(state, metrics), and call audit.drain(state) in the loop."
    )
    audit.on_step({"x": 0.0})  # nothing of the trace is left behind


def test_a_refused_step_leaves_the_audit_usable(audit, seen):
    def step(x: float, experts: int) -> None:
        audit.on_step({"x": x, "router_probs": np.full((2, experts), 0.25)})

    step(1, experts=4)
    with pytest.raises(MetricsError, match="the routers differ from those of the first step"):
        step(2, experts=3)
    step(3, experts=4)
    audit.flush()
    assert seen.x == [1, 3]


def test_an_exception_in_the_loop_closes_and_passes_on(seen):
    def train() -> None:
        with make(seen) as audit:
            audit.on_step({"x": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert seen.x == [1]
    assert seen.events[-1] == "on_train_end"


def test_sinks_are_closed_even_if_the_user_interrupts_the_waiting(seen, monkeypatch):
    def interrupted(self: delivery.Delivery, deadline: float) -> bool:
        raise KeyboardInterrupt

    audit = make(seen)
    audit.on_step({"x": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(delivery.Delivery, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            audit.close()
    assert seen.events[-1] == "on_train_end"
    assert audit._outgoing is not None
    audit._outgoing.wait(time.monotonic() + SOON, ending=True)


def test_without_a_step_nothing_is_started(seen):
    with make(seen) as audit, pytest.raises(HistoryError, match="no step has been taken"):
        _ = audit.history
    assert seen.events == []


@pytest.mark.parametrize("use", [lambda audit: audit.on_step({"x": 1.0}), lambda audit: audit.drain({})])
def test_a_closed_callback(use, audit):
    audit.close()
    with pytest.raises(HistoryError) as error:
        use(audit)
    assert str(error.value) == "this callback is closed: make a new one for another run."


def test_flush_every_counts_rows():
    with pytest.raises(ValueError, match="flush_every is 0; it counts rows and must be at least 1"):
        make(flush_every=0)


def test_a_slow_run_is_shown_now_and_then(seen, monkeypatch):
    monkeypatch.setattr("moe_rules_callback.delivery.LONGEST", 0.01)
    with make(seen, flush_every=10_000) as audit:
        deadline = time.monotonic() + SOON
        while not seen.steps:
            audit.on_step({"x": 0.0})
            time.sleep(0.01)
            assert time.monotonic() < deadline


def test_history_is_the_same_in_memory_and_on_disk(tmp_path):
    with make() as memory, make(logdir=tmp_path) as disk:
        for x in (0.0, -1.0, -0.2, -0.8, -0.6):
            memory.on_step({"x": x, "loss": 2 - x})
            disk.on_step({"x": x, "loss": 2 - x})
        live = disk.history.load()
    for history in (live, disk.history, open_history(tmp_path)):
        assert history.drop_vars("wall_time").equals(memory.history.drop_vars("wall_time"))
    assert sorted(path.name.split(".")[0] for path in tmp_path.iterdir()) == ["audit", "events"]


def test_a_run_that_resumes_replaces_what_came_after_its_checkpoint(tmp_path):
    for first, x in ((0, 0.0), (3, 1.0)):
        with make(logdir=tmp_path, sinks="zarr", resume=True) as audit:
            for step in range(first, first + 5):
                audit.on_step({"x": x}, step if step == first else None)
    history = open_history(tmp_path)
    assert history.step.values.tolist() == list(range(8))
    assert history.signal_value.sel(signal="x", layer="model").values.tolist() == [0] * 3 + [1] * 5


def test_a_run_that_resumes_with_another_curve_begins_a_linked_history(tmp_path, caplog):
    for offset in (-0.5, -0.4):
        rules = Rulebook("test", (HOT,), {"is_hot": Predicate("x", "low", offset)})
        with RuleAuditCallback(rules, logdir=tmp_path, sinks="zarr", resume=True) as audit:
            audit.on_step({"x": 0.0})
    assert audit.path == tmp_path / "audit-2.zarr"
    assert "cannot be continued: the offset of predicate 'is_hot' was -0.5 and is -0.4" in caplog.text
    assert open_history(tmp_path).attrs["continues"] == "audit.zarr"


def test_a_run_with_other_rules_begins_without_the_state_of_the_old_ones(caplog):
    with RuleAuditCallback({"r": "G(high_loss)"}) as audit:
        for _ in range(5):
            audit.on_step({"loss": 1.0})
        state = audit.state
    with RuleAuditCallback({"r": "F(high_loss)"}) as audit:
        audit.restore(state)
        audit.on_step({"loss": 1.0})
        assert audit.history.step.values.tolist() == [5]  # the trainer goes on from there
        (warning,) = caplog.messages
        assert warning.startswith("the state to restore is not one of this audit: its `ring` differs. Usual")
        assert warning.endswith("as it was then, or windows begin anew. This run begins so.")
        with pytest.raises(HistoryError, match="is not one of this audit"):
            audit.restore(state)


def test_history_where_nothing_could_be_written(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(events, "FURTHER_ATTEMPTS", 0.0)
    (tmp_path / "file").touch()
    with make(logdir=tmp_path / "file", sinks=["zarr"]) as audit:
        audit.on_step({"x": 0.0})
        with pytest.raises(HistoryError) as error:
            _ = audit.history
    assert str(error.value) == "there is no history: the zarr sink could not be started, the log says why."
    why = f"NotADirectoryError: [Errno 20] Not a directory: '{tmp_path / 'file' / 'audit.zarr' / 'step'}'"
    waits = f"plugin 'ZarrSink': 1 rows (steps 0 to 0) wait for it, which tries again after: {why}"
    assert caplog.messages == [
        f"plugin 'ZarrSink' raised in on_train_start and will be tried again: {why}. Training goes on, and "
        "up to 64 MiB of rows are kept for it",
        f"not everything is written yet: {waits}",
        f"the run has ended and not everything is written: {waits}",
    ]


def test_only_process_0_writes(monkeypatch, tmp_path, seen):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with make(seen, logdir=tmp_path) as audit:
        for _ in range(9):
            audit.on_step({"x": 1.0})
        audit.flush()
        with pytest.raises(HistoryError) as error:
            _ = audit.history
    assert str(error.value) == "only process 0 writes the history; read it there, or open its logdir."
    assert (seen.events, list(tmp_path.iterdir())) == ([], [])
