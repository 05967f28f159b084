"""Rows as scalars, for everything that draws curves: the names of the curves, and how many points.

    table = ScalarTable(schema)
    thin = Thin()
    for row in thin(records):
        writer.write_scalars(step, dict(zip(table.tags, table.values(records)[row])))

The curves:

    rules/<rule>/value, lower, upper      the truth interval and its middle
    rules/<rule>/state                    0 FALSE, 1 TRUE, 2 UNKNOWN, 3 CONTRADICTORY
    signals/<signal>                      pooled over the layers
    signals/<layer>/<signal>              where there are several layers
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from ..records import Records, Schema

ALL_ROWS_UNTIL = 1_000
SECONDS_BETWEEN_ROWS = 1 / 20


class ScalarTable:
    """The scalars of a row.

    Attributes:
        tags: T unique names, legal everywhere: letters, digits and `_ . - /`.
        rules, layers: names of the R rules and Y layers as parts of a tag, just as legal and unique.
        bands: for each rule its name and the tags of value, lower and upper.
    """

    def __init__(self, schema: Schema) -> None:
        self.rules = tuple(_unique(map(_legal, schema.rule_names)))
        self.layers = tuple(_unique(map(_legal, schema.layers)))
        self.bands = {
            name: (f"rules/{rule}/value", f"rules/{rule}/lower", f"rules/{rule}/upper")
            for name, rule in zip(schema.rule_names, self.rules, strict=True)
        }
        signals = [f"signals/{name}" for name in schema.signal_names]
        self._local = [i for i, signal in enumerate(schema.signals) if signal.per_layer]
        if len(schema.layers) == 1:
            self._local = []
        signals += [
            f"signals/{layer}/{schema.signals[i].name}" for i in self._local for layer in schema.layers
        ]
        parts = ("value", "lower", "upper", "state")
        self.tags = tuple(f"rules/{rule}/{part}" for rule in self.rules for part in parts)
        self.tags += tuple(_unique(map(_legal, signals)))

    def values(self, records: Records) -> np.ndarray:
        """float32 [n, T], in the order of `tags`."""
        truth = records.truth
        rules = np.concatenate([truth.mean(axis=2, keepdims=True), truth, records.state[..., None]], axis=2)
        parts = [rules, records.signal_pooled, records.signal_value[:, self._local]]
        return np.concatenate([part.reshape(len(records), -1) for part in parts], axis=1, dtype=np.float32)


class Thin:
    """Chooses the rows worth a point: the first 1,000, then 20 a second, and every change of a state."""

    def __init__(self) -> None:
        self._seen = 0
        self._last_time = -np.inf
        self._last_state: np.ndarray | None = None

    def __call__(self, records: Records) -> list[int]:
        """Indices of the rows of this batch to write."""
        if not len(records):
            return []
        chosen, before = [], records.state[:1] if self._last_state is None else self._last_state
        changes = (records.state != np.concatenate([before, records.state[:-1]])).any(axis=1).tolist()
        self._last_state = records.state[-1:]
        for row, (now, changed) in enumerate(zip(records.wall_time.tolist(), changes, strict=True)):
            # the distance both ways, so that a clock set back does not end the curve
            due = abs(now - self._last_time) >= SECONDS_BETWEEN_ROWS
            if self._seen < ALL_ROWS_UNTIL or due or changed:
                chosen.append(row)
                self._last_time = now
            self._seen += 1
        return chosen


def describe_rules(schema: Schema) -> str:
    """The rules as a Markdown list."""
    lines = []
    for rule in schema.rules:
        told = [rule.kind or "watched", f"threshold {rule.threshold:g}"]
        if rule.warmup:
            told.append(f"from step {rule.warmup}")
        line = f"- **{rule.name}** ({', '.join(told)}): `{rule.formula}`"
        lines.append(f"{line}  \n  {rule.description}" if rule.description else line)
    return "\n".join(lines)


def _legal(tag: str) -> str:
    """A layer found in a traced program is called `['layers'][0]['moe']`; this gives layers_0_moe. No part is
    `..`, in case that somebody makes files of tags."""
    parts = (re.sub(r"[^A-Za-z0-9_.\-]+|^\.+$", "_", part).strip("_") for part in tag.split("/"))
    return "/".join(part or "unnamed" for part in parts)


def _unique(tags: Iterable[str]) -> list[str]:
    taken: dict[str, None] = {}
    for tag in tags:
        name, count = tag, 1
        while name in taken:
            count += 1
            name = f"{tag}_{count}"
        taken[name] = None
    return list(taken)
