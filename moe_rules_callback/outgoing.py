"""Rows on their way out: from the newest state, now and then, to the plugins of process 0."""

from __future__ import annotations

import logging
import time
from typing import Any

import jax
from jax.core import Tracer

from .alerts import Watch
from .audit import Audit
from .delivery import Delivery
from .errors import MetricsError
from .events import Events
from .records import Records, Run
from .state import find_state
from .terminal import plain

log = logging.getLogger("moe_rules_callback")
STORE_PATIENCE = 10.0  # seconds that restored rows wait for the history, to be compared with it
LAST_PATIENCE = 60.0  # seconds that the last rows wait for a place
LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Outgoing:
    """Starts the plugins of a run, and sends them its rows.

    Args:
        audit: whose rows they are, once it knows the layout of the metrics.
        run: what the plugins are told.
        events: tells them.
        store: the sink that keeps the history.
    """

    def __init__(self, audit: Audit, run: Run, events: Events, store: Any) -> None:
        self.run = run
        self._events, self._tell, self._store = events, events.tell, store
        self._told = False  # of any rows
        self._alerts = Watch(audit.schema)
        self.latest: Any = None  # the newest AuditState, or a tree that holds it
        self._calls = self._since = 0  # of the trainer: until the last snapshot, and after it
        self._writes = jax.process_index() == 0
        if self._writes:
            events.start(run)
        self._delivery = Delivery(
            audit.records, self._receive, lambda step: self._tell("on_rewind", step=step), run.resume
        )

    def take(self, state: Any, rows: int) -> None:
        """The state after so many further rows."""
        self.latest = state
        self._since += rows
        if self._since >= self.run.flush_every or self._delivery.wanted:
            self._send()

    def drain(self, tree: Any) -> None:
        """A tree that holds the state, after an unknown number of further rows.

        Nearly all calls do next to nothing, and in as few Python calls as can be: after a step that took
        some milliseconds the caches hold none of this, and each function costs microseconds.

        Raises:
            MetricsError: there is no `AuditState` in it, or JAX traces the function that calls.
        """
        if self.latest is None and any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
            raise MetricsError(
                "drain was called inside a function that JAX traces, where it would run once and never "
                "again. Return the state from the step and call audit.drain(state) in the loop."
            )
        self.latest = tree
        self._since += 1
        rate = self._delivery.rows_per_call
        if not rate or (self._since + 1) * rate > self.run.flush_every or self._delivery.wanted:
            self._send()

    def send_rest(self) -> None:
        """Send what has not been sent, unless its arrays were donated to a step since."""
        state = find_state(self.latest)
        gone = state is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
        if self._since and not gone:
            self._send(LAST_PATIENCE)

    def wait(self, deadline: float, ending: bool = False) -> None:
        """Wait until the plugins have been told of all that was sent; report if it takes too long."""
        delivery = self._delivery
        if not (delivery.close(deadline) if ending else delivery.wait(deadline)):
            log.warning("the device has not computed the last rows in time, and nobody waits longer for them")

    def _send(self, patience: float = 0.0) -> None:
        if self._delivery.full and not patience:
            return  # until the next call; the ring holds these rows for a while
        if (state := find_state(self.latest)) is None:
            raise MetricsError(
                "drain found no AuditState in what it was given. Pass the state that audit.update returned, "
                "or the optimizer state of a transformation made with moe_rules_callback.integrations.optax."
            )
        self._calls, self._since = self._calls + self._since, 0
        self._delivery.wanted = False
        if self._writes:
            self._delivery.send(state, self._calls, patience)
        else:
            self._delivery.rows_per_call = 1  # no snapshots tell it

    def _receive(self, records: Records, unsure: bool) -> None:
        """On the delivery's thread."""
        records = records.judged() if unsure else records
        if unsure if self._told else self.run.resume:  # a resumed run may take many steps again
            records = self._fresh(records)
        if not len(records):
            return
        self._told = True
        self._tell("on_records", records=records)
        for alert in self._alerts(records):
            level = LEVELS[alert.rule.severity]
            log.log(level if alert.ended is None else min(level, logging.WARNING), "%s", plain(alert))
            self._tell("on_alert" if alert.ended is None else "on_alert_end", alert=alert)

    def _fresh(self, records: Records) -> Records:
        """Rows of a state that was restored, less those at the beginning that the history holds: nobody is
        told of them, or acts on them, a second time."""
        self._events.wait_for(self._store, time.monotonic() + STORE_PATIENCE)
        try:
            held = self._store.held(records)
        except Exception as error:
            log.warning("the history could not be compared with the restored rows: %s", error)
            held = 0
        if self._told:
            step = records.step[held] if held < len(records) else records.step[-1] + 1
            self._tell("on_rewind", step=int(step))
        return records[held:]
