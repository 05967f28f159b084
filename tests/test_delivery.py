"""Rows reach the host in order, each once, whatever the device, the plugins and the trainer do."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback import delivery
from moe_rules_callback.delivery import Delivery

RING, SOON = 8, 60.0  # rows; seconds that only a failing test waits


def soon() -> float:
    return time.monotonic() + SOON


def state(total: int) -> Any:
    """What is sent of a state after `total` rows; row i says that its step is 10 i."""
    step = np.full(RING, -1, np.int32)
    for row in range(max(0, total - RING), total):
        step[row % RING] = 10 * row
    return SimpleNamespace(rows=jnp.array(step)[:, None], row=jnp.int32(total))


class Receiver:
    """Keeps (row, step, time) of what is delivered, and can be held up."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.steps: list[int] = []
        self.times: list[float] = []
        self.rewinds: list[int] = []
        self.unsure: list[bool] = []
        self.called, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def unpack(self, rows: np.ndarray, numbers: np.ndarray, times: np.ndarray) -> Any:
        return numbers, rows[numbers % RING, 0], times

    def rewind(self, step: int) -> None:
        self.rewinds.append(step)

    def receive(self, records: Any, unsure: bool) -> None:
        self.unsure.append(unsure)
        self.called.set()
        assert self.go_on.wait(SOON)
        for kept, new in zip((self.rows, self.steps, self.times), records, strict=True):
            kept.extend(new.tolist())


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


@pytest.fixture
def deliver(receiver: Receiver) -> Iterator[Delivery]:
    made = Delivery(receiver.unpack, receiver.receive, receiver.rewind)
    yield made
    receiver.go_on.set()
    assert made.close(soon())


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch, receiver: Receiver) -> Iterator[Delivery]:
    """A delivery where one snapshot may wait, whose receiver holds row 0 and does not go on."""
    monkeypatch.setattr(delivery, "WAITING", 1)
    made = Delivery(receiver.unpack, receiver.receive, receiver.rewind)
    receiver.go_on.clear()
    made.send(state(1), 1)
    assert receiver.called.wait(SOON)
    yield made
    receiver.go_on.set()
    assert made.close(soon())


@pytest.mark.parametrize(
    "totals", [[1], [RING], [1, 2, 3], [0, 3, 3, 11, 19, 20], [8, 16, 24], [5, 13, 13, 14]]
)
def test_every_row_once_and_in_order(totals, receiver, deliver, caplog):
    for calls, total in enumerate(totals, 1):
        deliver.send(state(total), calls)
    assert deliver.wait(soon())
    assert receiver.rows == list(range(totals[-1]))
    assert receiver.steps == [10 * row for row in receiver.rows]
    assert caplog.messages == []


def test_a_snapshot_outlives_the_state_it_was_taken_from(receiver, deliver):
    given = state(3)
    deliver.send(given, 1)
    for array in (given.row, given.rows):
        array.delete()  # as a donation does
    assert deliver.wait(soon())
    assert receiver.steps == [0, 10, 20]


def test_times_are_spread_between_snapshots(receiver, monkeypatch):
    clock = iter([100.0, 104.0, 105.0])
    monkeypatch.setattr(delivery.time, "time", lambda: next(clock))
    deliver = Delivery(receiver.unpack, receiver.receive, receiver.rewind)
    deliver.send(state(4), 1)
    deliver.send(state(6), 2)
    assert deliver.close(soon())
    assert receiver.times == [101, 102, 103, 104, 104.5, 105]


def test_what_the_ring_lost_is_reported_once(receiver, deliver, caplog):
    for calls, total in enumerate([4, 20, 21, 60], 1):
        deliver.send(state(total), calls)
    assert deliver.wait(soon())
    assert receiver.rows == [*range(4), *range(12, 21), *range(52, 60)]
    assert receiver.steps == [10 * row for row in receiver.rows]
    assert caplog.messages == [
        "8 rows were overwritten before they were read: raise flush_every, or call drain more often"
    ]


def test_a_restored_state_brings_what_its_ring_holds(receiver, deliver, caplog):
    for calls, total in enumerate([5000, 5001, 5003], 1):
        deliver.send(state(total), calls)
    assert deliver.wait(soon())
    assert receiver.rows == list(range(4992, 5003))
    assert receiver.unsure == [True, False, False]
    assert caplog.messages == [
        "the state comes with 5000 rows and holds the last 8: the others were overwritten before they were "
        "read, or belong to the run that it was restored from"
    ]
    assert deliver.rows_per_call == 2  # not thousands


def test_a_state_that_starts_anew_is_delivered_from_its_start(receiver, deliver, caplog):
    for calls, total in enumerate([7, 2, 5], 1):
        deliver.send(state(total), calls)
    assert deliver.wait(soon())
    assert receiver.rows == [*range(7), 2, 3, 4]  # rows 0 and 1 are the same, bit by bit
    assert receiver.rewinds == [11]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("before", "restored", "after", "void", "again"),
    [
        (7, 5, 5, 41, []),  # no step since: what comes next replaces the rest
        (7, 5, 6, 50, [5]),
        (7, 5, 9, 50, [5, 6, 7, 8]),  # further than before
        (20, 14, 16, 140, [14, 15]),
        (20, 14, 24, None, [*range(16, 24)]),  # 14 and 15 were overwritten before anybody read them
        (40, 20, 24, None, [*range(16, 24)]),  # too far back to know where: all that the ring holds
        (7, 0, 3, None, [0, 1, 2]),
        (7, 0, 0, 0, []),
    ],
)
def test_a_trainer_that_goes_back(before, restored, after, void, again, receiver, deliver):
    def snapshot(total: int, taken_again: int) -> Any:
        of_step = np.asarray(state(total).rows)
        value = np.where(of_step >= 10 * taken_again, 1, 0)  # what those steps now give
        return SimpleNamespace(rows=jnp.array(np.hstack([of_step, value])), row=jnp.int32(total))

    deliver.send(snapshot(before, 1000), 1)
    deliver.send(snapshot(after, restored), 2)
    deliver.send(snapshot(after + 1, restored), 3)
    assert deliver.wait(soon())
    assert receiver.rows == [*range(max(0, before - RING), before), *again, after]
    assert receiver.rewinds == ([] if void is None else [void])
    assert receiver.unsure == [True, *([void is None] if again else []), False]  # then who receives looks


def test_rows_per_call_is_learned_from_two_snapshots(deliver):
    rates = []
    for calls, total in [(1, 3), (2, 6), (4, 12), (9, 12), (10, 17)]:
        deliver.send(state(total), calls)
        assert deliver.wait(soon())
        rates.append(deliver.rows_per_call)
    assert rates == [0, 3, 3, 3, 5]


def test_a_snapshot_is_wanted_when_none_has_come_for_long(receiver, monkeypatch):
    monkeypatch.setattr(delivery, "LONGEST", 0.01)
    deliver = Delivery(receiver.unpack, receiver.receive, receiver.rewind)
    deadline = soon()
    while not deliver.wanted:
        assert time.monotonic() < deadline
    deliver.send(state(2), 1)
    assert deliver.close(deadline)
    assert receiver.rows == [0, 1]


def test_sending_does_not_wait_for_a_slow_receiver(receiver, tight, caplog):
    for total in range(2, 41):
        tight.send(state(total), total)
    assert receiver.rows == []  # it was busy with row 0 all the time
    assert not tight.wait(time.monotonic() + 0.01)
    receiver.go_on.set()
    assert tight.wait(soon())
    tight.send(state(41), 41)
    assert tight.wait(soon())
    assert receiver.rows == [0, 1, *range(33, 41)]  # one snapshot waited, and the ring holds 8
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("31 rows were overwritten before they were read")


def test_the_last_snapshot_waits_for_a_place(receiver, tight):
    tight.send(state(2), 2)  # takes the only place
    threading.Thread(target=receiver.go_on.set).start()
    tight.send(state(5), 5, patience=SOON)
    assert tight.wait(soon())
    assert receiver.rows == list(range(5))


@pytest.mark.parametrize("error", [ValueError, SystemExit])
def test_an_exception_on_the_thread_is_reported_and_the_next_rows_come(
    error, receiver, deliver, caplog, monkeypatch
):
    def unpack(*_: Any) -> None:
        raise error("broken")

    with monkeypatch.context() as patch:
        patch.setattr(deliver, "_unpack", unpack)
        deliver.send(state(2), 1)
        assert deliver.wait(soon())
    deliver.send(state(3), 2)
    assert deliver.wait(soon())
    assert receiver.rows == [2]
    assert caplog.messages == ["rows of the audit could not be delivered; training goes on"]
    assert "broken" in caplog.text


def test_closing_gives_up_on_a_receiver_that_hangs_and_still_ends_the_thread(receiver, tight):
    assert not tight.close(time.monotonic() + 0.01)
    receiver.go_on.set()
    tight._thread.join(SOON)
    assert not tight._thread.is_alive()
