"""Curves for TensorBoard: every signal, every rule, and a page of bands under "Custom scalars".

    RuleAuditCallback(rules, logdir="runs/demo", sinks=["tensorboard"])
    $ tensorboard --logdir runs

`scalars` lists the tags. TensorBoard follows only the newest event file of a directory: a trainer
that writes event files of its own should do so in another one, or give this sink one:
`TensorBoardSink("runs/demo/rules")`.
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import HistoryError
from ..hookspecs import hookimpl
from ..records import Records, Run
from .scalars import ScalarTable, Thin, describe_rules

SUFFIX = ".moe_rules"

logger = logging.getLogger("moe_rules_callback")


def proto(name: str) -> Any:
    """tensorboardX.proto.<name>_pb2, whose classes are made when it is first imported."""
    return import_module(f"tensorboardX.proto.{name}_pb2")


class EventFile:
    """A new event file in a directory; events are in it as soon as a method returns.

    The file's name is unique: names of tensorboardX alone clash within a second.
    """

    def __init__(self, logdir: str | Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        Path(logdir).mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.{uuid.uuid4().hex[:8]}{SUFFIX}"
        self._writer = EventsWriter(str(Path(logdir) / "events"), suffix)

    def event(self, step: int, wall_time: float, **content: Any) -> None:
        """Writes one `Event` proto; `content` is its `summary` or `session_log`."""
        event = proto("event").Event(step=step, wall_time=wall_time, **content)
        self._writer.write_event(event)

    def scalars(self, step: int, wall_time: float, scalars: Iterable[tuple[str, float]]) -> None:
        """Writes scalars as one event: a fraction of the cost of an event each."""
        Summary = proto("summary").Summary
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
        self.event(step, wall_time, summary=Summary(value=values))

    def flush(self) -> None:
        """Until the disk has it (fsync)."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()


class TensorBoardSink:
    """Writes scalars, a band chart for every rule, and the rules as text.

    A second run into a directory goes to `audit-2` (`-3`, ..) below it, since TensorBoard would draw
    both as one zigzag. With `resume=True` the newest of them is continued, and TensorBoard drops
    what it holds from the first new step on.

    Args:
        logdir: where to write; None: the log directory of the run.
    """

    def __init__(self, logdir: str | Path | None = None) -> None:
        self._wanted = logdir

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        wanted = self._wanted if self._wanted is not None else run.logdir
        if wanted is None:
            raise HistoryError(
                "The TensorBoard sink does not know where to write: the run has no log directory. Pass "
                "logdir=... to the callback, or one of its own: TensorBoardSink('runs/demo')."
            )
        self._file = EventFile(_directory(Path(wanted), run.resume))
        self._table, self._thin = ScalarTable(run.schema), Thin()
        self._begun = False
        self._resume = run.resume

    @hookimpl
    def on_records(self, records: Records) -> None:
        if not self._begun and len(records):
            self._begin(records)
            self._begun = True
        values = self._table.values(records)
        for row in self._thin(records):
            scalars = zip(self._table.tags, values[row].tolist(), strict=True)
            self._file.scalars(int(records.step[row]), float(records.wall_time[row]), scalars)
        self._file.flush()

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        self._file.close()

    def _begin(self, records: Records) -> None:
        from tensorboardX import summary

        step, wall_time = int(records.step[0]), float(records.wall_time[0])
        if self._resume:  # TensorBoard forgets the steps from here on that an earlier file holds
            session_log = proto("event").SessionLog
            self._file.event(step, wall_time, session_log=session_log(status=session_log.START))
        bands = {rule: ["Margin", list(tags)] for rule, tags in self._table.bands.items()}
        self._file.event(step, wall_time, summary=summary.custom_scalars({"rules": bands}))
        self._file.event(step, wall_time, summary=summary.text("rules", describe_rules(records.schema)))


def _directory(logdir: Path, resume: bool) -> Path:
    """`logdir`, or where it already holds a run of ours the newest (resume) or the next audit-N in it."""
    directory = logdir
    for number in itertools.count(2):
        following = logdir / f"audit-{number}"
        if not _holds_run(directory) or (resume and not _holds_run(following)):
            break
        directory = following
    if directory != logdir and not resume:
        logger.warning("%s holds the curves of another run; this run's go to %s.", logdir, directory)
    return directory


def _holds_run(directory: Path) -> bool:
    return any(directory.glob(f"*tfevents*{SUFFIX}"))
