"""`moe-rules replay LOG`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..paths import AnyPath, as_path
from ..terminal import show
from .log_options import (
    LOGS,
    add_log_options,
    describe,
    mapping_json,
    progress_bar,
    read_log_options,
    replay_log_options,
)


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="evaluate rules over an old log",
        description="Evaluate rules over the log of any trainer, or over a run of this package again: shows "
        "which column is taken for which signal, writes a history that all other commands read, and prints "
        "a verdict for each rule.",
        epilog="example: moe-rules replay training_log.txt --rules router_health "
        "--map entropy=router_entropy:nats --top-k 2",
    )
    parser.add_argument("log", type=as_path, metavar="LOG", help=LOGS)
    add_log_options(parser)
    parser.add_argument(
        "--out", type=as_path, metavar="DIR", help="where the history goes (default: LOG's name with .audit)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..history import open_history
    from ..records import Run
    from ..sinks.zarr import ZarrSink
    from ..verdicts import by_role, summary, verdicts

    recording = read_log_options(options, options.log)
    if not options.json:
        show(describe(recording, options))
    replay, sink = replay_log_options(recording, options), ZarrSink()
    run = Run(
        replay.audit.schema, options.out or beside(options.log), flush_every=4096, config=recording.config
    )
    sink.on_train_start(run)
    with progress_bar(replay.rows) as bar:
        for records in replay:
            sink.on_records(records)
            bar.update(len(records))
    sink.on_train_end(run)
    assert sink.path is not None
    found = verdicts(open_history(sink.path))
    if options.json:
        told = {
            "history": str(sink.path),
            "rows": replay.rows,
            "columns": mapping_json(recording),
            "notes": recording.notes,
            "summary": summary(found),
            "verdicts": [verdict.to_dict() for verdict in found],
        }
        show(json.dumps(told, indent=2))
    else:
        show(*by_role(found), "", summary(found), sink.path)
    return 0


def beside(log: AnyPath) -> AnyPath:
    """The directory beside a log where its history goes: `runs/log.txt` -> `runs/log.audit`."""
    log = log.resolve()
    return log.parent / f"{log.name if log.is_dir() else log.stem}.audit"
