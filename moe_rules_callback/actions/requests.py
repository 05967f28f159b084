"""Actions that ask something of the training loop, which looks at `should_stop` and `should_checkpoint`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from ..alerts import Alert
from ..formula import Severity
from .action import Action

log = logging.getLogger("moe_rules_callback")


class StopTraining(Action):
    """Asks to end training, once: `RuleAuditCallback.should_stop` stays True.

    Args:
        on: the least severity of the rules that it acts on, or their names.
        after: rows in a row that one of them must have fired in.
    """

    deed = "stop training"

    def __init__(self, on: Severity | Sequence[str] = "error", *, after: int = 1) -> None:
        super().__init__(on, after=after, cooldown=sys.maxsize)

    def act(self, alert: Alert) -> None:
        self.requests.ask("stop")
        log.warning("asks to %s, %s", self.deed, self.why(alert))


class RequestCheckpoint(Action):
    """Asks for a checkpoint, see `RuleAuditCallback.should_checkpoint`.

    Args:
        on: the least severity of the rules that it acts on, or their names.
        after: rows in a row that one of them must have fired in. It asks once in each such stretch.
        cooldown: rows in which it does not ask again.
    """

    deed = "save a checkpoint"

    def __init__(
        self, on: Severity | Sequence[str] = "warning", *, after: int = 1, cooldown: int = 1000
    ) -> None:
        super().__init__(on, after=after, cooldown=cooldown)

    def act(self, alert: Alert) -> None:
        self.requests.ask("checkpoint")
        log.warning("asks to %s, %s", self.deed, self.why(alert))
