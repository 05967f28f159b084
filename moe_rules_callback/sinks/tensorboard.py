"""For TensorBoard: curves, bands of the rules, pictures of the experts' loads, and runs compared by rules.

    RuleAuditCallback(rules, logdir="runs/demo", sinks=["tensorboard"])
    $ tensorboard --logdir runs

    Time series       the curves of `scalars`, and every picture
    Custom scalars    a band for each rule, its truth interval, and its threshold as a line
    Images            `loads`: layers by experts now; each layer's experts over time
    HParams           `hparams`: config against final states
    Text              the rules

TensorBoard follows only the newest event file of a directory: a trainer that writes event files of its own
should do so in another one, or give this sink one: `TensorBoardSink("runs/demo/rules")`.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any

from ..errors import HistoryError
from ..hookspecs import hookimpl
from ..paths import AnyPath, as_path, names_in, retried
from ..records import Records, Run, Schema
from .events import SUFFIX, EventFile, proto
from .hparams import Standing, session_start, settings
from .loads import Loads
from .scalars import ScalarTable, Thin, describe_rules

PICTURE_EVERY = 1.1  # times the rows of the last: never a tenth of the run old, 100 in a million rows
BANDS = {"risk": "Risks: TRUE is bad", "health": "Health: FALSE is bad", None: "Watched"}

logger = logging.getLogger("moe_rules_callback")


class TensorBoardSink:
    """Writes scalars, band charts, pictures of loads, hyperparameters and the rules as text.

    A second run into a directory goes to `audit-2` (`-3`, ..) below it, since TensorBoard would draw
    both as one zigzag. With `resume=True` the newest of them is continued, and TensorBoard drops the
    curves that it holds from the first new step on; likewise where rows come again, because a checkpoint was
    restored. The pictures begin again with these rows.

    Args:
        logdir: where to write; None: the log directory of the run.
    """

    def __init__(self, logdir: str | AnyPath | None = None) -> None:
        self._wanted = logdir

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        wanted = self._wanted if self._wanted is not None else run.logdir
        if wanted is None:
            raise HistoryError(
                "The TensorBoard sink does not know where to write: the run has no log directory. Pass "
                "logdir=... to the callback, or one of its own: TensorBoardSink('runs/demo')."
            )
        with retried(as_path(wanted)):
            self._file = EventFile(_directory(as_path(wanted), run.resume))
        self._table, self._thin = ScalarTable(run.schema), Thin()
        rules = zip(run.schema.rules, self._table.rules, strict=True)
        self._thresholds = {f"rules/{name}/threshold": rule.threshold for rule, name in rules}
        self._standing = Standing(run.schema)
        self._last = 0, 0.0  # step and time of the last row
        self._taken: Records | None = None  # the last batch, which comes again if it could not be written
        self._run = run
        self._restart(None)

    @hookimpl
    def on_records(self, records: Records) -> None:
        if not len(records):
            return
        if records is not self._taken:
            self._take(records)
            self._taken = records
        self._flush()

    @hookimpl
    def on_rewind(self, step: int) -> None:
        self._restart(step)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        if self._loads.rows > self._drawn:
            self._draw()
        with retried(self._file.directory):
            self._file.close()

    def _restart(self, step: int | None) -> None:
        """The next rows are the first; TensorBoard is to forget what it holds from `step` on."""
        self._begun, self._forgotten = False, step
        self._loads, self._drawn = Loads(self._run.schema), 0  # rows in the last pictures

    def _flush(self) -> None:
        with retried(self._file.directory):
            self._file.flush()

    def _take(self, records: Records) -> None:
        if not self._begun:
            self._begin(records)
            self._begun = True
        self._last = int(records.step[-1]), float(records.wall_time[-1])
        values = self._table.values(records)
        for row in self._thin(records):
            self._file.scalars(
                int(records.step[row]), float(records.wall_time[row]), self._table.tags, values[row]
            )
        standing = self._thresholds | dict(self._standing(records))
        self._file.scalars(*self._last, tuple(standing), [*standing.values()])
        self._loads.add(records)
        if self._loads.rows >= PICTURE_EVERY * self._drawn:
            self._draw()

    def _begin(self, records: Records) -> None:
        from tensorboardX import summary

        step, wall_time = int(records.step[0]), float(records.wall_time[0])
        if self._run.resume or self._forgotten is not None:
            forgotten = step if self._forgotten is None else min(step, self._forgotten)
            session_log = proto("event").SessionLog
            self._file.event(forgotten, wall_time, session_log=session_log(status=session_log.START))
        lines = self._thresholds  # they begin here; each flush draws on
        self._file.scalars(step, wall_time, tuple(lines), [*lines.values()])
        self._file.event(step, wall_time, summary=_layout(records.schema, self._table))
        self._file.event(step, wall_time, summary=summary.text("rules", describe_rules(records.schema)))
        self._file.event(step, wall_time, summary=session_start(settings(self._run), wall_time))

    def _draw(self) -> None:
        if pictures := self._loads.pictures():
            self._file.images(*self._last, pictures)
        self._drawn = self._loads.rows


def _layout(schema: Schema, table: ScalarTable) -> Any:
    """The `Summary` that tells the custom scalars dashboard what to draw."""
    charts = {kind: [] for kind in BANDS}
    for rule, name in zip(schema.rules, table.rules, strict=True):
        curves = [table.bands[rule.name], (f"rules/{name}/threshold",) * 3]
        series = [dict(zip(("value", "lower", "upper"), tags, strict=True)) for tags in curves]
        charts[rule.kind].append({"title": rule.name, "margin": {"series": series}})
    categories = [{"title": BANDS[kind], "chart": some} for kind, some in charts.items() if some]
    content = proto("layout").Layout(category=categories).SerializeToString()
    tensor = {"dtype": "DT_STRING", "tensor_shape": {}, "string_val": [content]}
    metadata = {"plugin_data": {"plugin_name": "custom_scalars"}}
    value = {"tag": "custom_scalars__config__", "tensor": tensor, "metadata": metadata}
    return proto("summary").Summary(value=[value])


def _directory(logdir: AnyPath, resume: bool) -> AnyPath:
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


def _holds_run(directory: AnyPath) -> bool:
    return any("tfevents" in name and name.endswith(SUFFIX) for name in names_in(directory))
