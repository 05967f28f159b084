"""What TensorBoard's HParams dashboard compares runs by: how they were set, and where the rules stand.

    session_start(settings(run), wall_time)    written first: the config, and which rules there are
    standing = Standing(schema)
    standing(records)                          scalars after each batch: a killed run has its last ones

The dashboard begins with the first five scalars by name, hence these names:

    final/<rule>    state in the last row: 0 FALSE, 1 TRUE, 2 UNKNOWN, 3 CONTRADICTORY
    fired/<rule>    share of the rows from the warm-up on in which it fired; counted anew after a resume
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..alerts import firing, warm
from ..records import Records, Run, Schema
from .events import proto
from .scalars import ScalarTable


class Standing:
    """Where the rules stand, from all batches so far."""

    def __init__(self, schema: Schema) -> None:
        names = ScalarTable(schema).rules
        self.tags = (*(f"final/{name}" for name in names), *(f"fired/{name}" for name in names))
        self._fired = np.zeros(len(names), np.int64)
        self._rows = np.zeros(len(names), np.int64)

    def __call__(self, records: Records) -> list[tuple[str, float]]:
        """Tags and values after a further batch of at least one row."""
        self._fired += firing(records).sum(axis=0)
        self._rows += warm(records).sum(axis=0)
        share = self._fired / np.maximum(self._rows, 1)
        return list(zip(self.tags, [*records.state[-1].tolist(), *share.tolist()], strict=True))


def settings(run: Run) -> dict[str, Any]:
    """The config, nested keys joined by dots; and `rulebook`, the same where rules and predicates are."""
    rules = [(rule.name, rule.formula, rule.threshold, rule.kind, rule.warmup) for rule in run.schema.rules]
    text = repr((rules, sorted(run.schema.predicates.items())))
    return {"rulebook": f"{len(rules)} rules, {zlib.crc32(text.encode()):08x}"} | dict(_flat(run.config))


def session_start(hparams: Mapping[str, Any], wall_time: float) -> Any:
    """The `Summary` that makes a run a row of the dashboard.

    TensorBoard finds the columns itself. A list of them, which it also takes, would be that of one run for
    all, and hide what only others have.

    Args:
        hparams: what is no number, bool or string is kept as its `str`.
        wall_time: when the run began.
    """
    start = proto("plugin_hparams").SessionStartInfo(start_time_secs=wall_time)
    for name, value in hparams.items():
        value = value.item() if getattr(value, "shape", None) == () else value  # of NumPy or JAX
        if isinstance(value, bool):
            start.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            start.hparams[name].number_value = value
        else:
            start.hparams[name].string_value = str(value)
    content = proto("plugin_hparams").HParamsPluginData(session_start_info=start).SerializeToString()
    metadata = proto("summary").SummaryMetadata(plugin_data={"plugin_name": "hparams", "content": content})
    return proto("summary").Summary(value=[{"tag": "_hparams_/session_start_info", "metadata": metadata}])


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
