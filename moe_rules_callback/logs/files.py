"""Which reader a log needs."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import LogError
from ..paths import AnyPath, as_path
from .cells import Note, Table
from .log import Log, assemble

FORMATS = ("json", "csv", "events", "dataset")


def read_log(path: str | AnyPath, *, format: str | None = None, step: str | None = None) -> Log:
    """Reads a training log.

    Args:
        path: a file of JSON lines, CSV or TensorBoard events, a directory with event files, or a zarr store
            or netCDF file with variables over a step-like dimension.
        format: one of `FORMATS`; None: told by the name, and by the first bytes.
        step: name of the column that counts the steps, "-" to number the rows, None to guess.

    Raises:
        LogError: it cannot be read; the message names the line where there is one, and says what to do.
        OSError: it may not be read.
    """
    path = as_path(path)
    notes: list[str] = []
    try:
        found = format or _format(path)
        return assemble(_reader(found)(path, notes.append), path, found, step, notes)
    except LogError as error:
        raise LogError(f"{path}: {error}") from None


def _reader(format: str) -> Callable[[AnyPath, Note], Table]:
    match format:
        case "json":
            from .jsonlines import read_jsonlines as read
        case "csv":
            from .delimited import read_csv as read
        case "events":
            from .events import read_events as read
        case "dataset":
            from .datasets import read_dataset as read
        case _:
            raise LogError(f"there is no format {format!r}. There are: {', '.join(FORMATS)}.")
    return read


def _format(path: AnyPath) -> str:
    if path.is_dir():
        store = path.suffix == ".zarr" or any((path / name).exists() for name in ("zarr.json", ".zgroup"))
        return "dataset" if store else "events"
    if not path.exists():
        raise LogError("there is no such file or directory. Name a training log, or the logdir of a run.")
    with path.open("rb") as file:
        start = file.read(512)
    if "tfevents" in path.name:
        return "events"
    if start[:4] in (b"\x89HDF", b"CDF\x01", b"CDF\x02", b"CDF\x05"):
        return "dataset"
    if path.suffix in (".csv", ".tsv"):
        return "csv"
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    return "json" if text[:1] in (b"{", b"[") or path.suffix in (".json", ".jsonl", ".ndjson") else "csv"
