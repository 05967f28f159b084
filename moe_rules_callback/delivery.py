"""From the ring on the device to the plugins on the host, off the training thread.

The training thread only copies the ring on the device, starts the copy to the host and puts it in a
queue. This thread waits for it, unpacks the rows it has not seen, and hands them on.

When the trainer restores an older state, rows come again. They are known by the ring, which holds other rows
then, or fewer, than those that were read before.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .records import Records
from .state import AuditState

log = logging.getLogger("moe_rules_callback")
LONGEST = 10.0  # seconds between two snapshots: a slow run is shown at least so often
WAITING = 16  # snapshots that may wait, for a device that is behind, before rows are given up

Snapshot = tuple[jax.Array, tuple[int, ...], int, float]  # copy, shape of the ring, calls so far, time


@jax.jit
def _copy(rows: jax.Array, row: jax.Array) -> jax.Array:
    """A copy that outlives the donation of the state to the next step; one array, since each costs its own
    way to the host."""
    return jnp.append(rows, row)


def _local(array: jax.Array) -> jax.Array:
    """A replicated array on one device: a program that one process runs must not span the others' devices."""
    return array.addressable_data(0) if array.is_fully_replicated else array


class Delivery:
    """Delivers finished rows in order, each once.

    Args:
        unpack: (ring, row numbers, wall times) -> Records.
        receive: called with each batch, on the delivery's own thread; and whether its first rows may have
            been read before, since they come with a state that was restored.
        rewind: called there with a step, before rows that replace those from this step on.
        resumed: whether a state that comes with rows is expected.

    Attributes:
        rows_per_call: rows that a call of the trainer brings at most; 0 until two snapshots have been read.
        wanted: whether a snapshot is wanted before it is due, because the last is long ago. For whoever sends
            to look at and to clear: to look at the clock in every step would cost more.
    """

    def __init__(
        self,
        unpack: Callable[[np.ndarray, np.ndarray, np.ndarray], Records],
        receive: Callable[[Records, bool], None],
        rewind: Callable[[int], None],
        resumed: bool = False,
    ) -> None:
        self._unpack, self._receive, self._rewind, self._resumed = unpack, receive, rewind, resumed
        self._queue: queue.Queue[Snapshot | None] = queue.Queue(WAITING)
        self._seen: int | None = None  # rows that are done with
        self._ring = np.zeros((0, 0), np.int32)  # as it was then
        self._calls = 0  # of the trainer, when the last snapshot was taken
        self.rows_per_call = 0
        self.wanted = False
        self._time = time.time()
        self._sent = time.monotonic()
        self._told = False
        self._thread = threading.Thread(target=self._run, name="moe-rules-delivery", daemon=True)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether there is no place for a snapshot, because the device is behind."""
        return self._queue.full()

    def send(self, state: AuditState, calls: int, patience: float = 0.0) -> None:
        """Take a snapshot of the ring; does not wait for the device.

        Args:
            state: what holds the ring.
            calls: how often the trainer has called so far.
            patience: seconds to wait when the queue is full; then the snapshot is left out.
        """
        self._sent = time.monotonic()
        copy = _copy(_local(state.rows), _local(state.row))
        copy.copy_to_host_async()
        try:
            self._queue.put((copy, state.rows.shape, calls, time.time()), timeout=patience)
        except queue.Full:  # the next snapshot may still hold these rows; _deliver reports those it does not
            log.debug("the device is behind: %d snapshots are waiting", WAITING)

    def wait(self, deadline: float) -> bool:
        """Wait until all that was sent is delivered; False when it is not at the deadline.

        Args:
            deadline: of `time.monotonic`.
        """
        while self._queue.unfinished_tasks and self._thread.is_alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def close(self, deadline: float) -> bool:
        """Deliver what was sent and end the thread; False when it is not done at the deadline."""
        done = self.wait(deadline)
        with contextlib.suppress(queue.Full):  # full only if the device hangs; then the daemon is left alone
            self._queue.put_nowait(None)
        if done:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        return done

    def _run(self) -> None:
        while (item := self._next()) is not None:
            try:
                self._deliver(*item)
            except BaseException:  # nobody else would hear of it, and whoever waits would wait in vain
                log.exception("rows of the audit could not be delivered; training goes on")
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _next(self) -> Snapshot | None:
        try:
            return self._queue.get(timeout=max(0.0, self._sent + LONGEST - time.monotonic()))
        except queue.Empty:
            self.wanted = True
        return self._queue.get()

    def _deliver(self, copy: jax.Array, shape: tuple[int, ...], calls: int, now: float) -> None:
        flat = jax.device_get(copy)  # not np.asarray, which a transfer guard may forbid
        host, total = flat[:-1].reshape(shape), int(flat[-1])
        oldest = max(0, total - len(host))
        unsure = self._seen is None
        if self._seen is None:  # a new state, or a restored one: all that it holds
            if oldest and not self._resumed:
                log.warning(
                    "the state comes with %d rows and holds the last %d: the others were overwritten before "
                    "they were read, or belong to the run that it was restored from",
                    total, total - oldest,
                )  # fmt: skip
            self._seen = oldest
        elif (branch := self._branch(host, total)) is not None:
            self._seen, unsure = branch, branch == oldest < total
            if not unsure:
                last = min(branch, total - 1)  # the first number of a row is its step
                self._rewind(int(host[last % len(host), 0]) + branch - last if total else 0)
        elif calls > self._calls:
            rate = -(-(total - self._seen) // (calls - self._calls))
            self.rows_per_call = max(self.rows_per_call, rate, 1)
        first = max(self._seen, oldest)
        if first > self._seen and not self._told:
            self._told = True
            log.warning(
                "%d rows were overwritten before they were read: raise flush_every, or call drain more often",
                first - self._seen,
            )
        numbers = np.arange(first, total)
        times = self._time + (numbers + 1 - self._seen) * ((now - self._time) / max(1, total - self._seen))
        self._seen, self._calls, self._time, self._ring = total, calls, now, host
        if len(numbers):
            self._receive(self._unpack(host, numbers, times), unsure)

    def _branch(self, ring: np.ndarray, total: int) -> int | None:
        """The first row that is not the one that was read before, if an older state was restored since.

        Rows that agree bit by bit are the same, whether they were computed once or twice.
        """
        assert self._seen is not None
        held, oldest = len(ring), max(0, total - len(ring))
        common = np.arange(max(oldest, self._seen - held), min(self._seen, total))
        differ = (ring != self._ring).any(axis=1)[common % held]
        if total >= self._seen and not differ.any():
            return None
        if not len(common) or differ[0]:
            return oldest  # or before it
        return int(common[differ.argmax()]) if differ.any() else total
