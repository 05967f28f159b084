"""A plugin's own thread: what waits for it, what is tried again, what is given up."""

from __future__ import annotations

import threading
import time
from typing import Any

import fake_records as fake
import pytest

from moe_rules_callback import outbox
from moe_rules_callback.errors import TryAgain
from moe_rules_callback.outbox import Outbox

SOON = 60.0  # seconds that only a failing test waits


def soon() -> float:
    return time.monotonic() + SOON


class Plugin:
    """Keeps what it is told; fails or hangs when asked to."""

    def __init__(self) -> None:
        self.told: list[Any] = []
        self.errors: list[BaseException] = []  # to be raised, one a call
        self.attempts = 0
        self.called, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def on_records(self, records: Any) -> None:
        self._do(records.step.tolist())

    def on_rewind(self, step: int) -> None:
        self._do(step)

    def _do(self, told: Any) -> None:
        self.attempts += 1
        self.called.set()
        assert self.go_on.wait(SOON)
        if self.errors:
            raise self.errors.pop(0)
        self.told.append(told)


@pytest.fixture
def plugin() -> Plugin:
    return Plugin()


@pytest.fixture
def off() -> set[str]:
    return set()


@pytest.fixture
def box(plugin: Plugin, off: set[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(outbox, "FIRST_DELAY", 0.01)
    made = Outbox("Plugin", {"on_records": plugin.on_records, "on_rewind": plugin.on_rewind}, off)
    yield made
    plugin.go_on.set()
    made.end()
    made._thread.join(SOON)
    assert not made._thread.is_alive()


RECORDS = fake.make_records(40)
SIZE = outbox._Event("on_records", {"records": RECORDS[:2]}).size


def give(box: Outbox, *batches: int) -> None:
    """The batches of two rows with these numbers."""
    for batch in batches:
        box.put("on_records", records=RECORDS[2 * batch : 2 * batch + 2])


def test_events_come_in_order_and_only_those_it_has_a_hook_for(box, plugin):
    give(box, 0)
    box.put("on_rewind", step=1)
    box.put("on_alert", alert=None)
    give(box, 1)
    assert box.wait(soon())
    assert plugin.told == [[0, 1], 1, [2, 3]]
    assert box.complaint() == ""


def test_what_is_tried_again_comes_once_and_nothing_overtakes_it(box, plugin, caplog):
    cause = ConnectionError("no route")
    plugin.errors = [TryAgain("no route") for _ in range(3)]
    plugin.errors[0].__cause__ = cause
    give(box, 0, 1)
    assert box.wait(soon(), attempts_until=soon())
    assert (plugin.told, plugin.attempts) == ([[0, 1], [2, 3]], 5)
    assert caplog.messages == [
        "plugin 'Plugin' raised in on_records and will be tried again: no route. Training goes on, and up to "
        "64 MiB of rows are kept for it"
    ]
    assert caplog.records[0].exc_info[1] is cause


def test_whoever_waits_for_a_plugin_that_fails_gets_one_attempt(box, plugin, monkeypatch):
    monkeypatch.setattr(outbox, "FIRST_DELAY", SOON)
    plugin.errors = [TryAgain("full"), TryAgain("full")]
    give(box, 0)
    assert not box.wait(soon())
    assert box.complaint() == (
        "plugin 'Plugin': 2 rows (steps 0 to 1) wait for it, which tries again after: full"
    )
    box.wait(soon())
    assert box.wait(soon())  # at once, not after the delay
    assert plugin.told == [[0, 1]]


def test_a_plugin_that_raises_is_off_and_what_it_missed_is_counted(box, plugin, off, caplog):
    plugin.errors = [ValueError("broken")]
    plugin.go_on.clear()
    give(box, 0, 1, 2)
    plugin.go_on.set()
    assert box.wait(soon())
    give(box, 3)
    assert box.wait(soon())
    assert (plugin.told, plugin.attempts, off) == ([], 1, {"Plugin"})
    assert caplog.messages == ["plugin 'Plugin' raised in on_records and is switched off; training goes on"]
    assert box.complaint() == (
        "plugin 'Plugin': it has missed 8 rows (steps 0 to 7), because it was switched off"
    )


def test_when_too_much_waits_the_oldest_and_the_newest_are_kept(box, plugin, caplog, monkeypatch):
    monkeypatch.setattr(outbox, "KEPT_BYTES", 4 * SIZE)
    plugin.go_on.clear()
    give(box, *range(4))
    box.put("on_rewind", step=99)  # never given up
    give(box, *range(4, 12))
    assert box._bytes <= 5 * SIZE
    assert len(caplog.messages) == 1
    plugin.go_on.set()
    assert box.wait(soon())
    assert plugin.told == [[0, 1], [2, 3], [4, 5], [6, 7], 99, [22, 23]]
    assert box.complaint() == (
        "plugin 'Plugin': it has missed 14 rows (steps 8 to 21), because too many waited for it"
    )
    give(box, 12)
    assert box.wait(soon())
    assert plugin.told[-1] == [24, 25]


def test_one_that_hangs_is_waited_for_once(box, plugin):
    plugin.go_on.clear()
    give(box, 0)
    assert plugin.called.wait(SOON)
    assert not box.wait(time.monotonic() + 0.01)
    give(box, 1)
    began = time.monotonic()
    assert not box.wait(soon())
    assert time.monotonic() - began < SOON / 2
    assert box.complaint() == (
        "plugin 'Plugin': 4 rows (steps 0 to 3) wait for it, which has not returned from on_records"
    )
    plugin.go_on.set()
    deadline = soon()
    while plugin.told != [[0, 1], [2, 3]]:
        assert time.monotonic() < deadline
    assert box.wait(soon())


def test_a_file_system_that_flickers_is_reported_once(box, plugin, caplog):
    for batch in range(4):
        plugin.errors = [TryAgain("timeout")]
        give(box, batch)
        assert box.wait(soon(), attempts_until=soon())
    assert len(plugin.told) == 4
    assert len(caplog.messages) == 1


def test_one_that_hangs_is_named_once_while_the_run_goes_on(box, plugin, caplog, monkeypatch):
    plugin.go_on.clear()
    give(box, 0)
    assert plugin.called.wait(SOON)
    give(box, 1)
    assert caplog.messages == []
    monkeypatch.setattr(outbox, "LONG", 0.0)
    give(box, 2, 3)
    assert caplog.messages == [
        "plugin 'Plugin' has been in on_records for 0 s; training goes on, and up to 64 MiB of rows are kept "
        "for it"
    ]


def test_a_plugin_that_was_switched_off_elsewhere_gets_nothing_more(box, plugin, off):
    plugin.go_on.clear()
    give(box, 0, 1)
    assert plugin.called.wait(SOON)
    off.add("Plugin")  # as `on_step` does when it raises, on the trainer's thread
    plugin.go_on.set()
    assert box.wait(soon())
    assert plugin.attempts == 1
