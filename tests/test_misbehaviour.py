"""Plugins and sinks that raise, hang, wait for themselves, or are slow: training goes on."""

from __future__ import annotations

import threading
import time

import pytest
from collector import Collector, make

from moe_rules_callback import RuleAuditCallback, hookimpl, outbox

SOON = 60.0  # seconds that only a failing test waits


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


class Hangs:
    """Does not return from a hook before it may."""

    def __init__(self, go_on: threading.Event) -> None:
        self.go_on = go_on

    @hookimpl
    def on_records(self) -> None:
        assert self.go_on.wait(SOON)


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
    (told,) = steps
    assert told[:4] == [0, 1, 2, 3]  # and what has been delivered since


def test_a_slow_sink_costs_rows_but_neither_time_nor_memory(seen, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "KEPT_BYTES", 500)
    called, go_on = threading.Event(), threading.Event()

    class Slow(Collector):
        __qualname__ = "Slow"

        @hookimpl
        def on_records(self, records) -> None:
            called.set()
            assert go_on.wait(SOON)
            super().on_records(records)

    slow = Slow()
    with make(seen, sinks=[slow]) as audit:
        for x in range(4):
            audit.on_step({"x": x})
        assert called.wait(SOON)
        for x in range(4, 40):
            audit.on_step({"x": x})  # each returns, although the sink does not
            while x % 4 == 3 and x not in seen.steps:
                time.sleep(0.001)
        audit.on_step({"x": 40})
        go_on.set()
    assert seen.steps == list(range(41))  # nobody else waits for it
    kept = slow.steps
    assert kept[:8] == list(range(8))  # the oldest
    assert kept[-1] == 40  # and the end
    missed = sorted(set(range(41)) - set(kept))
    assert missed == list(range(missed[0], missed[-1] + 1))
    assert caplog.messages == [
        "plugin 'Slow' does not keep up: 0 MiB of rows wait for it, and newer ones are dropped for it until "
        "it does; how many is told at the end of the run",
        "the run has ended and not everything is written: plugin 'Slow': it has missed "
        f"{len(missed)} rows (steps {missed[0]} to {missed[-1]}), because too many waited for it",
    ]


def test_a_sink_that_hangs_hangs_neither_the_trainer_nor_another_sink(seen, caplog, monkeypatch):
    monkeypatch.setattr("moe_rules_callback.callback.PATIENCE", 3.0)
    go_on = threading.Event()
    audit = make(seen, Hangs(go_on))
    audit.on_step({"x": 0.0})
    audit.flush()
    audit.close()
    go_on.set()
    why = "1 rows (steps 0 to 0) wait for it, which has not returned from on_records"
    assert caplog.messages == [
        f"not everything is written yet: plugin 'Hangs': {why}",
        f"the run has ended and not everything is written: plugin 'Hangs': {why}",
    ]
    assert (seen.steps, seen.events[-1]) == ([0], "on_train_end")
