"""What `replay` and `check` share: which log, which rules, which column is which signal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..errors import LogError

if TYPE_CHECKING:
    from ..replay import Replay
    from ..runs import Recording


def add_log_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "log",
        type=Path,
        help="JSON lines, CSV, TensorBoard events (a file or a directory), zarr or netCDF; or a run of "
        "this package",
    )
    parser.add_argument(
        "--rules",
        metavar="RULES",
        help="a TOML file or the name of a shipped book (default: router_health; for a run its own rules)",
    )
    parser.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="COLUMN=SIGNAL[:UNIT]",
        help="what a column is, such as 'ent=router_entropy:nats'; 'COLUMN=-' leaves it out; may be repeated",
    )
    parser.add_argument("--step", metavar="COLUMN", help="column that counts the steps; - numbers the rows")
    parser.add_argument("--top-k", type=_positive, metavar="K", help="experts that a token uses")
    parser.add_argument("--experts", type=_positive, metavar="E", help="experts of a layer")
    parser.add_argument("--format", choices=("json", "csv", "events", "dataset"), help="format of the log")
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def read_log_options(options: argparse.Namespace) -> Recording:
    """The log that the options name."""
    from ..runs import read_recording

    return read_recording(
        options.log,
        map=options.map,
        step=options.step,
        top_k=options.top_k,
        experts=options.experts,
        format=options.format,
    )


def replay_log_options(recording: Recording, options: argparse.Namespace) -> Replay:
    """The rules that the options name over the log.

    Raises:
        LogError: the log lacks the signals of all of them.
    """
    replay = recording.replay(options.rules)
    if not replay.audit.schema.rules:
        raise LogError(
            f"none of the rules can be evaluated on {options.log}, which lacks their signals. Say which "
            "column is which signal with --map, or name other rules with --rules."
        )
    return replay


def describe(recording: Recording, options: argparse.Namespace) -> str:
    """How the log was understood, for a person."""
    history, log, mapping = recording.history, recording.log, recording.mapping
    steps: Any = history["step"].values if history is not None else log.steps if log else ()
    counted = f"{len(steps):,} rows" + (f", steps {steps[0]:,} to {steps[-1]:,}" if len(steps) else "")
    counted += f" of '{log.step_column}'" if log and log.step_column else ""
    table = ["", str(mapping)] if mapping else []
    return "\n".join(
        [f"{options.log}: {counted}", *(f"note: {note}" for note in recording.notes), *table, ""]
    )


def mapping_json(recording: Recording) -> list[dict[str, Any]]:
    """How the log was understood, for a program: one object a column."""
    mapping = recording.mapping
    return [vars(each) for each in mapping.assignments] if mapping else []


def progress_bar(rows: int) -> Any:
    """A context whose `update(n)` moves a bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return contextlib.nullcontext(SimpleNamespace(update=lambda rows: None))
    return tqdm(total=rows, unit="rows", unit_scale=True, disable=None, file=sys.stderr, leave=False)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
