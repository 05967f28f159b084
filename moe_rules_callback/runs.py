"""A run to look at, whatever wrote it: a history of ours, or the log of another trainer.

open_run("runs/demo")                          the history there, as it stands
open_run("runs/demo", "nano_moe")              judged again by other rules
open_run("training_log.txt", "my_rules.toml")  a log, judged by rules
open_run("gs://bucket/runs/demo")              either, wherever fsspec reaches
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .history import open_history, records_to_dataset
from .logs import Log, SignalMapping, map_columns, read_log
from .paths import AnyPath, as_path
from .replay import Replay
from .rulebook import load_rules
from .stores import stores

if TYPE_CHECKING:
    import xarray as xr

    from .rulebook import Source


@dataclass(frozen=True)
class Recording:
    """What rules can be evaluated on again.

    Attributes:
        history: of this package; None for a log.
        log, mapping: of another trainer; None for a history.
        config: what is kept beside the new history.
    """

    history: xr.Dataset | None = None
    log: Log | None = None
    mapping: SignalMapping | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def replay(self, rules: Source = None) -> Replay:
        """The rules over it, ready to iterate. None: those of the history; for a log "router_health"."""
        if self.history is not None:
            return Replay.of_history(self.history, rules)
        assert self.log is not None
        assert self.mapping is not None
        book = load_rules(rules)
        if self.counts_epochs:
            book = replace(book, rules=tuple(replace(rule, warmup=0) for rule in book.rules))
        return Replay(self.mapping.metrics, book, steps=self.log.steps, top_k=self.mapping.top_k)

    @property
    def counts_epochs(self) -> bool:
        """Whether rows are epochs, so that the warm-ups of rules, which are steps, do not apply."""
        return self.log is not None and "epoch" in self.log.step_column.lower()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was repaired, left out or assumed."""
        log = self.log.notes if self.log else ()
        epochs = ("rows are epochs: warm-ups of rules, which count steps, are left out",)
        return log + (self.mapping.notes if self.mapping else ()) + (epochs if self.counts_epochs else ())


def open_run(path: str | AnyPath, rules: Source = None, **options: Any) -> xr.Dataset:
    """The dataset of a run, as `open_history` gives it.

    Args:
        path: a log directory or history of this package, or a log that `logs.read_log` knows; or its URL.
        rules: as for `load_rules`. None: a history as it stands, a log by the book "router_health".
        options: of a log, see `read_recording`.

    Raises:
        LogError, HistoryError: it cannot be read.
        MoeRulesError: the rules cannot be read, or do not fit it.
    """
    recording = read_recording(path, **options)
    if recording.history is not None and rules is None:
        return recording.history
    return records_to_dataset(list(recording.replay(rules)), recording.config)


def read_recording(
    path: str | AnyPath,
    *,
    map: Iterable[str] = (),
    step: str | None = None,
    top_k: int | None = None,
    experts: int | None = None,
    format: str | None = None,
) -> Recording:
    """A history or a log, before any rule.

    Args:
        map, experts, top_k: of a log, see `logs.map_columns`.
        step: of a log, see `logs.read_log`.
        format: likewise; naming one says that it is no history of this package.

    Raises:
        LogError, HistoryError: it cannot be read.
    """
    if format is None and is_history(path):
        history = open_history(path)
        return Recording(history, config=json.loads(history.attrs["config"]) | {"replay_of": str(path)})
    log = read_log(path, format=format, step=step)
    mapping = map_columns(log, map, experts=experts, top_k=top_k)
    columns = {each.column: each.target for each in mapping.assignments}
    config = {"replay_of": str(path), "step_column": log.step_column, "columns": columns}
    found = Recording(log=log, mapping=mapping, config=config)
    return replace(found, config=config | {"notes": list(found.notes)})


def is_history(path: str | AnyPath) -> bool:
    """Whether a path is a history of this package, or a directory that holds one."""
    path = as_path(path)
    metadata = path / "zarr.json"
    if not metadata.exists():
        return bool(stores(path / "audit.zarr"))
    try:
        return "schema_version" in json.loads(metadata.read_bytes())["attributes"]
    except (ValueError, KeyError, TypeError):
        return False
