"""When a rule fires, in words.

A rule fires when it is a risk that is TRUE or a health rule that is FALSE, from its warm-up on. An alert
is raised when it begins to, after at least `QUIET` rows in which it did not, and ends when it has not for
so many rows: a rule that flickers around its threshold is told once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from .formula import Rule, variables
from .proof import Proofs, Reason
from .proof import lines as proof_lines
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
        signals: the signals that its predicates judge, in that row and layer.
        reasons: of a rule over concluded names, the axioms behind it, the strongest first.
        ended: step of the first of the rows in which it fired no more; None while it does.
    """

    rule: Rule
    step: int
    layer: str
    truth: tuple[float, float]
    signals: Mapping[str, float] = field(default_factory=dict, hash=False)
    reasons: tuple[Reason, ...] = ()
    ended: int | None = None

    def __str__(self) -> str:
        """Verdict, why with a line for each reason, next; of one that has ended, that it has."""
        rule, (lower, upper) = self.rule, self.truth
        verdict = "TRUE" if rule.kind == "risk" else "FALSE"
        if self.ended is not None:
            return (
                f"{rule.name} has ended: {verdict} since step {self.step}, no longer since step {self.ended}"
            )
        values = ", ".join(f"{name} {value:.3g}" for name, value in self.signals.items())
        why = " ".join(filter(None, (rule.description, rule.cause and f"Likely cause: {rule.cause}")))
        where = f"since step {self.step} in layer '{self.layer}'"
        text = " ".join(blank_comments(rule.text).split()) or rule.formula
        lines = [
            f"{rule.name} is {verdict} {where} [{lower:.2f}, {upper:.2f}]"
            + (f": {values}" if values else ""),
            f"  Why:  {text}" + (f". {why}" if why else ""),
            *proof_lines(self.reasons, "        "),
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
    """Notices when rules begin to fire and when they have ended, over batches of records."""

    def __init__(self, schema: Schema) -> None:
        self._quiet = np.full(len(schema.rules), QUIET)  # rows since each rule last fired
        self._quiet_since = np.zeros(len(schema.rules), np.int64)  # step of the first of them
        self._open: dict[int, Alert] = {}  # alerts that have not ended, by the number of their rule
        self._blind = [i for i, signal in enumerate(schema.signals) if signal.per_layer]

    def __call__(self, records: Records) -> list[Alert]:
        """Alerts that begin or end in a batch, in the order of the rows that decide."""
        self._look(records)
        if not len(records):
            return []
        fires, found = firing(records), []
        busy = fires.any(axis=0)
        for rule in {*np.flatnonzero(busy).tolist(), *self._open}:
            found += self._follow(rule, fires[:, rule].tolist(), records)
        self._quiet_since = np.where(~busy & (self._quiet == 0), records.step[0], self._quiet_since)
        self._quiet = np.where(busy, self._quiet, self._quiet + len(records))
        return [alert for *_, alert in sorted(found, key=lambda each: each[:3])]

    def _follow(
        self, rule: int, fires: list[bool], records: Records
    ) -> Iterator[tuple[int, bool, int, Alert]]:
        """Row, whether it ends there, rule and alert."""
        quiet = int(self._quiet[rule])
        for row, fire in enumerate(fires):
            if fire and quiet >= QUIET:
                self._open[rule] = alert_of(records, row, rule)
                yield row, False, rule, self._open[rule]
            if not fire and quiet == 0:
                self._quiet_since[rule] = records.step[row]
            quiet = 0 if fire else quiet + 1
            if quiet >= QUIET and rule in self._open:
                ended = int(self._quiet_since[rule])
                yield row, True, rule, replace(self._open.pop(rule), ended=ended)
        if any(fires):
            self._quiet[rule] = quiet

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


def alert_of(records: Records, row: int, number: int) -> Alert:
    """The alert of a rule that fires in a row; both are given by their numbers."""
    schema = records.schema
    rule, layers = schema.rules[number], records.truth_layer[row, number]
    worst = int(layers[:, 0].argmax() if rule.kind == "risk" else layers[:, 1].argmin())
    lower, upper = records[row : row + 1].truth[0, number]
    judged = [schema.predicates[name].signal for name in variables(rule.formula) if name in schema.predicates]
    signals = {
        name: float(records.signal_value[row, schema.signal_names.index(name), worst])
        for name in judged
        if name in schema.signal_names
    }
    reasons = Proofs(records)(rule.name, row)
    truth = float(lower), float(upper)
    return Alert(rule, int(records.step[row]), schema.layers[worst], truth, signals, reasons)
