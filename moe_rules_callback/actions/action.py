"""When an action is taken: for which rules, after how many rows, how often.

class Page(Action):
    deed = "page somebody"

    def act(self, alert):
        pager.send(str(alert))

RuleAuditCallback(rules, actions=[Page(on="error", after=100)], dry_run=False)
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np

from ..alerts import Alert, alert_of, firing
from ..errors import PluginError, UnknownNameError, closest
from ..formula import SEVERITIES, Severity
from ..hookspecs import hookimpl
from ..records import Records, Run, Schema
from .agreement import Requests

log = logging.getLogger("moe_rules_callback")


class Action:
    """A plugin that acts when rules keep firing. Subclasses say what they do in `deed` and do it in `act`.

    Args:
        on: the least severity of the rules that it acts on, or their names.
        after: rows in a row that one of them must have fired in. It acts once in each such stretch.
        cooldown: rows, from the one that it acted on, in which it does not act again.

    Attributes:
        dry_run: whether it only says what it would do; set by the callback.
        requests: what may be asked of the training loop; set by the callback.
    """

    deed: ClassVar[str] = "act"
    dry_run = True
    requests: Requests

    def __init__(
        self, on: Severity | Sequence[str] = "warning", *, after: int = 1, cooldown: int = 0
    ) -> None:
        if isinstance(on, str) and on not in SEVERITIES:
            raise UnknownNameError(
                f"on is {on!r}; it is the least severity, one of {', '.join(SEVERITIES)}, or a list of the "
                f"names of rules, such as [{on!r}]."
            )
        if after < 1 or cooldown < 0:
            raise ValueError(
                f"after is {after} and cooldown is {cooldown}; they count rows, from 1 on and from 0 on."
            )
        self._on, self._after, self._cooldown = on, after, cooldown

    # Called by the callback.

    def bind(self, requests: Requests, dry_run: bool) -> None:
        """When the callback is made."""
        self.requests, self.dry_run = requests, dry_run

    def start(self, run: Run) -> None:
        """Before the first row, on every process.

        Raises:
            UnknownNameError: no rule goes by one of the names.
            PluginError: a rule that is named never fires, or what the action needs is not there.
        """
        self._chosen = self._choose(run.schema)
        self._fired = np.zeros(len(run.schema.rules), int)  # rows in a row
        self._rest = 0  # rows until it may act again
        self._told = False

    @hookimpl
    def on_records(self, records: Records) -> None:
        for row, fires in enumerate(firing(records)):
            self._fired = np.where(fires, self._fired + 1, 0)
            self._rest = max(0, self._rest - 1)
            due = np.flatnonzero(self._chosen & (self._fired == self._after))
            if len(due) and not self._rest:
                self._rest = self._cooldown
                self._decide(alert_of(records, row, int(due[0])))

    def act(self, alert: Alert) -> None:
        """Do it. Runs on the audit's own thread, and not in a dry run.

        Args:
            alert: the rule, in the row that decided.
        """
        raise NotImplementedError

    def why(self, alert: Alert) -> str:
        """Step and reason, in words."""
        how = "fires" if self._after == 1 else f"has fired in {self._after} rows in a row"
        return f"at step {alert.step}: rule '{alert.rule.name}' {how}"

    def _decide(self, alert: Alert) -> None:
        if not self.dry_run:
            self.act(alert)
        elif not self._told:
            self._told = True
            log.warning("would %s %s; pass dry_run=False to let it", self.deed, self.why(alert))

    def _choose(self, schema: Schema) -> np.ndarray:
        """bool [R]: the rules that it acts on."""
        rules = schema.rules
        if isinstance(self._on, str):
            least = SEVERITIES.index(self._on)
            chosen = [rule.kind is not None and SEVERITIES.index(rule.severity) >= least for rule in rules]
            if not any(chosen):
                log.warning(
                    "no action will %s: no rule that can fire has the severity %s or above. Name rules "
                    "instead, on=['..'], or give them a kind and a severity.",
                    self.deed, self._on,
                )  # fmt: skip
            return np.array(chosen, bool)
        kinds = {rule.name: rule.kind for rule in rules}
        for name in self._on:
            if name not in kinds:
                raise UnknownNameError(
                    f"an action is to {self.deed} on the rule '{name}', and no rule of this audit is called "
                    f"so.{closest(name, kinds)} A rule whose signals are absent is left out."
                )
            if kinds[name] is None:
                raise PluginError(
                    f"an action is to {self.deed} on the rule '{name}', which has no kind and so never "
                    "fires. Give it kind = 'risk' or kind = 'health'."
                )
        return np.array([rule.name in self._on for rule in rules], bool)


def bound(actions: Iterable[Action], every: int, dry_run: bool) -> tuple[list[Action], Requests]:
    """The actions of a callback, told about `dry_run` and the requests that they share.

    Args:
        actions: of one callback.
        every: steps between two agreements of several processes.
        dry_run: whether they only say what they would do.

    Raises:
        PluginError: one is no action.
    """
    actions = list(actions)
    requests = Requests(every if actions and not dry_run else None)
    for action in actions:
        if not isinstance(action, Action):
            raise PluginError(
                f"{action!r} is not an action. Pass objects such as StopTraining(), not their classes; other "
                "objects with hooks go to plugins=."
            )
        action.bind(requests, dry_run)
    return actions, requests
