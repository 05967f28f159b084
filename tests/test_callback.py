"""RuleAuditCallback: what a trainer may do to it, and that all rows arrive nevertheless."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import RULES, Collector

from moe_rules_callback import (
    HistoryError,
    MetricsError,
    RuleAuditCallback,
    State,
    delivery,
    hookimpl,
    open_history,
)

SOON = 60.0  # seconds that only a failing test waits


def make(*plugins: Any, flush_every: int = 4, **options: Any) -> RuleAuditCallback:
    return RuleAuditCallback(RULES, plugins=plugins, flush_every=flush_every, **options)


@pytest.fixture
def seen() -> Collector:
    return Collector()


@pytest.fixture
def audit(seen: Collector) -> Iterator[RuleAuditCallback]:
    with make(seen) as audit:
        yield audit


# Beside the step.


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
    assert audit._beside._update._cache_size() == 1


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
    def interrupted(self: delivery.Delivery, seconds: float) -> bool:
        raise KeyboardInterrupt

    audit = make(seen)
    audit.on_step({"x": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(delivery.Delivery, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            audit.close()
    assert seen.events[-1] == "on_train_end"
    assert audit._delivery is not None
    assert audit._delivery.close(SOON)


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


def test_a_slow_run_is_shown_now_and_then(audit, seen, monkeypatch):
    monkeypatch.setattr("moe_rules_callback.callback.FLUSH_SECONDS", 0.0)
    audit.on_step({"x": 0.0})
    assert audit._delivery is not None
    assert audit._delivery.wait(SOON)
    assert seen.steps == [0]


# Inside the step.


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
    state = audit._latest
    update = jax.jit(audit.update)
    for _ in range(12):
        audit.drain(state := update(state, {"x": 0.0}))
    audit.flush()
    assert [len(batch) for batch in seen.batches[before:]] == [4, 4, 4]


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


# Plugins and sinks that misbehave.


class Broken:
    """Raises in one hook."""

    def __init__(self, hook: str, error: BaseException) -> None:
        self.events: list[str] = []
        self.hook, self.error = hook, error

    def _raise(self, hook: str) -> None:
        self.events.append(hook)
        if hook == self.hook:
            raise self.error

    @hookimpl
    def on_train_start(self) -> None:
        self._raise("on_train_start")

    @hookimpl
    def on_step(self) -> None:
        self._raise("on_step")

    @hookimpl
    def on_records(self) -> None:
        self._raise("on_records")

    @hookimpl
    def on_alert(self) -> None:
        self._raise("on_alert")

    @hookimpl
    def on_train_end(self) -> None:
        self._raise("on_train_end")


@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit("broken")])
@pytest.mark.parametrize("hook", ["on_train_start", "on_step", "on_records", "on_alert", "on_train_end"])
def test_a_plugin_that_raises_is_named_once_and_switched_off(hook, error, caplog):
    before, broken, after = Collector(), Broken(hook, error), Collector()
    with make(before, broken, after, flush_every=2) as audit:
        for x in (-1.0, 0.0, -1.0, 0.0):
            audit.on_step({"x": x})
            audit.flush()
    for other in (before, after):
        assert (other.x, len(other.alerts), other.events[-1]) == ([-1, 0, -1, 0], 1, "on_train_end")
    assert broken.events.count(hook) == 1
    assert broken.events[-1] == hook
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage() for record in errors] == [
        f"plugin 'Broken' raised in {hook} and is switched off; training goes on"
    ]
    assert "broken" in caplog.text


@pytest.mark.parametrize("wait", [RuleAuditCallback.flush, RuleAuditCallback.close])
def test_a_plugin_cannot_wait_for_itself(wait, caplog):
    class Waits:
        @hookimpl
        def on_records(self) -> None:
            wait(audit)

    with make(Waits()) as audit:
        audit.on_step({"x": 0.0})
    assert "plugin 'test_a_plugin_cannot_wait_for_itself.<locals>.Waits' raised in on_records" in caplog.text
    assert (
        "flush and close wait until on_records and on_alert have returned, so a plugin cannot call them "
        "there. To stop training, set a flag that the loop looks at."
    ) in caplog.text


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_plugin_may_look_at_the_history(on_disk, tmp_path):
    steps = []

    class Looks:
        @hookimpl
        def on_alert(self) -> None:
            steps.append(audit.history.step.values.tolist())

    with make(Looks(), logdir=tmp_path if on_disk else None) as audit:
        for x in (0, 0, -1, 0, 0, -1):
            audit.on_step({"x": x})
    assert steps == [[0, 1, 2, 3]]


def test_a_slow_sink_costs_rows_but_neither_time_nor_memory(seen, caplog, monkeypatch):
    monkeypatch.setattr(delivery, "WAITING", 2)
    called, go_on = threading.Event(), threading.Event()

    class Slow:
        @hookimpl
        def on_records(self) -> None:
            called.set()
            assert go_on.wait(SOON)

    with make(seen, sinks=[Slow()]) as audit:
        for x in range(4):
            audit.on_step({"x": x})
        assert called.wait(SOON)
        for x in range(4, 41):
            audit.on_step({"x": x})  # each returns, although the sink does not
        go_on.set()
    assert seen.steps == seen.x
    assert seen.steps[:12] == list(range(12))  # the snapshots that waited
    assert seen.steps[-8:] == list(range(33, 41))  # and the last one, for which closing waits
    assert len(seen.steps) < 41
    assert [message.split(":")[0] for message in caplog.messages] == [
        f"{41 - len(seen.steps)} rows were overwritten before they were read"
    ]


def test_a_sink_that_hangs_does_not_hang_the_trainer(caplog, monkeypatch):
    monkeypatch.setattr("moe_rules_callback.callback.PATIENCE", 0.01)
    go_on = threading.Event()

    class Hangs:
        @hookimpl
        def on_records(self) -> None:
            assert go_on.wait(SOON)

    audit = make(Hangs())
    audit.on_step({"x": 0.0})
    audit.flush()
    audit.close()
    go_on.set()
    assert caplog.messages == [
        "the sinks did not take all rows within 0 s",
        "closing, although the sinks did not take all rows within 0 s",
    ]


# Histories.


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


def test_history_where_nothing_could_be_written(tmp_path, caplog):
    (tmp_path / "file").touch()
    with make(logdir=tmp_path / "file", sinks=["zarr"]) as audit:
        audit.on_step({"x": 0.0})
        with pytest.raises(HistoryError) as error:
            _ = audit.history
    assert str(error.value) == "there is no history: the zarr sink could not be started, the log says why."
    assert caplog.messages == [
        "plugin 'ZarrSink' raised in on_train_start and is switched off; training goes on"
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


# In other interpreters.


def run(program: str, *arguments: Any, code: int = 0, **environment: str) -> str:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    path = f"{Path(__file__).parents[1]}:{Path(__file__).parent}"
    environment = {"PATH": "", "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


NEVER_CLOSED = """
import sys, threading
from collector import RULES
from moe_rules_callback import RuleAuditCallback

def train(directory):
    audit = RuleAuditCallback(RULES, logdir=directory, flush_every=4)
    for x in range(10):
        audit.on_step({"x": x})
    return audit

audit = train(sys.argv[1])
raise RuntimeError("training broke")
"""

ON_A_THREAD = """
import threading
from collector import RULES, Collector
from moe_rules_callback import RuleAuditCallback

class Prints(Collector):
    from moe_rules_callback import hookimpl

    @hookimpl
    def on_train_end(self):
        print(self.steps)

def train():
    audit = RuleAuditCallback(RULES, plugins=[Prints()])
    for x in range(1000):
        audit.on_step({"x": x})

threading.Thread(target=train).start()
"""

EIGHT_DEVICES = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from moe_rules_callback import RuleAuditCallback, delivery

rules = {"sure": "high_routing_confidence"}
probs = np.random.default_rng(0).dirichlet(np.ones(4), (5, 2, 16)).astype(np.float32)

def history(place, scalar):
    with RuleAuditCallback(rules, flush_every=2, top_k=1) as audit:
        for i in range(5):
            audit.on_step({"loss": scalar(1.0 / (1 + i)), "router_probs": place(probs[i])})
            assert len(audit._latest.row.devices()) == len(place(probs[i]).devices())
        return audit.history.drop_vars("wall_time")

def on_one_device(rows, row, copy=delivery._copy):  # where the others belong to other processes
    assert len(row.devices()) == len(rows.values.devices()) == 1
    return copy(rows, row)

delivery._copy = on_one_device
expected = history(jnp.asarray, float)
third = jax.devices()[3]
ways = {"another device": (lambda x: jax.device_put(x, third), lambda x: jax.device_put(x, third))}
auto, explicit = (AxisType.Auto,) * 2, (AxisType.Explicit,) * 2
for kind, spec in (auto, P()), (auto, P("data", None, "model")), (explicit, P("data", "model")):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=kind)
    ways[f"{kind} {spec}"] = (
        lambda x, s=NamedSharding(mesh, spec): jax.device_put(x, s),
        lambda x, s=NamedSharding(mesh, P()): jax.device_put(jnp.float32(x), s),
    )
for way, (place, scalar) in ways.items():
    found = history(place, scalar)
    for name in expected.data_vars:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6, err_msg=f"{way} {name}")
"""


@pytest.mark.slow
def test_a_callback_that_nobody_closes_writes_everything_at_exit(tmp_path):
    output = run(NEVER_CLOSED, tmp_path, code=1)
    assert output.count("Traceback") == 1
    assert "training broke" in output
    assert open_history(tmp_path).step.values.tolist() == list(range(10))
    assert [path.name for path in tmp_path.glob("audit*")] == ["audit.zarr"]


@pytest.mark.slow
def test_training_may_go_on_in_a_thread_when_the_main_one_has_ended():
    assert run(ON_A_THREAD) == f"{list(range(1000))}\n"


@pytest.mark.slow
def test_metrics_may_be_sharded_over_eight_devices():
    assert run(EIGHT_DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=8") == ""
