"""From the forwards of a watched function to the rows of an audit, on a thread of their own.

    forward, forward, on_step, forward, forward, on_step       two forwards to a row

What the device delivers and what the trainer's hook says come in two queues at their own paces. The n-th
row takes the n-th group of forwards and the n-th call of the hook: nobody has to wait for anybody.

Rows are fed in blocks, since a dispatch costs as much as what it computes. The first goes alone, so that
what is wrong shows at once, and no row waits long for its block.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax._src.dispatch import runtime_tokens  # has no public name
from jax.core import Tracer

from .beside import TRACED, Step
from .checks import check_alive, named, step_number
from .errors import MetricsError
from .metrics import scalars
from .tracing.watch import Reduced, metric_of

log = logging.getLogger("moe_rules_callback")
MANY = 256  # calls of a hook without a row, after which something is wrong
ALONE = 16  # rows that wait for the first call of a hook before it is taken that there is none
BLOCK = 16  # rows that are fed together
LONGEST = 2.0  # seconds that a row waits for its block

Feed = Callable[[Sequence[Step]], None]


class Watched:
    """Groups forwards into rows.

    Args:
        forwards_per_step: forwards that make one row.
        feed: called with rows on the host, in order, one or a block of them, on this object's thread.
        block: rows of a block.
        kept: whether there are to be rows; of several processes one alone is sure to get all forwards.
    """

    def __init__(self, forwards_per_step: int, feed: Feed, block: int = BLOCK, kept: bool = True) -> None:
        self._per_step, self._feed, self._block, self._kept = forwards_per_step, feed, block, kept
        self._tasks: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._reduced: list[Reduced] = []
        self._totals: list[np.ndarray] = []
        self._forwards = 0
        self._rows: deque[dict[str, Any]] = deque()
        self._hooks: deque[tuple[dict[str, Any], Any]] = deque()
        self._hooked: bool | None = None  # whether on_step is called; None: it may still be
        self._ready: list[Step] = []
        self._full, self._since = 1, 0.0  # how many of them to feed at once, and when the first became ready
        self._error: Exception | None = None
        self._told = False
        self._thread = threading.Thread(target=self._run, name="moe-rules-watch", daemon=True)
        self._thread.start()

    def deliver(self, reduced: Sequence[Reduced], arrays: Sequence[Any]) -> None:
        """Take in a forward."""
        if self._kept:
            self._tasks.put(partial(self._forward, list(reduced), arrays))

    def hook(self, metrics: Mapping[str, Any], step: Any) -> None:
        """Take in a call of the trainer's hook; does not wait for its arrays.

        Raises:
            MetricsError: something else than scalars, a step that is no number of a step; or what went
                wrong with an earlier row. Its row then comes without scalars, and later ones with theirs.
        """
        call: tuple[dict[str, Any], Any] = {}, None
        try:
            call = _call(metrics, step)
        finally:
            if self._kept:
                self._tasks.put(partial(self._called, *call))
        self.check()

    def check(self) -> None:
        """Raise what went wrong on the thread, once."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def settle(
        self, then: Callable[[], None], deadline: float, ending: bool = False, patient: bool = False
    ) -> bool:
        """Wait until all forwards so far have become rows, then run `then` on the thread.

        Args:
            then: what is to be done with the rows.
            deadline: of `time.monotonic`; False is returned when it is reached.
            ending: rows no longer wait for the hook, and the thread ends.
            patient: the first row goes on waiting for its call of the hook, which may come yet.
        """
        if not _within(deadline, partial(jax.block_until_ready, _effects())):  # until all is delivered
            return False
        self._tasks.put(partial(self._release, ending, int(patient)))
        self._tasks.put(then)
        if ending:
            self._tasks.put(None)
        while self._tasks.unfinished_tasks and self._thread.is_alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.002)
        return True

    # On the thread.

    def _run(self) -> None:
        while (task := self._next()) is not None:
            self._attempt(task)
            self._tasks.task_done()
        self._tasks.task_done()

    def _next(self) -> Callable[[], None] | None:
        """The next task. Rows that have waited too long for it are fed meanwhile."""
        while self._ready:
            try:
                return self._tasks.get(timeout=max(0.0, self._since + LONGEST - time.monotonic()))
            except queue.Empty:
                self._feed_ready()
        return self._tasks.get()

    def _attempt(self, task: Callable[[], None]) -> None:
        try:
            task()
        except Exception as error:
            if self._error is None:
                log.exception("a row of the audit could not be computed; training goes on")
                self._error = error

    def _forward(self, reduced: list[Reduced], arrays: Sequence[Any]) -> None:
        totals = [each.totals(np.asarray(array)) for each, array in zip(reduced, arrays, strict=True)]
        if self._forwards and reduced != self._reduced:
            raise MetricsError(
                "the forwards of one step have different routers. Usual cause: several models behind one "
                "callback. Make a callback for each."
            )
        if self._forwards:
            totals = [a + b for a, b in zip(self._totals, totals, strict=True)]
        self._reduced, self._totals, self._forwards = reduced, totals, self._forwards + 1
        if self._forwards == self._per_step:
            self._forwards = 0
            summaries = [each.summary(total) for each, total in zip(reduced, totals, strict=True)]
            self._rows.append({metric_of(reduced): summaries})
            self._match()

    def _called(self, metrics: dict[str, Any], step: Any) -> None:
        if self._hooked is False:
            if not self._told:
                self._told = True
                log.warning(
                    "on_step was called for the first time after rows had been made without it: it is left "
                    "out. Call it after every step, from the first on."
                )
            return
        self._hooked = True
        self._hooks.append((metrics, step))
        self._match()
        if len(self._hooks) == MANY:
            log.warning(
                "%d calls of on_step wait for a forward of the watched function: it is differentiated less "
                "often than forwards_per_step=%d says, or another function is trained",
                MANY, self._per_step,
            )  # fmt: skip

    def _match(self) -> None:
        if self._hooked is None and len(self._rows) > ALONE:
            self._hooked = False
        while self._rows and (self._hooks or self._hooked is False):
            metrics, step = self._hooks.popleft() if self._hooks else ({}, None)
            row = self._rows.popleft() | {
                key: np.asarray(value) if isinstance(value, jax.Array) else value
                for key, value in metrics.items()
            }
            if not self._ready:
                self._since = time.monotonic()
            self._ready.append((row, None if step is None else step_number(np.asarray(step))))
            if len(self._ready) == self._full:
                self._feed_ready()

    def _feed_ready(self) -> None:
        """A block at once, fewer rows one by one: what is compiled for so many would not serve again."""
        rows, self._ready = self._ready, []
        for part in [rows] if len(rows) == self._block else [[row] for row in rows]:
            self._full = self._block
            self._attempt(partial(self._feed, part))

    def _release(self, ending: bool, waiting: int) -> None:
        """Let go the rows that wait for a hook which will not come: more than `waiting`."""
        if ending or (len(self._rows) > waiting and self._hooked is None):
            self._hooked = False
        self._match()
        self._feed_ready()
        if ending and (self._hooks or self._forwards):
            log.warning(
                "at the end %d calls of on_step and %d forwards made no row: forwards_per_step=%d does not "
                "say how often the watched function is differentiated in a step",
                len(self._hooks), self._forwards, self._per_step,
            )  # fmt: skip


def _call(metrics: Mapping[str, Any], step: Any) -> tuple[dict[str, Any], Any]:
    """What a call of the hook brings: scalars, on their way to the host, and the number of the step."""
    given = named(metrics)
    chosen = scalars(given)
    if other := sorted(given.keys() - chosen.keys()):
        raise MetricsError(
            f"on_step was given {', '.join(other)}. Beside a watched function it takes only scalars, such as "
            "the loss: the routers are watched, and parameters and gradients may have been donated when the "
            "row is computed. Leave them out, or do without watch."
        )
    number = None if step is None else step_number(step)
    arrays = {**chosen, "step": number}
    if any(isinstance(value, Tracer) for value in arrays.values()):
        raise MetricsError(TRACED)
    check_alive(arrays)
    for value in arrays.values():
        if isinstance(value, jax.Array):
            value.copy_to_host_async()
    return chosen, number


def _effects() -> list[Any]:
    """What `jax.effects_barrier` would wait for. That knows no time limit, and as JAX keeps a list for each
    thread it is of no use in another."""
    return [*runtime_tokens.current_tokens.values(), *runtime_tokens.output_runtime_tokens.values()]


def _within(deadline: float, function: Callable[[], None]) -> bool:
    """Call something that may never return; False if it has not at the deadline."""
    thread = threading.Thread(target=function, name="moe-rules-barrier", daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    return not thread.is_alive()
