"""The history, on disk or in an object store: a zarr store, readable at every moment and after a kill.

    ZarrSink()                      # <logdir>/audit.zarr; the next run audit-2.zarr, ...
    ZarrSink("gs://bucket/runs/demo/my.zarr")
    xarray.open_zarr("runs/demo/audit.zarr")    # while it is written: rows with step = -1 are not there yet

A new store claims its name by a file that one process alone can create; it counts once the `zarr.json`
of its group is there, which comes last. All arrays are declared far ahead, since unwritten chunks cost
nothing and growing is the one thing that readers can trip over. A batch writes its rows in every array
and then in `step`, which is the commit mark: a row counts once its step is there. The file of a chunk is
replaced in one piece, so a killed process leaves whole rows, and misses at most the batch that it was
writing. Nothing is fsynced: a power cut may take what the operating system had not yet written.

A file system that fails, a full disk or a network that is away, is asked again (`TryAgain`): what is known
here changes after the files have, and a batch that is written twice is the same.

Chunks are encoded and written here, since zarr's own assignment first reads what it is going to replace.
The rows of unfinished chunks are kept in memory: a batch reads one small file, which says whose the store is,
and writes one for each of the nine arrays (more where it fills chunks); in an object store eight PUTs at
once, and that of `step` after them. Some replace an object once a second at most: with steps of a few
milliseconds pass a `flush_every` that lasts some seconds.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
import uuid
from collections.abc import Iterator
from typing import cast

import numpy as np

from ..columns import Column, columns
from ..errors import HistoryError
from ..hookspecs import hookimpl
from ..paths import AnyPath, as_path, claim, put, retried
from ..records import Records, Run
from ..stores import arrays, held, misfit, numbered, stores, written_rows
from . import new_store

logger = logging.getLogger("moe_rules_callback")


class ZarrSink:
    """Writes the history of a run as a zarr store.

    A run never touches the store of another: if `path` exists, `-2`, `-3`, .. are tried. With
    `resume=True` the newest store is continued, provided that rules, signals, layers and experts
    are the same. If they are not, a new store names the old one in its attribute `continues`. A run that
    still writes to a store that another one continues goes on in such a new store itself.

    Rows from a step on that come again, because a checkpoint was restored, are replaced; the attribute
    `replaced` lists how many from which step, and when.

    Args:
        path: of the store, here or as a URL; None: `audit.zarr` in the log directory of the run.

    Attributes:
        path: of the store that is being written, a Path or for a URL a UPath; None before the run.
    """

    def __init__(self, path: str | AnyPath | None = None) -> None:
        self._wanted = None if path is None else as_path(path)
        self.path: AnyPath | None = None
        self._claimed: AnyPath | None = None  # a new store that is not complete
        self._writer = uuid.uuid4().hex  # stands in the store that this object writes

    def last_step(self, logdir: AnyPath | None) -> int:
        """The last step of the newest store that a run in this directory would continue, or -1."""
        existing = stores(self._place(logdir))
        rows = written_rows(existing[-1]) if existing else 0
        if rows == 0:
            return -1
        return int(cast(np.ndarray, arrays(existing[-1])["step"][rows - 1]))

    def held(self, records: Records) -> int:
        """How many of these rows, from the first on, the store holds, see `Records.held`."""
        return 0 if self.path is None else held(self.path, records)

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
        self._run, self._columns = run, columns(run.schema)
        with retried(wanted):
            existing = [store for store in stores(wanted) if store != self._claimed]
            newest = existing[-1] if existing else None
            why_not = misfit(newest, run.schema) if newest and run.resume else ""
            if newest and run.resume and not why_not:
                self._continue(newest)
                return
            self._begin(newest.name if newest and why_not else None)
        if why_not:
            logger.warning(
                "%s cannot be continued: %s. This run goes to %s, whose attribute `continues` names it.",
                newest, why_not, self.path,
            )  # fmt: skip
        elif newest:
            logger.warning("%s holds another run and is left alone; this run goes to %s.", newest, self.path)

    @hookimpl
    def on_records(self, records: Records) -> None:
        if len(records) == 0:
            return
        assert self.path is not None
        with retried(self.path):
            if not self._is_ours():
                lost = self.path
                self._begin(lost.name)
                logger.warning(
                    "another run continues %s; rows from step %d on go to %s. Give each run that is alive a "
                    "logdir of its own.",
                    lost, int(records.step[0]), self.path,
                )  # fmt: skip
            if self._rewind_pending:
                self._rewind(int(records.step[0]))
                self._rewind_pending = False
            if self._rows + len(records) > self._declared:
                self._declare(self._rows + len(records) + new_store.DECLARED_ROWS)
                self._arrays = arrays(self.path, mode="r+")  # which know how long they are
            rows = {column.name: self._from_chunk(column.name, records) for column in self._columns}
            *others, step = self._columns  # `step`, the commit mark, is the last
            put({path: data for column in others for path, data in self._chunks(column, rows[column.name])})
            for path, data in self._chunks(step, rows["step"]):  # in this order, in an object store too
                put({path: data})
        self._rows += len(records)
        for name, known in rows.items():
            self._tails[name] = known[len(known) - self._rows % self._arrays[name].chunks[0] :].copy()

    @hookimpl
    def on_rewind(self, step: int) -> None:
        assert self.path is not None
        with retried(self.path):
            if self._is_ours():  # else the next rows begin a store of their own
                self._rewind(step)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        assert self.path is not None
        with retried(self.path):
            if self._is_ours():
                self._declare(self._rows)

    def _begin(self, continues: str | None) -> None:
        """A new store under the next free name, which another attempt goes on with."""
        assert self._run is not None
        wanted = self._place(self._run.logdir)
        link = {} if continues is None else {"continues": continues}
        files = new_store.empty_store(self._run, {"writer": self._writer} | link)
        path = self._claimed = self._claimed or _claimed(wanted)
        put({path / key: data for key, data in files.items() if key != "zarr.json"})
        put({path / "zarr.json": files["zarr.json"]})
        self._open(path, rows=0)
        self._claimed = None
        self._rewind_pending, self._declared = False, new_store.DECLARED_ROWS

    def _continue(self, path: AnyPath) -> None:
        """A store that is there; who else writes it will notice."""
        rows = written_rows(path)
        self.path, self._rewind_pending = path, True
        self._amend(writer=self._writer)
        self._declare(max(new_store.DECLARED_ROWS, rows))
        self._open(path, rows)

    def _open(self, path: AnyPath, rows: int) -> None:
        self._arrays = arrays(path, mode="r+")
        self._tails: dict[str, np.ndarray] = {}  # rows of the unfinished chunks
        self._rewinding: dict[str, int] | None = None  # what is being replaced
        self.path, self._rows = path, rows

    def _is_ours(self) -> bool:
        """Whether no other run has continued the store."""
        assert self.path is not None
        return self._writer.encode() in (self.path / "zarr.json").read_bytes()

    def _amend(self, **further: str) -> dict[str, str]:
        """Set attributes of the store, and return all."""
        assert self.path is not None
        told = json.loads((self.path / "zarr.json").read_bytes())
        if told["attributes"] != (told["attributes"] | further):
            told["attributes"] |= further
            put({self.path / "zarr.json": json.dumps(told, indent=2).encode()})
        return told["attributes"]

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
        """Gives every array this length; it counts once the `zarr.json` of the group tells it.

        zarr's own resize looks in the store for every chunk that the longer array could have had, which
        takes seconds; the length is one number in the array's metadata.
        """
        assert self.path is not None
        told = json.loads((self.path / "zarr.json").read_bytes())
        known = told["consolidated_metadata"]["metadata"]
        for column in self._columns:
            known[column.name]["shape"][0] = rows
        put(
            {
                self.path / column.name / "zarr.json": json.dumps(known[column.name], indent=2).encode()
                for column in self._columns
            }
        )
        put({self.path / "zarr.json": json.dumps(told, indent=2).encode()})
        self._declared = rows

    def _rewind(self, first: int) -> None:
        """Unwrites the rows from step `first` on, last chunk first: what is left is always a prefix."""
        array = self._arrays["step"]
        steps = np.asarray(array[: self._rows])
        kept = np.flatnonzero((steps >= 0) & (steps < first))  # an attempt before may have unwritten some
        keep, chunk = int(kept[-1]) + 1 if len(kept) else 0, array.chunks[0]
        if keep == self._rows:
            return
        before = json.loads(self._amend().get("replaced", "[]"))
        now = {"from_step": first, "rows": self._rows - keep}
        again, self._rewinding = self._rewinding, now  # an attempt may have failed after it had said so
        if again != now or not before or now != {key: before[-1][key] for key in now}:
            self._amend(replaced=json.dumps([*before, now | {"time": time.time()}]))
            logger.warning(
                "%s: %d rows from step %d on are replaced, since an older checkpoint was restored.",
                self.path, self._rows - keep, first,
            )  # fmt: skip
        for start in reversed(range(keep // chunk * chunk, self._rows, chunk)):
            array[max(start, keep) : min(start + chunk, self._rows)] = -1
        self._rows, self._tails, self._rewinding = keep, {}, None


def _claimed(wanted: AnyPath) -> AnyPath:
    """The next free name, which no other process gets."""
    for number in itertools.count(max(numbered(wanted), default=0) + 1):
        path = wanted if number == 1 else wanted.with_name(f"{wanted.stem}-{number}{wanted.suffix}")
        try:
            claim(path / "step" / "zarr.json")
        except FileExistsError:  # another process was faster
            continue
        return path
    raise AssertionError("unreachable")
