"""From the ring on the device to the plugins on the host, off the training thread.

The training thread only copies the ring on the device, starts the copy to the host and puts it in a
queue. This thread waits for it, unpacks the rows it has not seen, and calls the plugins.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from .plan import AuditState, Rows
from .records import Records

log = logging.getLogger("moe_rules_callback")
WAITING = 64  # snapshots that may wait for a slow sink before rows are given up


@jax.jit
def _copy(rows: Rows, row: jax.Array) -> tuple[Rows, jax.Array]:
    """A copy that outlives the donation of the state to the next step."""
    return jax.tree.map(jnp.copy, (rows, row))


class Delivery:
    """Delivers finished rows in order, each once.

    Args:
        unpack: (ring, row numbers, wall times) -> Records.
        receive: called with each batch, on the delivery's own thread.
    """

    def __init__(
        self,
        unpack: Callable[[Rows, np.ndarray, np.ndarray], Records],
        receive: Callable[[Records], None],
    ) -> None:
        self._unpack, self._receive = unpack, receive
        self._queue: queue.Queue[tuple[Rows, jax.Array, float] | None] = queue.Queue(WAITING)
        self._seen = 0
        self._time = time.time()
        self._lost = 0
        self._thread = threading.Thread(target=self._run, name="moe-rules-delivery", daemon=True)
        self._thread.start()

    @property
    def rows(self) -> int:
        """Rows known to have been computed; lags behind the device."""
        return self._seen

    def send(self, state: AuditState) -> None:
        """Take a snapshot of the ring; does not wait for the device nor for the sinks."""
        rows, row = _copy(state.rows, state.row)
        for array in jax.tree.leaves((rows, row)):
            array.copy_to_host_async()
        try:
            self._queue.put_nowait((rows, row, time.time()))
        except queue.Full:  # the ring still holds these rows; what it loses is counted in _run
            log.debug("sinks are slow: %d snapshots are waiting", WAITING)

    def wait(self, seconds: float) -> bool:
        """Wait until all that was sent is delivered; False when that took too long."""
        deadline = time.monotonic() + seconds
        while self._queue.unfinished_tasks and self._thread.is_alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    def close(self, seconds: float) -> bool:
        """Deliver what was sent and end the thread; False when that took too long."""
        if done := self.wait(seconds):
            self._queue.put(None)
            self._thread.join(seconds)
        return done

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._deliver(*item)
            except Exception:
                log.exception("rows of the audit could not be delivered; training goes on")
            finally:
                self._queue.task_done()
        self._queue.task_done()

    def _deliver(self, rows: Rows, row: jax.Array, now: float) -> None:
        total = int(row)
        first = max(self._seen, total - len(rows.step))
        if first > self._seen:
            if not self._lost:
                log.warning(
                    "%d rows were overwritten before they were read: flush more often, or make the sinks faster",
                    first - self._seen,
                )
            self._lost += first - self._seen
        if total > first:
            numbers = np.arange(first, total)
            span = np.linspace(self._time, now, total - self._seen + 1)[1:]
            host = jax.tree.map(np.asarray, rows)
            self._seen, self._time = total, now
            self._receive(self._unpack(host, numbers, span[-len(numbers) :]))
