"""TensorBoard event files: scalars, and tensors of rank 0 or 1, of one file or of all below a directory.

A file is a sequence of records: length (8 bytes), its checksum (4), an `Event` message, its checksum (4);
checksums are masked CRC-32C. The messages are those that tensorboardX writes. A tag in a subdirectory is
prefixed with it, as TensorBoard names the run: `train/loss`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from ..errors import LogError
from ..paths import AnyPath
from .cells import Cells, Column, Note, Table
from .log import LARGEST_STEP

SETTLE_EVENTS = 50_000
MAX_RECORD = 2**28  # bytes; a picture has some millions
MAX_REPEATED = 2**12  # numbers of a tensor that is written as one
TENSOR_TYPES = {1: "<f4", 2: "<f8", 3: "<i4", 9: "<i8"}  # of tensorflow/core/framework/types.proto
TENSOR_FIELDS = {1: "float_val", 2: "double_val", 3: "int_val", 9: "int64_val"}


def read_events(path: AnyPath, note: Note) -> Table:
    """Reads a file or a directory; of values with the same tag and step the later file's last one counts.

    Raises:
        LogError: there is no event file, or a record is damaged.
    """
    files = sorted(path.rglob("*tfevents*")) if path.is_dir() else [path]
    if not files:
        raise LogError(
            "the directory holds no event files (*tfevents*). Name that of a run, or the log itself."
        )
    cells = Cells(lambda step: f"step {step:,}")
    for file in files:
        prefix = "" if file == path else "/".join(file.parent.parts[len(path.parts) :])
        try:
            _read(file, f"{prefix}/" if prefix else "", cells, note)
        except LogError as error:
            raise LogError(f"{file.name}: {error}" if path.is_dir() else str(error)) from None
    found = cells.columns(note)
    steps = np.unique(np.concatenate([np.zeros(0, np.int64), *(column.rows for column in found.values())]))
    columns = {
        name: Column(np.searchsorted(steps, column.rows), column.values) for name, column in found.items()
    }
    return Table(columns, len(steps), steps)


def _read(file: AnyPath, prefix: str, cells: Cells, note: Note) -> None:
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    with file.open("rb") as stream:
        for number, record in enumerate(_records(stream, file.name, note), start=1):
            try:
                event = Event.FromString(record)
            except DecodeError:
                raise LogError(f"record {number:,} is no TensorBoard event. Name the --log-format.") from None
            if not 0 <= event.step <= LARGEST_STEP:
                raise LogError(f"record {number:,} is of step {event.step:,}; steps run from 0 on.")
            for value in event.summary.value:
                match value.WhichOneof("value"):
                    case "simple_value":
                        cells.add(prefix + value.tag, event.step, value.simple_value)
                    case "tensor":
                        cells.add(prefix + value.tag, event.step, _tensor(value.tensor))
            if number % SETTLE_EVENTS == 0:
                cells.settle()


def _records(stream: BinaryIO, name: str, note: Note) -> Iterator[bytes]:
    """The records of a file; a last one that is cut off, as in a run that goes on, is left out."""
    from crc32c import crc32c

    def damaged(data: bytes, checksum: int) -> bool:
        crc = crc32c(data)
        return checksum != ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

    begin = 0
    while head := stream.read(12):
        length, checksum = struct.unpack("<QI", head) if len(head) == 12 else (0, 0)
        if len(head) == 12 and damaged(head[:8], checksum):
            raise LogError(
                f"the record at byte {begin:,} is damaged, or the file is none of TensorBoard's. "
                "Copy it again, take it away, or name the --log-format."
            )
        if length > MAX_RECORD:
            raise LogError(
                f"the record at byte {begin:,} is to have {length:,} bytes, more than {MAX_RECORD:,}: "
                "the file is damaged. Copy it again, or take it away."
            )
        body = stream.read(length + 4)
        if len(head) < 12 or len(body) < length + 4:
            note(f"{name}: the last record is cut off and left out")
            return
        if damaged(body[:-4], struct.unpack("<I", body[-4:])[0]):
            raise LogError(f"the record at byte {begin:,} is damaged. Copy the file again, or take it away.")
        yield body[:-4]
        begin += 16 + length


def _tensor(tensor: Any) -> np.ndarray | None:
    """The numbers of a tensor of rank 0 or 1, or None if it is another (an image, text, ..)."""
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    if tensor.dtype not in TENSOR_TYPES or len(shape) > 1 or min(shape, default=0) < 0:
        return None
    if tensor.tensor_content:
        raw = tensor.tensor_content
        if len(raw) % np.dtype(TENSOR_TYPES[tensor.dtype]).itemsize:
            return None
        values = np.frombuffer(raw, TENSOR_TYPES[tensor.dtype])
    else:
        values = np.array(getattr(tensor, TENSOR_FIELDS[tensor.dtype]))
    if len(values) == 1 and shape:  # a repeated value is written once
        values = np.broadcast_to(values, shape) if shape[0] <= MAX_REPEATED else values
    return values.reshape(shape) if values.size == np.prod(shape) else None
