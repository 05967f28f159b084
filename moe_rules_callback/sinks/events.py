"""Event files, as TensorBoard reads them, over tensorboardX.

file = EventFile("runs/demo")
file.scalars(step, time.time(), [("loss", 2.5), ("accuracy", 0.4)])
file.event(step, time.time(), summary=proto("summary").Summary(...))
"""

from __future__ import annotations

import os
import struct
import uuid
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

SUFFIX = ".moe_rules"


def proto(name: str) -> Any:
    """tensorboardX.proto.<name>_pb2, whose classes are made when it is first imported."""
    return import_module(f"tensorboardX.proto.{name}_pb2")


class EventFile:
    """A new event file in a directory; events are in it as soon as a method returns.

    The file's name is unique: names of tensorboardX alone clash within a second.
    """

    def __init__(self, logdir: str | Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        Path(logdir).mkdir(parents=True, exist_ok=True)
        suffix = f".{os.getpid()}.{uuid.uuid4().hex[:8]}{SUFFIX}"
        self._writer = EventsWriter(str(Path(logdir) / "events"), suffix)

    def event(self, step: int, wall_time: float, **content: Any) -> None:
        """Writes one `Event` proto; `content` is its `summary` or `session_log`."""
        event = proto("event").Event(step=step, wall_time=wall_time, **content)
        self._writer.write_event(event)

    def scalars(self, step: int, wall_time: float, scalars: Iterable[tuple[str, float]]) -> None:
        """Writes scalars as one event: a fraction of the cost of an event each."""
        Summary = proto("summary").Summary
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars]
        self.event(step, wall_time, summary=Summary(value=values))

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
        self._writer.flush()

    def close(self) -> None:
        """Flushes and closes."""
        self._writer.close()
