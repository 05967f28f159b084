"""What a plugin is told, in order, on a thread of its own: one that hangs holds up nobody else.

What waits for a plugin is bounded by `KEPT_BYTES`. When that is full the newest batch of rows takes the place
of the one before it: the oldest rows, next to those that are written, are given up last, and the end of
the run is there. What a plugin has missed is counted and told when the run ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import TryAgain
from .records import ARRAYS, Records

log = logging.getLogger("moe_rules_callback")
KEPT_BYTES = 64 * 2**20
ALERT_BYTES = 4096  # about, with its proof
FIRST_DELAY, LONGEST_DELAY = 1.0, 60.0  # seconds between two attempts
LONG = 60.0  # seconds in one call, after which a plugin seems to hang
SECONDS_BETWEEN_REPORTS = 600.0  # of a plugin that fails and recovers again and again


@dataclass(frozen=True)
class _Event:
    """A call of one hook."""

    hook: str
    arguments: Mapping[str, Any]

    @property
    def records(self) -> Records | None:
        return self.arguments.get("records")

    @property
    def size(self) -> int:
        """Bytes, about; 0 for what is small and must not be given up."""
        if self.records is not None:
            return sum(getattr(self.records, name).nbytes for name in ARRAYS)
        return ALERT_BYTES if "alert" in self.arguments else 0


class _Rows:
    """Rows that a plugin does not have: how many, and from which step to which."""

    def __init__(self) -> None:
        self.number, self.first, self.last = 0, 0, 0

    def add(self, records: Records | None) -> None:
        if records is not None and len(records):
            self.first = self.first if self.number else int(records.step[0])
            self.last = int(records.step[-1])
            self.number += len(records)

    def __str__(self) -> str:
        return f"{self.number} rows (steps {self.first} to {self.last})"


class Outbox:
    """Calls one plugin's hooks.

    A plugin that raises is reported once and switched off; one that raises `TryAgain` is given the same
    again, after a second at first and a minute in the end.

    Args:
        plugin: its name.
        hooks: its functions by name of the hook, called with keywords.
        off: names of plugins that are switched off, shared with all that call hooks.
    """

    def __init__(self, plugin: str, hooks: Mapping[str, Callable[..., Any]], off: set[str]) -> None:
        self.plugin = plugin
        self._hooks, self._off = hooks, off
        self._changed = threading.Condition()
        self._waiting: deque[_Event] = deque()  # the first is the one that the plugin has now
        self._bytes = 0
        self._given = self._done = 0  # events
        self._missed = _Rows()
        self._overflowed = False
        self._failures, self._failing, self._reported = 0, "", -SECONDS_BETWEEN_REPORTS
        self._urgent = self._told_end = self._ending = False
        self._began, self._told_long = 0.0, False  # when the plugin was given what it has now
        self._late: _Event | None = None  # what the plugin had when somebody waited for it in vain
        self._thread = threading.Thread(target=self._run, name=f"moe-rules-{plugin}", daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        """Whether this is asked by the plugin itself, in one of its hooks."""
        return threading.current_thread() is self._thread

    def put(self, hook: str, **arguments: Any) -> None:
        """Tell the plugin something; does not wait for it. Nothing where it lacks the hook."""
        if hook not in self._hooks:
            return
        event = _Event(hook, arguments)
        with self._changed:
            if self.plugin in self._off or self._told_end:
                self._missed.add(event.records)
                return
            self._told_end = hook == "on_train_end"
            self._look()
            while self._bytes + event.size > KEPT_BYTES and len(self._waiting) > 1 and self._waiting[-1].size:
                self._give_up(self._waiting.pop())
            self._waiting.append(event)
            self._bytes += event.size
            self._given += 1
            self._changed.notify_all()

    def _look(self) -> None:
        """Report once a plugin that has been in one call for long."""
        if not self._waiting:
            self._began = time.monotonic()  # it is given the next one at once
            return
        if self._failing or self._told_long:
            return
        if (seconds := time.monotonic() - self._began) > LONG:
            self._told_long = True
            log.warning(
                "plugin '%s' has been in %s for %.0f s; training goes on, and up to %d MiB of rows are kept "
                "for it",
                self.plugin, self._waiting[0].hook, seconds, KEPT_BYTES // 2**20,
            )  # fmt: skip

    def wait(self, deadline: float, attempts_until: float = 0.0) -> bool:
        """Wait until the plugin has all that it was told before; False when it does not.

        Args:
            deadline: of `time.monotonic`. A plugin that was late before, and has not moved since, is not
                waited for again.
            attempts_until: how long a plugin that asks for another attempt gets further ones; it gets one.
        """
        with self._changed:
            wanted, failures = self._given, self._failures
            if self._waiting and self._waiting[0] is self._late:
                deadline = 0.0
            self._urgent = True
            self._changed.notify_all()
            while self._done < wanted:
                now = time.monotonic()
                if now >= deadline:
                    self._late = self._waiting[0]
                    return False
                if self._failures > failures and now >= attempts_until:
                    return False
                self._changed.wait(min(deadline - now, FIRST_DELAY))
        return True

    def end(self) -> None:
        """The thread ends when all is done, and no longer tries again."""
        with self._changed:
            self._ending = True
            self._changed.notify_all()

    def complaint(self) -> str:
        """What the plugin does not have, and why; "" if nothing is missing."""
        with self._changed:
            missed, waiting = self._missed, _Rows()
            for event in self._waiting:
                waiting.add(event.records)
            busy = self._waiting[0].hook if self._waiting else ""
        parts = []
        if busy:
            why = f"tries again after: {self._failing}" if self._failing else f"has not returned from {busy}"
            parts.append(f"{waiting} wait for it, which {why}" if waiting.number else f"it {why}")
        if missed.number:
            why = "too many waited for it" if self._overflowed else "they came after the end"
            why = "it was switched off" if self.plugin in self._off else why
            parts.append(f"it has missed {missed}, because {why}")
        return f"plugin '{self.plugin}': {'; '.join(parts)}" if parts else ""

    # On the thread.

    def _run(self) -> None:
        delay = FIRST_DELAY
        while (event := self._next()) is not None:
            if self._attempt(event):
                self._finish()
                delay = FIRST_DELAY
                continue
            with self._changed:
                self._failures += 1
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._urgent or self._ending, delay)
                delay = FIRST_DELAY if self._urgent else min(2 * delay, LONGEST_DELAY)
                self._urgent = False
                if self._ending:
                    return

    def _next(self) -> _Event | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ending)
            self._began = time.monotonic()
            return self._waiting[0] if self._waiting else None

    def _attempt(self, event: _Event) -> bool:
        """Call the hook; False if the plugin asks for another attempt."""
        if self.plugin in self._off:  # since it raised in another hook, on another thread
            return True
        try:
            self._hooks[event.hook](**event.arguments)
        except TryAgain as error:
            now = time.monotonic()
            if not self._failing and now - self._reported > SECONDS_BETWEEN_REPORTS:
                self._reported = now
                log.warning(
                    "plugin '%s' raised in %s and will be tried again: %s. Training goes on, and up to "
                    "%d MiB of rows are kept for it",
                    self.plugin, event.hook, error, KEPT_BYTES // 2**20, exc_info=error.__cause__,
                )  # fmt: skip
            self._failing = str(error)
            return False
        except (Exception, SystemExit):  # a plugin that calls sys.exit must not end its thread in silence
            report_off(self.plugin, event.hook, self._off)
        else:
            if self._failing:
                log.info("plugin '%s' goes on after: %s", self.plugin, self._failing)
        self._failing = ""
        return True

    def _finish(self) -> None:
        """The first event is over, and if the plugin is switched off all others are."""
        with self._changed:
            off = self.plugin in self._off
            for _ in range(len(self._waiting) if off else 1):
                event = self._waiting.popleft()
                self._bytes -= event.size
                self._done += 1
                if off:
                    self._missed.add(event.records)
            self._changed.notify_all()

    def _give_up(self, event: _Event) -> None:
        self._bytes -= event.size
        self._done += 1
        self._missed.add(event.records)
        if not self._overflowed:
            self._overflowed = True
            log.warning(
                "plugin '%s' does not keep up: %d MiB of rows wait for it, and newer ones are dropped for it "
                "until it does; how many is told at the end of the run",
                self.plugin, KEPT_BYTES // 2**20,
            )  # fmt: skip


def report_off(plugin: str, hook: str, off: set[str]) -> None:
    """Report the exception that is being handled, and switch the plugin off."""
    off.add(plugin)
    log.exception("plugin '%s' raised in %s and is switched off; training goes on", plugin, hook)
