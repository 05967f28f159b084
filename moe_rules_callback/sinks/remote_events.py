"""Event files in an object store, which cannot append: a flush writes the file anew."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from tensorboardX.record_writer import RecordWriter

from ..paths import put

if TYPE_CHECKING:
    from upath import UPath

PART_BYTES = 2**22  # a longer file goes on in the next, since each flush sends all of it


class RemoteRecordWriter(RecordWriter):
    """Records of an event file, in objects `<path>.000000<suffix>`, `<path>.000001<suffix>`, ..

    TensorBoard reads the event files of a directory one after the other, in the order of their names.

    Args:
        path: less its suffix.
        suffix: of the names.
    """

    def __init__(self, path: UPath, suffix: str) -> None:  # not that of the base, which opens a file here
        self._path, self._suffix, self._part = path, suffix, 0
        self._writer = io.BytesIO()

    def flush(self) -> None:
        """Until the store has what was written."""
        data = self._writer.getvalue()
        put({self._path.with_name(f"{self._path.name}.{self._part:06d}{self._suffix}"): data})
        if len(data) >= PART_BYTES:
            self._part, self._writer = self._part + 1, io.BytesIO()
