"""The history, on disk or in an object store: a zarr store, readable at every moment and after a kill.

    ZarrSink()                      # <logdir>/audit.zarr; the next run audit-2.zarr, ...
    ZarrSink("gs://bucket/runs/demo/my.zarr")
    xarray.open_zarr("runs/demo/audit.zarr", consolidated=False)    # rows with step = -1: not written

A new store claims its name by a file that one process alone can create; it counts once the `zarr.json`
of its group is there, which comes last. All arrays are declared far ahead, since unwritten chunks cost
nothing and growing is the one thing that readers can trip over. A batch writes its rows in every array
and then in `step`, which is the commit mark: a row counts once its step is there. The file of a chunk is
replaced in one piece, so a killed process leaves whole rows, and misses at most the batch that it was
writing. Nothing is fsynced: a power cut may take what the operating system had not yet written.

Chunks are encoded and written here, since zarr's own assignment first reads what it is going to replace.
The rows of unfinished chunks are kept in memory: a batch reads nothing, and costs one file for each of the
nine arrays (more where it fills chunks); in an object store eight PUTs at once, and that of `step` after
them. Some replace an object once a second at most: with steps of a few milliseconds pass a `flush_every`
that lasts some seconds.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from ..columns import Column, attributes, columns, coordinates
from ..errors import HistoryError
from ..hookspecs import hookimpl
from ..paths import AnyPath, as_path, claim, put
from ..records import Records, Run
from ..stores import CODECS, arrays, misfit, numbered, stores, written_rows

DECLARED_ROWS = 2**20
STEP_CHUNK = 4096  # xarray reads all of `step` on opening: 256 files, not 16,000
CHUNK_BYTES = 2**18  # a flush rewrites the last chunk of every array; a reader wants few files

logger = logging.getLogger("moe_rules_callback")


class ZarrSink:
    """Writes the history of a run as a zarr store.

    A run never touches the store of another: if `path` exists, `-2`, `-3`, .. are tried. With
    `resume=True` the newest store is continued, provided that rules, signals, layers and experts
    are the same; rows from the first new step on, written before a checkpoint was restored, are
    replaced. If they are not the same, a new store names the old one in its attribute `continues`.

    Args:
        path: of the store, here or as a URL; None: `audit.zarr` in the log directory of the run.

    Attributes:
        path: of the store that is being written, a Path or for a URL a UPath; None before the run.
    """

    def __init__(self, path: str | AnyPath | None = None) -> None:
        self._wanted = None if path is None else as_path(path)
        self.path: AnyPath | None = None

    def last_step(self, logdir: AnyPath | None) -> int:
        """The last step of the newest store that a run in this directory would continue, or -1."""
        existing = stores(self._place(logdir))
        rows = written_rows(existing[-1]) if existing else 0
        if rows == 0:
            return -1
        return int(cast(np.ndarray, arrays(existing[-1])["step"][rows - 1]))

    def _place(self, logdir: AnyPath | None) -> AnyPath:
        """The name of the first store."""
        if self._wanted is None and logdir is None:
            raise HistoryError(
                "The zarr sink does not know where to write: the run has no log directory. Pass "
                "logdir=... to the callback, or a path: ZarrSink('runs/demo/audit.zarr')."
            )
        return self._wanted or as_path(logdir or "") / "audit.zarr"

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        wanted = self._place(run.logdir)
        existing = stores(wanted)
        newest = existing[-1] if existing else None
        why_not = misfit(newest, run.schema) if newest and run.resume else ""
        self._columns = columns(run.schema)
        self._rewind_pending = bool(newest and run.resume and not why_not)
        if newest and self._rewind_pending:
            self.path, self._rows = newest, written_rows(newest)
            self._declare(max(DECLARED_ROWS, self._rows))
        else:
            self.path, self._rows = _create(wanted, run, newest.name if newest and why_not else None), 0
            self._declared = DECLARED_ROWS
        self._arrays = arrays(self.path, mode="r+")
        self._tails: dict[str, np.ndarray] = {}  # rows of the unfinished chunks
        if why_not:
            logger.warning(
                "%s cannot be continued: %s. This run goes to %s, whose attribute `continues` names it.",
                newest,
                why_not,
                self.path,
            )
        elif newest and not run.resume:
            logger.warning("%s holds another run and is left alone; this run goes to %s.", newest, self.path)

    @hookimpl
    def on_records(self, records: Records) -> None:
        if len(records) == 0:
            return
        if self._rewind_pending:
            self._rewind(int(records.step[0]))
            self._rewind_pending = False
        if self._rows + len(records) > self._declared:
            self._declare(self._rows + len(records) + DECLARED_ROWS)
        rows = {column.name: self._from_chunk(column.name, records) for column in self._columns}
        *others, step = self._columns  # `step`, the commit mark, is the last
        put({path: data for column in others for path, data in self._chunks(column, rows[column.name])})
        put(dict(self._chunks(step, rows["step"])))
        self._rows += len(records)
        for name, known in rows.items():
            self._tails[name] = known[len(known) - self._rows % self._arrays[name].chunks[0] :].copy()

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        self._declare(self._rows)

    def _from_chunk(self, name: str, records: Records) -> np.ndarray:
        """These rows of an array, and before them those of the chunk that they begin in."""
        if name not in self._tails:  # the first rows; a store that is continued may hold some of their chunk
            array = self._arrays[name]
            self._tails[name] = np.asarray(
                array[self._rows // array.chunks[0] * array.chunks[0] : self._rows]
            )
        return np.concatenate([self._tails[name], getattr(records, name)])

    def _chunks(self, column: Column, rows: np.ndarray) -> Iterator[tuple[AnyPath, bytes]]:
        """The files of the chunks of these rows, the last of which they may fill in part."""
        from numcodecs.zstd import Zstd

        assert self.path is not None
        shape = self._arrays[column.name].chunks
        first, folder = self._rows // shape[0], self.path / column.name / "c"
        for number, start in enumerate(range(0, len(rows), shape[0]), first):
            chunk = np.full(shape, column.fill, np.dtype(column.dtype).newbyteorder("<"))
            part = rows[start : start + shape[0]]
            chunk[tuple(map(slice, part.shape))] = part
            key = map(str, (number, *[0] * (chunk.ndim - 1)))
            yield folder.joinpath(*key), Zstd(level=0).encode(chunk)

    def _declare(self, rows: int) -> None:
        """Gives every array this length; `step` comes last.

        zarr's own resize looks in the store for every chunk that the longer array could have had, which
        takes seconds; the length is one number in the array's metadata, and replaced in one piece.
        """
        assert self.path is not None
        metadata = {}
        for column in self._columns:
            path = self.path / column.name / "zarr.json"
            told = json.loads(path.read_bytes())
            told["shape"][0] = rows
            metadata[path] = json.dumps(told, indent=2).encode()
        step = dict([metadata.popitem()])
        put(metadata)
        put(step)
        self._declared = rows

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


def _create(wanted: AnyPath, run: Run, continues: str | None) -> AnyPath:
    """A new, empty store under the next free name."""
    files = _empty(run, {} if continues is None else {"continues": continues})
    for number in itertools.count(max(numbered(wanted), default=0) + 1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        try:
            claim(path / "step" / "zarr.json")
        except FileExistsError:  # another process was faster
            continue
        put({path / key: data for key, data in files.items() if key != "zarr.json"})
        put({path / "zarr.json": files["zarr.json"]})
        return path
    raise AssertionError("unreachable")


def _empty(run: Run, link: dict[str, str]) -> dict[str, bytes]:
    """The files of a store without rows."""
    import zarr

    files: dict[str, Any] = {}
    group = zarr.create_group(files, attributes=attributes(run.schema, run.config) | link)
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
            chunks=_chunk_shape(column, shape, run.flush_every),
            serializer=CODECS[0],
            compressors=CODECS[1:],
            dtype=column.dtype,
            fill_value=column.fill,
            dimension_names=column.dims,
            attributes=dict(column.attrs),
        )
    return {key: buffer.to_bytes() for key, buffer in files.items()}


def _chunk_shape(column: Column, shape: tuple[int, ...], flush_every: int) -> tuple[int, ...]:
    """A flush at least, and as many whole flushes as fit in CHUNK_BYTES, up to STEP_CHUNK rows."""
    inner = tuple(max(1, size) for size in shape[1:])
    row_bytes = np.dtype(column.dtype).itemsize * int(np.prod(inner))
    rows = min(STEP_CHUNK, CHUNK_BYTES // row_bytes)
    return max(flush_every, rows // flush_every * flush_every), *inner
