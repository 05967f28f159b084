"""The command line of the benchmark.

    python -m reference.faults record                               # all runs, to runs/faults
    python -m reference.faults record --split tuning --only 'dead_expert*' --jobs 2

What is recorded already is not recorded again, so a command that was broken off may be given again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ..config import ConfigError
from ..data import DataError
from .record import record, select


def main() -> None:
    """Do what the command line asks for."""
    runs = argparse.ArgumentParser(add_help=False)
    runs.add_argument("--out", type=Path, default=Path("runs/faults"), help="where runs are kept")
    runs.add_argument("--split", choices=("tuning", "held_out", "*"), default="*", help="a set of runs")
    runs.add_argument("--only", default="*", metavar="PATTERN", help="runs whose names match")

    parser = argparse.ArgumentParser(prog="python -m reference.faults", description="The fault benchmark.")
    commands = parser.add_subparsers(required=True)
    recording = commands.add_parser("record", parents=[runs], help="train every run that is not recorded yet")
    recording.add_argument("--jobs", type=int, default=1, help="processes that share the work")
    recording.set_defaults(act=_record)

    # The model is small: a process is faster with one thread than with several.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    options = parser.parse_args()
    try:
        options.act(options)
    except (ConfigError, DataError) as error:
        sys.exit(str(error))


def _record(options: argparse.Namespace) -> None:
    record(select(options.split, options.only), options.out, options.jobs)


if __name__ == "__main__":
    main()
