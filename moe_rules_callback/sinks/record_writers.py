"""Records of an event file, kept until a flush has brought them to their place: a flush that fails can be
repeated, and nothing is there twice or in part."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboardX.record_writer import RecordWriter

from ..paths import AnyPath, put

if TYPE_CHECKING:
    from upath import UPath

PART_BYTES = 2**22  # a longer object goes on in the next, since each flush sends all of it


def record_writer(path: AnyPath, suffix: str) -> LocalRecordWriter | RemoteRecordWriter:
    """A writer of a new file here, or of objects in a store.

    Args:
        path: less its suffix.
        suffix: of the name.
    """
    if isinstance(path, Path):
        return LocalRecordWriter(path.with_name(path.name + suffix))
    return RemoteRecordWriter(path, suffix)


class LocalRecordWriter(RecordWriter):
    """Records of a file. It is there from the start, and must not be there before."""

    def __init__(self, path: Path) -> None:  # not that of the base, which leaves out what has failed
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        self._path, self._writer, self._end = path, io.BytesIO(), 0

    def flush(self) -> None:
        """Until the disk has what was written (fsync)."""
        data = self._writer.getvalue()
        with self._path.open("r+b") as file:
            file.seek(self._end)  # also after a flush that came halfway
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self._end, self._writer = self._end + len(data), io.BytesIO()


class RemoteRecordWriter(RecordWriter):
    """Records in objects `<path>.000000<suffix>`, `<path>.000001<suffix>`, ..: a store cannot append, so that
    a flush writes the newest object anew.

    TensorBoard reads the event files of a directory one after the other, in the order of their names.
    """

    def __init__(self, path: UPath, suffix: str) -> None:  # not that of the base, which opens a file here
        self._path, self._suffix, self._part = path, suffix, 0
        self._writer: Any = io.BytesIO()

    def flush(self) -> None:
        """Until the store has what was written."""
        data = self._writer.getvalue()
        put({self._path.with_name(f"{self._path.name}.{self._part:06d}{self._suffix}"): data})
        if len(data) >= PART_BYTES:
            self._part, self._writer = self._part + 1, io.BytesIO()
