"""Event files, as TensorBoard reads them, over tensorboardX.

file = EventFile("runs/demo")
file.scalars(step, time.time(), ("loss", "accuracy"), [2.5, 0.4])
file.event(step, time.time(), summary=proto("summary").Summary(...))
"""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from ..paths import AnyPath, as_path, names_in

SUFFIX = ".moe_rules"


def proto(name: str) -> Any:
    """tensorboardX.proto.<name>_pb2, whose classes are made when it is first imported."""
    return import_module(f"tensorboardX.proto.{name}_pb2")


class EventFile:
    """A new event file in a directory, for any thread; `flush` brings what was written to the disk. Until it
    has succeeded all is kept, so that it can be called again.

    The file's name is unique: names of tensorboardX alone clash within a second. It comes after those that
    are there, even if the clock was set back: TensorBoard reads files by name, and follows the last.
    """

    def __init__(self, logdir: str | AnyPath) -> None:
        now, unique = time.time(), f"{os.getpid()}.{uuid.uuid4().hex[:8]}"
        self.directory = as_path(logdir)
        number = max([int(now), *(earlier + 1 for earlier in _times(self.directory))])
        name = f"events.out.tfevents.{number:010d}.{socket.gethostname()}.{unique}"
        from .record_writers import record_writer

        self._writer, self._lock = record_writer(self.directory / name, SUFFIX), threading.Lock()
        self.event(0, now, file_version="brain.Event:2")

    def event(self, step: int, wall_time: float, **content: Any) -> None:
        """Writes one `Event` proto; `content` is its `summary` or `session_log`."""
        self._write(_event(step=step, wall_time=wall_time, **content))

    def scalars(self, step: int, wall_time: float, tags: tuple[str, ...], values: Sequence[float]) -> None:
        """Writes scalars as one event: a fraction of the cost of an event each.

        Tags that were written before cost next to nothing: protobuf has encoded them, and a float is four
        bytes in the same place whatever its value. Messages one after the other are one message.
        """
        encoded, places = _encoded(tags)
        with np.errstate(over="ignore"):  # beyond float32 is inf, as protobuf has it
            floats = np.asarray(values).astype("<f4").view(np.uint8)
        summary = encoded.copy()
        summary[places] = floats
        self._write(_event(step=step, wall_time=wall_time) + summary.tobytes())

    def images(self, step: int, wall_time: float, images: Iterable[tuple[str, str, bytes]]) -> None:
        """Writes PNG files as one event: tag, description in Markdown, content."""
        protos, values = proto("summary"), []
        for tag, description, png in images:
            # as a tensor: of `Summary.Image` TensorBoard's server loses the description
            width, height = struct.unpack_from(">II", png, 16)
            content = [str(width).encode(), str(height).encode(), png]
            tensor = {"dtype": "DT_STRING", "tensor_shape": {"dim": [{"size": 3}]}, "string_val": content}
            metadata = {"plugin_data": {"plugin_name": "images"}, "summary_description": description}
            values.append(protos.Summary.Value(tag=tag, tensor=tensor, metadata=metadata))
        self.event(step, wall_time, summary=protos.Summary(value=values))

    def flush(self) -> None:
        """Until the disk has it (fsync)."""
        with self._lock:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        with self._lock:
            self._writer.flush()
            self._writer.close()

    def _write(self, event: bytes) -> None:
        with self._lock:
            self._writer.write(event)


def _times(directory: AnyPath) -> Iterator[int]:
    """Of the event files in a directory, by their names."""
    found = (re.search(r"tfevents\.(\d+)", name) for name in names_in(directory))
    return (int(match[1]) for match in found if match)


def _event(**content: Any) -> bytes:
    return proto("event").Event(**content).SerializeToString()


@lru_cache(maxsize=8)
def _encoded(tags: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """An event of these scalars without step and time, uint8 [bytes], and where the bytes of floats are."""
    Summary = proto("summary").Summary
    values = [Summary(value=[Summary.Value(tag=tag, simple_value=0)]).SerializeToString() for tag in tags]
    event = _event(summary=Summary.FromString(b"".join(values)))
    sizes = np.array([len(value) for value in values], int)
    ends = len(event) - sizes.sum() + sizes.cumsum()  # the float is the last field of a value
    return np.frombuffer(event, np.uint8), (ends[:, None] + np.arange(-4, 0)).ravel()
