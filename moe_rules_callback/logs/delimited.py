"""CSV with a header; commas, semicolons or tabs, whichever its first line has most of."""

from __future__ import annotations

import re
import warnings

import numpy as np

from ..errors import LogError
from ..paths import AnyPath
from .cells import MAX_LINE, Column, Note, Table, check_columns, counted


def read_csv(path: AnyPath, note: Note) -> Table:
    """Reads a file; an empty field is a missing value.

    Raises:
        LogError: it has no header, rows of different length, or is no text.
    """
    import pandas as pd

    blank, header = _header(path)
    separator = max(",;\t", key=header.count)
    check_columns(header.count(separator) + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            with path.open("rb") as file:
                frame = pd.read_csv(
                    file,
                    sep=separator,
                    skiprows=blank,
                    index_col=False,
                    skip_blank_lines=False,
                    skipinitialspace=True,
                    low_memory=False,
                    encoding="utf-8-sig",
                )
        except (ValueError, pd.errors.ParserWarning) as error:  # pandas' own errors are ValueErrors
            raise LogError(_unreadable(error)) from None
    if _cut_off(path, separator, frame.shape[1]):
        note("the last line is cut off and left out")
        frame = frame.iloc[:-1]
    frame = frame.dropna(how="all")
    lines = frame.index.to_numpy() + blank + 2
    columns = {}
    for name in frame.columns:
        values = frame[name]
        numbers = np.asarray(pd.to_numeric(values, errors="coerce"), np.float64)
        there = ~np.isnan(numbers)
        odd = np.flatnonzero(~there & values.notna().to_numpy())
        if len(odd):
            sample = f"(first in line {lines[odd[0]]:,}: {str(values.iloc[odd[0]])[:40]!r})"
            if not there.any():
                note(f"'{name}' holds no numbers {sample} and is left out")
            else:
                told = counted(len(odd), "value is no number", "values are no numbers")
                note(f"'{name}': {told}, taken as missing {sample}")
        if there.any():
            columns[str(name)] = Column(np.flatnonzero(there), numbers[there])
    return Table(columns, len(frame))


def _header(path: AnyPath) -> tuple[int, str]:
    """Number of blank lines before the header, and the header."""
    with path.open("rb") as file:
        read = iter(lambda: file.readline(MAX_LINE + 1), b"")
        blank, line = next(((blank, line) for blank, line in enumerate(read) if line.strip()), (0, b""))
    if not line:
        raise LogError("the file is empty. A log has one row a step.")
    if len(line) > MAX_LINE:
        raise LogError(
            f"the first line has more than {MAX_LINE:,} bytes; it should be the names of the columns."
        )
    try:
        header = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise LogError("line 1 is not UTF-8 text: this is no CSV file. Name its --log-format.") from None
    fields = [field.strip().strip("\"'") for field in re.split(r"[,;\t]", header)]
    if all(map(_is_number, fields)):
        raise LogError(
            f"line {blank + 1} is no header: it holds numbers only ({header.strip()[:40]!r}). Write the "
            "names of the columns in the first line, for example: step,loss,expert_0,expert_1"
        )
    return blank, header


def _cut_off(path: AnyPath, separator: str, fields: int) -> bool:
    """Whether the last line has neither its end nor all of its fields."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2**16))
        last = file.read().rsplit(b"\n", 1)[-1]
    return bool(last.strip()) and last.count(separator.encode()) + 1 < fields


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return not text
    return True


def _unreadable(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text. Convert it (iconv -f latin1 -t utf-8), or name its --log-format."
    told = " ".join(str(error).removeprefix("Error tokenizing data. C error: ").split()).rstrip(".")
    return (
        f"it cannot be read as CSV: {told[:200]}. Usual causes: a comma inside a number or text without "
        "quotes, or two tables in one file. Give every row as many fields as the header."
    )
