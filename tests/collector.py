"""A plugin that keeps what it is told, and a rule: `hot`, a risk, is TRUE at x = -1 and FALSE from 0 on."""

from __future__ import annotations

from typing import Any

import numpy as np

from moe_rules_callback import Alert, Predicate, Records, Rule, RuleAuditCallback, Rulebook, Run, hookimpl
from moe_rules_callback.formula import Var

HOT = Rule("hot", Var("is_hot"), text="is_hot", kind="risk")
RULES = Rulebook("test", (HOT,), {"is_hot": Predicate("x", "low", -0.5)})


class Collector:
    def __init__(self) -> None:
        self.events: list[str] = []
        self.batches: list[Records] = []
        self.alerts: list[Alert] = []

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self.events.append("on_train_start")

    @hookimpl
    def on_records(self, records: Records) -> None:
        self.events.append("on_records")
        self.batches.append(records)

    @hookimpl
    def on_alert(self, alert: Alert) -> None:
        self.events.append("on_alert")
        self.alerts.append(alert)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        self.events.append("on_train_end")

    @property
    def steps(self) -> list[int]:
        return [step for batch in self.batches for step in batch.step.tolist()]

    @property
    def x(self) -> list[float]:
        """Values of the first signal."""
        return np.concatenate([batch.signal_pooled[:, 0] for batch in self.batches]).tolist()


def make(*plugins: Any, flush_every: int = 4, **options: Any) -> RuleAuditCallback:
    return RuleAuditCallback(RULES, plugins=plugins, flush_every=flush_every, **options)
