"""The history on disk: one zarr store a run, readable at every moment and after a kill.

    ZarrSink()                      # <logdir>/audit.zarr; the next run audit-2.zarr, ...
    ZarrSink("runs/demo/my.zarr")
    xarray.open_zarr("runs/demo/audit.zarr", consolidated=False)    # rows with step = -1: not written

All arrays are declared far ahead, since unwritten chunks cost nothing and growing is the one thing
that readers can trip over. A batch writes its rows in every array and then in `step`, which is the
commit mark: a row counts once its step is there. zarr replaces the file of a chunk in one piece, so
a killed process leaves whole rows, and misses at most the batch that it was writing. Nothing is
fsynced: a power cut may take what the operating system had not yet written.
"""

from __future__ import annotations

import itertools
import json
import logging
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from ..columns import Column, attributes, columns, coordinates
from ..errors import HistoryError
from ..hookspecs import hookimpl
from ..records import Records, Run, Schema

if TYPE_CHECKING:
    import zarr

DECLARED_ROWS = 2**20
STEP_CHUNK = 4096  # xarray reads all of `step` on opening: 256 files, not 16,000
CHUNK_BYTES = 2**16  # a flush rewrites the last chunk of every array; a reader wants few files

logger = logging.getLogger("moe_rules_callback")


class ZarrSink:
    """Writes the history of a run as a zarr store.

    A run never touches the store of another: if `path` exists, `-2`, `-3`, .. are tried. With
    `resume=True` the newest store is continued, provided that rules, signals, layers and experts
    are the same; rows from the first new step on, written before a checkpoint was restored, are
    replaced. If they are not the same, a new store names the old one in its attribute `continues`.

    Args:
        path: of the store; None: `audit.zarr` in the log directory of the run.

    Attributes:
        path: of the store that is being written; None before the run.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self._wanted = None if path is None else Path(path)
        self.path: Path | None = None

    def last_step(self, logdir: Path | None) -> int:
        """The last step of the newest store that a run in this directory would continue, or -1."""
        existing = stores(self._place(logdir))
        rows = written_rows(existing[-1]) if existing else 0
        return int(cast(np.ndarray, _arrays(existing[-1], mode="r")["step"][:rows])[-1]) if rows else -1

    def _place(self, logdir: Path | None) -> Path:
        """The name of the first store."""
        if self._wanted is None and logdir is None:
            raise HistoryError(
                "The zarr sink does not know where to write: the run has no log directory. Pass "
                "logdir=... to the callback, or a path: ZarrSink('runs/demo/audit.zarr')."
            )
        return self._wanted or Path(logdir or "") / "audit.zarr"

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        wanted = self._place(run.logdir)
        existing = stores(wanted)
        newest = existing[-1] if existing else None
        misfit = _misfit(newest, run.schema) if newest and run.resume else ""
        self._rewind_pending = bool(newest and run.resume and not misfit)
        if newest and self._rewind_pending:
            self.path, self._rows = newest, written_rows(newest)
        else:
            self.path, self._rows = _create(wanted, run, newest.name if newest and misfit else None), 0
        if misfit:
            logger.warning(
                "%s cannot be continued: %s. This run goes to %s, whose attribute `continues` names it.",
                newest,
                misfit,
                self.path,
            )
        elif newest and not run.resume:
            logger.warning("%s holds another run and is left alone; this run goes to %s.", newest, self.path)
        self._columns = columns(run.schema)
        self._declare(max(DECLARED_ROWS, self._rows))

    @hookimpl
    def on_records(self, records: Records) -> None:
        if len(records) == 0:
            return
        if self._rewind_pending:
            self._rewind(int(records.step[0]))
            self._rewind_pending = False
        start, stop = self._rows, self._rows + len(records)
        if stop > self._arrays["step"].shape[0]:
            self._declare(stop + DECLARED_ROWS)
        for column in self._columns:  # `step`, the commit mark, is the last
            self._arrays[column.name][start:stop] = getattr(records, column.name)
        self._rows = stop

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        self._declare(self._rows)

    def _declare(self, rows: int) -> None:
        """Gives every array this length; `step` comes last.

        zarr's own resize looks on disk for every chunk that the longer array could have had, which
        takes seconds; the length is one number in the array's metadata, and replaced in one piece.
        """
        assert self.path is not None
        for column in self._columns:
            metadata = self.path / column.name / "zarr.json"
            told = json.loads(metadata.read_text())
            told["shape"][0] = rows
            partial = metadata.with_suffix(".partial")
            partial.write_text(json.dumps(told, indent=2))
            partial.replace(metadata)
        self._arrays = _arrays(self.path)

    def _rewind(self, first: int) -> None:
        """Unwrites the rows from step `first` on, last chunk first: what is left is always a prefix."""
        step = self._arrays["step"]
        late = np.asarray(step[: self._rows]) >= first
        if not late.any():
            return
        keep, chunk = int(late.argmax()), step.chunks[0]
        for start in reversed(range(keep // chunk * chunk, self._rows, chunk)):
            step[max(start, keep) : min(start + chunk, self._rows)] = -1
        logger.info("%s: %d rows from step %d on are replaced.", self.path, self._rows - keep, first)
        self._rows = keep


def stores(wanted: Path) -> list[Path]:
    """The stores that go by this name, oldest first: audit.zarr, audit-2.zarr, ..."""
    return [path for _, path in sorted(_numbered(wanted).items())]


def written_rows(store: Path) -> int:
    """How many rows of a store are whole.

    Raises:
        HistoryError: it is no history.
    """
    step = _arrays(store, mode="r").get("step")
    if step is None:
        raise HistoryError(
            f"{store} is not a history of moe_rules_callback: it has no array `step`. open_history reads "
            "what ZarrSink wrote; other zarr stores open with xarray.open_zarr."
        )
    unwritten = np.asarray(step[:]) < 0
    return int(unwritten.argmax()) if unwritten.any() else len(unwritten)


def _arrays(store: Path, mode: Any = "r+") -> dict[str, zarr.Array]:
    import zarr

    return dict(zarr.open_group(store, mode=mode).arrays())


def _numbered(wanted: Path) -> dict[int, Path]:
    pattern = re.compile(re.escape(wanted.stem) + r"(?:-(\d+))?" + re.escape(wanted.suffix))
    found = ((pattern.fullmatch(path.name), path) for path in wanted.parent.glob("*") if path.is_dir())
    return {int(match[1] or 1): path for match, path in found if match}


def _create(wanted: Path, run: Run, continues: str | None) -> Path:
    """A new, empty store under the next free name. It appears there whole, by a rename."""
    import zarr

    link = {} if continues is None else {"continues": continues}
    wanted.parent.mkdir(parents=True, exist_ok=True)
    partial = wanted.with_name(f".{wanted.name}.{uuid.uuid4().hex}.partial")
    group = zarr.create_group(partial, attributes=attributes(run.schema, run.config) | link)
    known = coordinates(run.schema)
    for name, values in known.items():
        text = values.dtype.kind == "U"  # zarr v3 specifies "string", but no strings of a fixed length
        dtype = "string" if text else values.dtype
        array = group.create_array(
            name, shape=values.shape, chunks=(max(1, len(values)),), dtype=dtype, dimension_names=[name]
        )
        array[:] = values.astype(object) if text else values
    for column in columns(run.schema):
        shape = (DECLARED_ROWS, *(len(known[dim]) for dim in column.dims[1:]))
        group.create_array(
            column.name,
            shape=shape,
            chunks=_chunks(column, shape, run.flush_every),
            dtype=column.dtype,
            fill_value=column.fill,
            dimension_names=column.dims,
            attributes=dict(column.attrs),
        )
    for number in itertools.count(max(_numbered(wanted), default=0) + 1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        try:
            return partial.rename(path)
        except OSError:  # another process was faster
            if not path.exists():
                raise
    raise AssertionError("unreachable")


def _chunks(column: Column, shape: tuple[int, ...], flush_every: int) -> tuple[int, ...]:
    """A flush at least, and as many whole flushes as fit in CHUNK_BYTES, up to STEP_CHUNK rows."""
    inner = tuple(max(1, size) for size in shape[1:])
    row_bytes = np.dtype(column.dtype).itemsize * int(np.prod(inner))
    rows = min(STEP_CHUNK, CHUNK_BYTES // row_bytes)
    return max(flush_every, rows // flush_every * flush_every), *inner


def _misfit(store: Path, schema: Schema) -> str:
    """Why the rows of `schema` cannot be appended to a store, or ""."""
    import zarr

    group = zarr.open_group(store, mode="r")
    arrays = dict(group.arrays())
    if "step" not in arrays:
        return "it is not a history of this package"
    old, new = json.loads(str(group.attrs["rules"])), json.loads(attributes(schema, {})["rules"])
    for name in old | new:
        if name not in old or name not in new:
            return f"rule {name!r} is {'new' if name in new else 'gone'}"
        for what in ("text", "formula", "threshold", "kind"):
            if old[name][what] != new[name][what]:
                return f"the {what} of rule {name!r} was {old[name][what]!r} and is {new[name][what]!r}"
    for name, values in coordinates(schema).items():
        before = np.asarray(arrays[name][:]).tolist() if name in arrays else []
        if before != values.tolist():
            return f"the {name}s were {_few(before)} and are {_few(values.tolist())}"
    return "" if bool(schema.experts) == ("expert" in arrays) else "experts were recorded and are not"


def _few(values: list[Any]) -> str:
    shown = ", ".join(map(str, values[:4])) or "none"
    return f"{shown}, .. ({len(values)})" if len(values) > 4 else shown
