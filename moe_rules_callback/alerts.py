"""When a rule fires, in words.

A rule fires when it is a risk that is TRUE or a health rule that is FALSE, from its warm-up on. An alert
is raised when it begins to, after at least `QUIET` rows in which it did not: a rule that flickers around
its threshold is told once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from .formula import Rule
from .records import Records, Schema, fires_in
from .syntax_hints import blank_comments

log = logging.getLogger("moe_rules_callback")
QUIET = 32


@dataclass(frozen=True)
class Alert:
    """A rule that began to fire.

    Attributes:
        rule: the rule.
        step: of the first row in which it fired.
        layer: the layer that decided: highest lower bound for a risk, lowest upper bound otherwise.
        truth: (lower, upper) of the rule in that row, over all layers.
    """

    rule: Rule
    step: int
    layer: str
    truth: tuple[float, float]

    def __str__(self) -> str:
        """Verdict, why, next, on one line each."""
        rule, (lower, upper) = self.rule, self.truth
        verdict = "is TRUE" if rule.kind == "risk" else "is FALSE"
        why = " ".join(filter(None, (rule.description, rule.cause and f"Likely cause: {rule.cause}")))
        where = f"since step {self.step} in layer '{self.layer}'"
        text = " ".join(blank_comments(rule.text).split()) or rule.formula
        lines = [
            f"{rule.name} {verdict} {where} [{lower:.2f}, {upper:.2f}]",
            f"  Why:  {text}" + (f". {why}" if why else ""),
        ]
        if rule.next_step:
            lines.append(f"  Next: {rule.next_step}")
        return "\n".join(lines)


def warm(records: Records) -> np.ndarray:
    """bool [n, R]: the rule's warm-up is over."""
    return records.step[:, None] >= np.array([rule.warmup for rule in records.schema.rules], int)


def firing(records: Records) -> np.ndarray:
    """bool [n, R]: the rule fires in the row."""
    return warm(records) & (records.state == fires_in(rule.kind for rule in records.schema.rules))


class Watch:
    """Notices when rules begin to fire, over batches of records."""

    def __init__(self, schema: Schema) -> None:
        self._quiet = np.full(len(schema.rules), QUIET)  # rows since each rule last fired
        self._blind = [i for i, signal in enumerate(schema.signals) if signal.per_layer]

    def __call__(self, records: Records) -> list[Alert]:
        """Alerts of a batch, in the order of their steps."""
        self._look(records)
        alerts = []
        for row, fires in enumerate(firing(records)):
            begins = np.flatnonzero(fires & (self._quiet >= QUIET))
            alerts += [_alert(records, row, int(rule)) for rule in begins]
            self._quiet = np.where(fires, 0, self._quiet + 1)
        return alerts

    def _look(self, records: Records) -> None:
        """Warn when a run begins with nothing but NaN from its routers."""
        if len(records) and self._blind:
            names = [records.schema.signal_names[i] for i in self._blind]
            if np.isnan(records.signal_value[:, self._blind]).all():
                log.warning(
                    "%s: NaN in each of the first %d rows, so that rules over them are UNKNOWN. Usual "
                    "causes: logits passed as 'router_probs' (pass them as 'router_logits'), a token_mask "
                    "that leaves no token, or a model that has diverged.",
                    ", ".join(names), len(records),
                )  # fmt: skip
            self._blind = []


def _alert(records: Records, row: int, number: int) -> Alert:
    rule, layers = records.schema.rules[number], records.truth_layer[row, number]
    worst = layers[:, 0].argmax() if rule.kind == "risk" else layers[:, 1].argmin()
    lower, upper = records[row : row + 1].truth[0, number]
    return Alert(rule, int(records.step[row]), records.schema.layers[worst], (float(lower), float(upper)))
