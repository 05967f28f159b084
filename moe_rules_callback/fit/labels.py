"""Labels: the steps of each run in which a rule ought to be TRUE.

run,rule,start,end
runs/a,collapse,400,        TRUE from step 400 to the end
runs/b,collapse,120,180     TRUE from step 120 to 180, both included
runs/c,collapse,,           never TRUE
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FitError, closest
from ..rulebook import Rulebook

Intervals = Sequence[tuple[int, int | None]]  # first and last step; None: the end of the run
Label = Intervals | None | Mapping[str, Intervals | None]
COLUMNS = ("run", "rule", "start", "end")
FEWEST = 3


def read_labels(path: str | os.PathLike[str]) -> dict[str, dict[str, list[tuple[int, int | None]]]]:
    """A CSV file as run -> rule -> intervals, none where the rule is never TRUE.

    Raises:
        FitError: a column is missing, or a step is no whole number.
    """
    found: dict[str, dict[str, list[tuple[int, int | None]]]] = {}
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
        table = csv.DictReader(lines, skipinitialspace=True, restval="")
        rows = [(table.line_num, row) for row in table]
    except (ValueError, csv.Error) as error:
        raise FitError(f"{path} is no table in UTF-8: {error}.") from None
    if lacking := [name for name in COLUMNS if name not in (table.fieldnames or ())]:
        raise FitError(f"{path} lacks the column '{lacking[0]}'. Its first line is: {','.join(COLUMNS)}.")
    for line, row in rows:
        intervals = found.setdefault(row["run"].strip(), {}).setdefault(row["rule"].strip(), [])
        try:
            start, end = (int(row[key]) if row[key].strip() else None for key in ("start", "end"))
        except ValueError:
            raise FitError(
                f"{path}, line {line}: start and end are steps, whole numbers, or empty."
            ) from None
        if start is not None:
            intervals.append((start, end))
        elif end is not None:
            raise FitError(
                f"{path}, line {line}: there is an end and no start. Give both; or neither, where "
                "the rule ought never to be TRUE."
            )
    return found


def by_name(
    runs: Mapping[str, Any] | Sequence[Any], labels: Mapping[str, Label] | Sequence[Label], book: Rulebook
) -> tuple[dict[str, Any], dict[str, dict[str, Intervals]]]:
    """Runs by name, and for each rule with labels its intervals by run.

    Raises:
        FitError: a label is of no run or no rule, or a run has none.
    """
    if isinstance(runs, Mapping) != isinstance(labels, Mapping) or len(runs) != len(labels):
        raise FitError(
            f"there are {len(runs)} runs and {len(labels)} labels. Give both as lists of the same order, or "
            "both as mappings from the name of a run. The label None says that the rule is never TRUE."
        )
    named: dict[str, Label] = dict(labels) if isinstance(labels, Mapping) else _numbered(labels)
    runs = dict(runs) if isinstance(runs, Mapping) else _numbered(runs)
    if unknown := [name for name in named if name not in runs]:
        raise FitError(f"there is a label of '{unknown[0]}', which is no run.{closest(unknown[0], runs)}")
    rules = [rule.name for rule in book.rules]
    found: dict[str, dict[str, Intervals]] = {}
    for run in runs:
        for rule, intervals in _by_rule(named[run], rules).items():
            if rule not in rules:
                raise FitError(
                    f"run '{run}' has a label of '{rule}', which is no rule.{closest(rule, rules)}"
                )
            found.setdefault(rule, {})[run] = intervals or ()
    return runs, {rule: found[rule] for rule in rules if rule in found}


def _numbered(given: Sequence[Any]) -> dict[str, Any]:
    return {f"runs[{i}]": each for i, each in enumerate(given)}


def _by_rule(label: Label, rules: Sequence[str]) -> Mapping[str, Intervals | None]:
    if isinstance(label, Mapping):
        return label
    if len(rules) != 1:
        raise FitError(
            f"a label of intervals alone is for a book of one rule; this one has {len(rules)}. Say of which "
            f"rule they are: {{'{rules[0]}': [(start, end)]}}."
        )
    return {rules[0]: label}


def inside(intervals: Intervals, steps: np.ndarray, where: str) -> np.ndarray:
    """bool [n]: the rows whose steps lie in one of the intervals.

    Raises:
        FitError: an interval holds no row.
    """
    rows = np.zeros(len(steps), bool)
    for start, end in intervals:
        these = (steps >= start) & (steps <= (steps[-1] if end is None else end))
        if not these.any():
            raise FitError(
                f"{where}: no row lies in the interval from {start} to {'the end' if end is None else end}. "
                f"The steps of this run are {steps[0]} to {steps[-1]}."
            )
        rows |= these
    return rows


def require_enough(rule: str, labels: Iterable[Intervals]) -> None:
    """Refuses to fit to a handful of runs. Rows of one run resemble each other, so runs are what counts.

    Raises:
        FitError: fewer than 3 runs are of one kind.
    """
    ever = [bool(intervals) for intervals in labels]
    positive, negative = sum(ever), len(ever) - sum(ever)
    if min(positive, negative) < FEWEST:
        raise FitError(
            f"rule '{rule}' has too few labelled runs: {positive} in which it ought to be TRUE and "
            f"{negative} in which it ought not. A fit needs {FEWEST} of each; rows of one run do not count "
            "as several. Label more runs, or choose the thresholds yourself."
        )
