"""The command line of the benchmark.

    python -m reference.faults record                               # all runs, to runs/faults
    python -m reference.faults record --split tuning --only 'dead_expert*' --jobs 2
    python -m reference.faults score --split held_out               # of what is recorded, in a minute or two

What is recorded already is not recorded again, so a command that was broken off may be given again.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from ..config import ConfigError
from ..data import DataError
from .record import path_of, record, select


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
    scoring = commands.add_parser("score", parents=[runs], help="judge recorded runs; tables in Markdown")
    scoring.add_argument("--rules", action="append", default=[], metavar="FILE", help="further rules")
    scoring.set_defaults(act=_score)

    # The model is small: a process is faster with one thread than with several.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    options = parser.parse_args()
    try:
        options.act(options)
    except (ConfigError, DataError) as error:
        sys.exit(str(error))


def _record(options: argparse.Namespace) -> None:
    record(select(options.split, options.only), options.out, options.jobs)


def _score(options: argparse.Namespace) -> None:
    from .table import tables

    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)
    for split in ("tuning", "held_out") if options.split == "*" else (options.split,):
        runs = select(split, options.only)
        if missing := [run.name for run in runs if not path_of(options.out, run).exists()]:
            sys.exit(
                f"{len(missing)} of {len(runs)} runs of {split} are not recorded in {options.out}, first of "
                f"all {missing[0]}. Record them: python -m reference.faults record --split {split}."
            )
        print(f"{split}: {tables(runs, options.out, options.rules)}\n")


if __name__ == "__main__":
    main()
