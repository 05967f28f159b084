"""Columns over rising steps, from whatever a reader found.

log.steps                       int64 [n]
log.columns["metrics.loss"]     float64 [n], NaN where a row has none
log.columns["utilization"]      float64 [n, E]
log.notes                       what was repaired or left out, one sentence each
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ..errors import LogError, closest
from ..paths import AnyPath
from .cells import MAX_CELLS, Column, Note, Table, counted
from .experts import join_experts

ROW_NUMBERS = "-"  # in the place of a step column
STEP_NAMES = (
    "step", "global_step", "_step", "trainer_global_step", "train_step", "training_step", "iteration",
    "iter", "update", "num_updates", "batch", "epoch",
)  # fmt: skip
LARGEST_STEP = 2**31 - 1  # the audit counts in int32
MAX_NAME = 1_000  # characters of a column


@dataclass(frozen=True)
class Log:
    """A training log as a table.

    Attributes:
        path: where it was read.
        format: one of `files.FORMATS`.
        steps: int64 [n], rising, not negative.
        step_column: the column that they are, or "" for the number of the row or the format's own steps.
        columns: float64 [n], or [n, E] for lists, by name; NaN where a row has no value.
        notes: what was repaired, replaced or left out.
    """

    path: AnyPath
    format: str
    steps: np.ndarray
    step_column: str
    columns: Mapping[str, np.ndarray]
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.steps)


def assemble(table: Table, path: AnyPath, format: str, step: str | None, notes: list[str]) -> Log:
    """Brings rows into the order of their steps.

    A step that comes twice is one row: of each column the later value counts. Rows without a step are
    left out.

    Args:
        step: name of the step column, `ROW_NUMBERS`, or None to guess it.
        notes: what has been noted so far.

    Raises:
        LogError: there are no numbers, or the step column cannot be one.
    """
    if not table.columns or not table.rows:
        raise LogError("there are no numbers. A log has one row a step, with the names of its values.")
    columns = {_printable(name): column for name, column in table.columns.items() if len(name) <= MAX_NAME}
    if long := sum(len(name) > MAX_NAME for name in table.columns):
        left_out = counted(long, "column is left out, its name", "columns are left out, their names")
        notes.append(f"{left_out} of over {MAX_NAME:,} characters")
    table = replace(table, columns=columns)
    name, of_row = _steps(table, step, notes.append)
    columns = dict(columns)
    columns.pop(name, None)
    known = of_row >= 0
    if not known.any():
        raise LogError(f"no row has a step: '{name}' is empty. Name another column with --step-column.")
    if lacking := int((~known).sum()):
        notes.append(f"{counted(lacking, 'row has', 'rows have')} no '{name}': left out")
    if (np.diff(of_row[known]) < 0).any():
        notes.append(f"'{name}' does not rise from row to row: rows are sorted by it")
    steps = _distinct(of_row[known])
    if again := int(known.sum()) - len(steps):
        notes.append(f"{counted(again, 'row repeats', 'rows repeat')} a '{name}': the later value counts")
    cells = len(steps) * sum(column.values[:1].size for column in columns.values())
    if cells > MAX_CELLS:
        raise LogError(
            f"{len(steps):,} rows of {cells // len(steps):,} values are more than a log can have "
            f"({MAX_CELLS:,} values). Keep the columns that rules are about."
        )
    place = np.searchsorted(steps, of_row)
    dense = {key: _dense(column, place, known, len(steps)) for key, column in columns.items()}
    return Log(path, format, steps, name, join_experts(dense), tuple(notes))


def _dense(column: Column, place: np.ndarray, known: np.ndarray, rows: int) -> np.ndarray:
    values = np.full((rows, *column.values.shape[1:]), np.nan)
    use = known[column.rows]
    values[place[column.rows[use]]] = column.values[use]  # the last one stays, as NumPy promises
    return values


def _steps(table: Table, wanted: str | None, note: Note) -> tuple[str, np.ndarray]:
    """Name of the step column ("" if it is none), and int64 [rows]: the step of each row, -1 without one."""
    numbers = np.arange(table.rows)
    if wanted == ROW_NUMBERS:
        return "", numbers
    if wanted is not None:
        if wanted not in table.columns:
            raise LogError(
                f"there is no column '{wanted}' for the steps.{closest(wanted, table.columns)} There are: "
                f"{', '.join(table.columns)}. Or number the rows: --step-column {ROW_NUMBERS}"
            )
        steps, why = _as_steps(table.columns[wanted], table.rows)
        if why:
            raise LogError(
                f"'{wanted}' cannot be the steps: {why}. Or number the rows: --step-column {ROW_NUMBERS}"
            )
        return wanted, steps
    if table.steps is not None:
        return "", table.steps
    by_name = {_plain(name): name for name in reversed(list(table.columns))}
    for name in filter(None, map(by_name.get, STEP_NAMES)):
        steps, why = _as_steps(table.columns[name], table.rows)
        known = steps[steps >= 0]
        if not why and 2 * len(_distinct(known)) < len(known):
            why = "most rows repeat it"
        if not why and 2 * len(known) < table.rows:
            why = "most rows lack it"
        if not why:
            return name, steps
        note(f"'{name}' is not taken for the step: {why}")
    note("no column counts the steps: rows are numbered. Name one with --step-column")
    return "", numbers


def _as_steps(column: Column, rows: int) -> tuple[np.ndarray, str]:
    """int64 [rows], -1 where there is none; and why the column cannot be the steps, or ""."""
    steps, values = np.full(rows, -1, np.int64), column.values
    if values.ndim > 1:
        return steps, "it holds lists"
    finite = np.isfinite(values)
    if (np.abs(values[finite]) > LARGEST_STEP).any():
        return steps, f"it goes beyond {LARGEST_STEP:,}"
    if (values[finite] < 0).any():
        return steps, "it has negative values"
    if (values[finite] % 1 != 0).any():
        return steps, "it has fractions"
    steps[column.rows[finite]] = values[finite]
    return steps, ""


def _distinct(steps: np.ndarray) -> np.ndarray:
    """Each step once, rising; for rows in order far faster than np.unique."""
    ordered = np.sort(steps, kind="stable")
    return ordered[np.diff(ordered, prepend=-1) > 0]


def _printable(name: str) -> str:
    """The name with what does not print as Python writes it, so that it stays on its line."""
    return name if name.isprintable() else name.encode("unicode_escape").decode("ascii")


def _plain(name: str) -> str:
    return name.lower().replace("/", "_").replace(" ", "_").replace("-", "_").replace(".", "_")
