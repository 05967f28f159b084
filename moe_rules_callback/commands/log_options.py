"""What the commands that look at runs share: which rules, and how the log of another trainer is read."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from ..errors import LogError
from ..paths import AnyPath

if TYPE_CHECKING:
    import xarray as xr

    from ..replay import Replay
    from ..runs import Recording


def add_log_options(parser: argparse.ArgumentParser) -> None:
    """Which rules, and how the log of another trainer is read."""
    parser.add_argument(
        "--rules",
        metavar="RULES",
        help="a TOML file or the name of a shipped book (default: router_health; for a run its own rules)",
    )
    log = parser.add_argument_group("for the log of another trainer")
    log.add_argument(
        "--map",
        action="append",
        default=[],
        metavar="COLUMN=SIGNAL[:UNIT]",
        help="what a column is, such as 'ent=router_entropy:nats'; 'COLUMN=-' leaves it out; may be repeated",
    )
    log.add_argument("--step-column", metavar="COLUMN", help="what counts the steps; - numbers the rows")
    log.add_argument("--top-k", type=_positive, metavar="K", help="experts that a token uses")
    log.add_argument("--experts", type=_positive, metavar="E", help="experts of a layer")
    log.add_argument(
        "--log-format", choices=("json", "csv", "events", "dataset"), help="if it is not found out"
    )


LOGS = (
    "a run of this package; or JSON lines, CSV, TensorBoard events (a file or a directory), zarr or netCDF; "
    "a path, or a URL such as gs://bucket/runs/demo"
)


def read_log_options(options: argparse.Namespace, path: AnyPath) -> Recording:
    """A run or a log, as the options say."""
    from ..runs import read_recording

    return read_recording(path, **_reading(options))


def open_log_options(options: argparse.Namespace, path: AnyPath) -> xr.Dataset:
    """The dataset of a run or a log, judged as the options say."""
    from ..runs import open_run

    return open_run(path, options.rules, **_reading(options))


def _reading(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "map": options.map,
        "step": options.step_column,
        "top_k": options.top_k,
        "experts": options.experts,
        "format": options.log_format,
    }


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
    """A context whose `update(n)` moves a bar on a terminal."""
    from tqdm import tqdm

    return tqdm(total=rows, unit="rows", unit_scale=True, disable=None, file=sys.stderr, leave=False)


def _positive(text: str) -> int:
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)
