"""`moe-rules fit RUN..`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import FitError, closest
from ..paths import AnyPath, as_path
from ..terminal import show
from .log_options import LOGS, add_log_options, read_log_options

NOT_ACCEPTED = 3


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "fit",
        help="learn weights and thresholds of rules from labelled runs",
        description="Learn the weights of operands and the offsets and slopes of predicates from runs of "
        "which is known when a rule ought to be TRUE. Scores are of runs held out; a rule that is no better "
        "there stays as it was.",
        epilog="labels are a CSV file with the columns run,rule,start,end: the run as it is named here or "
        "the last part of its path, and the steps in which the rule ought to be TRUE; an empty end is the "
        "end of the run, an empty start says never; several lines may be of one run. exit codes: 0 a rule "
        "was learnt, 1 it could not be done, 2 wrong usage, 3 no rule was better than the old one, and no "
        "file was written. example: moe-rules fit runs/* --rules my.toml --labels labels.csv -o fitted.toml",
    )
    parser.add_argument("runs", type=as_path, nargs="+", metavar="RUN", help=LOGS)
    parser.add_argument("--labels", type=Path, required=True, metavar="FILE", help="CSV: run,rule,start,end")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="the rule file to write")
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..fit import fit, read_labels
    from ..replay import own_rules
    from ..rulewriter import write_rules

    names = _names(options.runs, found := read_labels(options.labels), options.labels)
    labels = {str(path): found[name] for path, name in zip(options.runs, names, strict=True)}
    runs = {str(path): read_log_options(options, path) for path in options.runs}
    first = next(iter(runs.values())).history
    own = None if first is None else own_rules(first)
    fitted = fit(options.rules or own, runs, labels)
    show(fitted)
    if not fitted.accepted:
        return NOT_ACCEPTED
    if options.out:
        write_rules(fitted.rules, options.out)
        show(f"\nwrote {options.out}")
    return 0


def _names(paths: Sequence[AnyPath], labelled: Any, where: Path) -> list[str]:
    """What the labels call each run: its path, or the last part of it.

    Raises:
        FitError: a run has no label, or a label is of another run.
    """
    names = [str(path) if str(path) in labelled else path.name for path in paths]
    for path, name in zip(paths, names, strict=True):
        if name not in labelled:
            raise FitError(f"{where} has no line for the run {path}.{closest(path.name, labelled)}")
        if names.count(name) > 1:
            raise FitError(f"{where} has lines for '{name}', which are several runs. Write out their paths.")
    if unknown := [name for name in labelled if name not in names]:
        raise FitError(f"{where} has labels of '{unknown[0]}', which is none of the runs given.")
    return names
