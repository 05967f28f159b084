"""What a reader finds, before rows are ordered: columns of numbers that any row may lack.

    cells = Cells()
    for row, value in ..:
        cells.add("entropy", row, value)         # a number, its text, a list of them, None
    cells.settle()                               # now and then: turns what has come into arrays
    cells.columns(note)["entropy"].values        # float64 [m], of the m rows that have it

A lacking value is not the same as NaN: where a step was logged twice, what the later row lacks stays,
what it calls NaN does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import LogError

MAX_COLUMNS = 20_000  # far beyond a log of 64 layers x 64 experts with a column for each
MAX_LINE = 2**24  # bytes of text; a row of 64 layers x 64 experts has 80 thousand
MAX_CELLS = 2**30  # 8 GiB
Note = Callable[[str], None]


@dataclass(frozen=True)
class Column:
    """Values of the rows that have one: `rows` int64 [m], ascending; `values` float64 [m] or [m, E]."""

    rows: np.ndarray
    values: np.ndarray


@dataclass(frozen=True)
class Table:
    """What a reader found.

    Attributes:
        columns: by name.
        rows: number of rows.
        steps: int64 [rows], where the format itself says what step a row is.
    """

    columns: Mapping[str, Column]
    rows: int
    steps: np.ndarray | None = None


class Cells:
    """Collects values of rows 0, 1, .. in ascending order."""

    def __init__(self, row_name: Callable[[int], str]) -> None:
        self._row_name = row_name  # what an error calls a row: "line 7"
        self._open: dict[str, tuple[list[int], list[Any]]] = defaultdict(lambda: ([], []))
        self._parts: dict[str, list[Column]] = defaultdict(list)
        self._odd: dict[str, tuple[int, int, Any]] = {}  # count, first row, its value

    def add(self, name: str, row: int, value: Any) -> None:
        """One value; None is none."""
        if value is not None:
            rows, values = self._open[name]
            rows.append(row)
            values.append(value)

    def add_row(self, row: int, values: Mapping[str, Any], prefix: str = "") -> None:
        """All values of a row; the keys of nested objects are joined by dots."""
        for key, value in values.items():
            if isinstance(value, dict):
                self.add_row(row, value, f"{prefix}{key}.")
            elif value is not None:
                at, column = self._open[prefix + key]
                at.append(row)
                column.append(value)

    def settle(self) -> None:
        """Turns the values that have come into arrays.

        Raises:
            LogError: there are too many columns to be a log.
        """
        for name, (rows, values) in self._open.items():
            at = np.array(rows, np.int64)
            try:
                parts = [Column(at, np.array(values, np.float64))]
            except (ValueError, TypeError, OverflowError):
                parts = list(self._one_by_one(name, rows, values))
            self._parts[name] += parts
        self._open.clear()
        check_columns(len(self._parts))
        if (cells := sum(part.values.size for parts in self._parts.values() for part in parts)) > MAX_CELLS:
            raise too_large(cells)

    def _one_by_one(self, name: str, rows: list[int], values: list[Any]) -> Iterator[Column]:
        """Columns of one shape each; what is not a number is counted."""
        shapes: dict[tuple[int, ...], tuple[list[int], list[np.ndarray]]] = defaultdict(lambda: ([], []))
        for row, value in zip(rows, values, strict=True):
            try:
                array = np.array(value, np.float64)
            except (ValueError, TypeError, OverflowError):
                count, first, sample = self._odd.get(name, (0, row, value))
                self._odd[name] = (count + 1, first, sample)
            else:
                at, arrays = shapes[array.shape]
                at.append(row)
                arrays.append(array)
        for at, arrays in shapes.values():
            yield Column(np.array(at, np.int64), np.stack(arrays))

    def columns(self, note: Note) -> dict[str, Column]:
        """All columns. `note` is told what could not be used: text, and lists of another shape than most."""
        self.settle()
        found: dict[str, Column] = {}
        for name in dict.fromkeys([*self._parts, *self._odd]):
            parts = self._parts[name]
            counts: dict[tuple[int, ...], int] = defaultdict(int)
            for part in parts:
                counts[part.values.shape[1:]] += len(part.rows)
            if not counts:
                _, first, sample = self._odd[name]
                note(f"'{name}' holds no numbers ({self._row_name(first)}: {_short(sample)}) and is left out")
                continue
            if name in self._odd:
                count, first, sample = self._odd[name]
                odd = counted(count, "value is no number", "values are no numbers")
                note(
                    f"'{name}': {odd}, taken as missing (first in {self._row_name(first)}: {_short(sample)})"
                )
            shape = max(counts, key=lambda shape: counts[shape])
            same = [part for part in parts if part.values.shape[1:] == shape]
            if other := [part for part in parts if part.values.shape[1:] != shape]:
                rows = counted(sum(len(part.rows) for part in other), "row holds", "rows hold")
                note(
                    f"'{name}': {rows} {_shape(other[0].values)}, most hold {_shape(same[0].values)}; taken "
                    f"as missing (first in {self._row_name(min(int(part.rows[0]) for part in other))})"
                )
            rows = np.concatenate([part.rows for part in same])
            values = np.concatenate([part.values for part in same])
            order = np.argsort(rows, kind="stable")
            found |= _spread(name, rows[order], values[order])
        return found


def check_columns(count: int) -> None:
    """Raises a LogError for more columns than a log has."""
    if count > MAX_COLUMNS:
        raise LogError(
            f"the log has more than {MAX_COLUMNS:,} columns: its keys differ from row to row, so they "
            "are data, not names. Log such values as a list under one key."
        )


def too_large(cells: int) -> LogError:
    """The error for more values than a log can have."""
    return LogError(
        f"{cells:,} values are more than a log can have ({MAX_CELLS:,}). "
        "Keep the columns that rules are about."
    )


def _spread(name: str, rows: np.ndarray, values: np.ndarray) -> dict[str, Column]:
    """A list of lists is one column for each inner list: layers of experts."""
    if values.size == 0:
        return {}
    if values.ndim <= 2:
        return {name: Column(rows, values)}
    inner = ((f"{name}.{i}", values[:, i]) for i in range(values.shape[1]))
    return {key: column for each, x in inner for key, column in _spread(each, rows, x).items()}


def counted(count: int, one: str, many: str) -> str:
    """ "1 row is", "2,000 rows are": a number and what it counts."""
    return f"{count:,} {one if count == 1 else many}"


def _shape(values: np.ndarray) -> str:
    return f"lists of {' x '.join(map(str, values.shape[1:]))}" if values.ndim > 1 else "single numbers"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
