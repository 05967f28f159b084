"""JSON lines: one object a line, nested keys joined by dots.

    {"epoch": 1, "entropy": 1.4012, "utilization": [0.23, 0.10, ..], "metrics": {"loss": 2.59}}

gives the columns `epoch`, `entropy`, `utilization` [E] and `metrics.loss`. NaN and Infinity are read as
Python writes them.
"""

from __future__ import annotations

import json
from typing import Any

from ..errors import LogError
from ..paths import AnyPath
from .cells import MAX_LINE, Cells, Note, Table

SETTLE_ROWS = 20_000  # objects that are held at once


def read_jsonlines(path: AnyPath, note: Note) -> Table:
    """Reads a file.

    Raises:
        LogError: a line other than the last is no object, or one is far too long.
    """
    lines: list[int] = []  # line number of each row
    cells = Cells(lambda row: f"line {lines[row]:,}")
    bad: tuple[int, str] | None = None  # a line that cannot be read: fatal unless it is the last
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            if len(line) > MAX_LINE:
                raise LogError(
                    f"line {number:,} has more than {MAX_LINE:,} bytes. A log has one short object a line; "
                    "what is no metric is better kept elsewhere."
                )
            if not (line := line.strip()):
                continue
            if bad:
                raise LogError(f"line {bad[0]:,} {bad[1]}")
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if not isinstance(row, dict):
                    raise LogError(f"line {number:,} {_no_object(row)}")
                cells.add_row(len(lines), row)
            except (ValueError, RecursionError) as error:
                if isinstance(error, LogError):
                    raise
                bad = number, _unreadable(line, error)
                continue
            lines.append(number)
            if len(lines) % SETTLE_ROWS == 0:
                cells.settle()
    if bad and not lines:
        raise LogError(f"line {bad[0]:,} {bad[1]}")
    if bad:
        note(f"line {bad[0]:,}, the last, is cut off and left out")
    return Table(cells.columns(note), len(lines))


def _no_object(row: Any) -> str:
    kind = {list: "an array", str: "a text", type(None): "null"}.get(type(row), "a number")
    advice = "If the whole file is one array, write it as lines: jq -c '.[]' FILE > log.jsonl"
    return f"is {kind}, not an object. One object a line is read. {advice}"


def _unreadable(line: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "is not UTF-8 text. Convert the file, or say what it is: --log-format csv, events or dataset."
    start = line[:40].decode("utf-8", "replace")
    why = error.msg if isinstance(error, json.JSONDecodeError) else str(error).split(";")[0]
    return (
        f"is not a JSON object ({why}): {start!r}. Usual causes: printed text among the rows (keep the "
        "objects with grep '^{' FILE > log.jsonl), or objects on several lines (join them with "
        "jq -c . FILE > log.jsonl)."
    )
