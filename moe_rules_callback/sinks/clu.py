"""Both ways between this package and CLU, the Common Loop Utils; `clu` itself is never imported.

    writer = clu.metric_writers.create_default_writer("runs/demo")
    RuleAuditCallback(rules, sinks=[CluSink(writer)])         # rules in the writer you have

The other way round, a writer for CLU that needs no TensorFlow:

    writer = TensorBoardXWriter("runs/demo")
    writer.write_scalars(step, {"loss": loss})
    clu.metric_writers.AsyncMultiWriter([writer, ...])
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import wave
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import TryAgain
from ..hookspecs import hookimpl
from ..paths import AnyPath
from ..records import Records, Run
from .events import EventFile, proto
from .hparams import session_start
from .scalars import ScalarTable, Thin, describe_rules

logger = logging.getLogger("moe_rules_callback")


class CluSink:
    """Hands rows to a CLU metric writer, under the tags of `scalars`, and the rules as text.

    The writer stays its owner's: it is flushed at the end of the run, not closed. It is called on
    the audit's thread, which CLU's own writers and `TensorBoardXWriter` allow.

    Args:
        writer: has `write_scalars(step, {tag: float})`; `write_texts` and `flush` are used if there.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self._table, self._thin = ScalarTable(run.schema), Thin()
        self._taken: Records | None = None
        self._left: deque[int] = deque()  # rows of it that are not written
        if hasattr(self._writer, "write_texts"):
            with contextlib.suppress(NotImplementedError):  # the interface leaves texts to the writer
                self._writer.write_texts(0, {"rules": describe_rules(run.schema)})

    @hookimpl
    def on_records(self, records: Records) -> None:
        if records is not self._taken:  # else they come again, because the writer failed
            self._taken, self._left = records, deque(self._thin(records))
        values = self._table.values(records)
        try:
            while self._left:
                row = self._left[0]
                scalars = dict(zip(self._table.tags, values[row].tolist(), strict=True))
                self._writer.write_scalars(int(records.step[row]), scalars)
                self._left.popleft()
        except OSError as error:
            raise TryAgain(f"{type(error).__name__}: {error}") from error

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        if hasattr(self._writer, "flush"):
            self._writer.flush()


class TensorBoardXWriter:
    """CLU's MetricWriter over tensorboardX: works wherever CLU expects a writer, with or without
    TensorFlow, and on any thread.

    Images need Pillow. Videos are dropped, with one warning, as by CLU's own TensorFlow writer. A
    batch of N > 1 images or audios goes to the tags `<name>/0` .. `<name>/<N-1>`.

    Args:
        logdir: directory of the event file.
    """

    def __init__(self, logdir: str | AnyPath) -> None:
        self._file = EventFile(logdir)
        self._warned = False

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Numbers or arrays of one element."""
        numbers = [v if isinstance(v, float) else float(np.asarray(v).item()) for v in scalars.values()]
        self._file.scalars(int(step), time.time(), tuple(scalars), numbers)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """[N, H, W, C] or [H, W, C] with 1, 3 or 4 channels; floats in [0, 1], or uint8."""
        from tensorboardX import summary

        for tag, image in _each(images, dims=3):
            if image.dtype != np.uint8:
                image = np.clip(image.astype(np.float32), 0, 1)  # beyond, tensorboardX would wrap around
            self._write(step, summary.image(tag, image, dataformats="HWC"))

    def write_audios(self, step: int, audios: Mapping[str, Any], *, sample_rate: int) -> None:
        """[N, T, C], floats in [-1, 1]; stored as 16-bit WAV."""
        Summary = proto("summary").Summary
        for tag, audio in _each(audios, dims=2):
            clip = Summary.Audio(
                sample_rate=sample_rate,
                num_channels=audio.shape[1],
                length_frames=audio.shape[0],
                encoded_audio_string=_wav(audio, sample_rate),
                content_type="audio/wav",
            )
            self._write(step, Summary(value=[Summary.Value(tag=tag, audio=clip)]))

    def write_videos(self, step: int, videos: Mapping[str, Any]) -> None:
        """Not written: TensorBoard shows no videos."""
        if not self._warned:
            logger.warning("TensorBoardXWriter does not write videos (%s).", ", ".join(videos))
            self._warned = True

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Markdown."""
        from tensorboardX import summary

        for tag, text in texts.items():
            self._write(step, summary.text(tag, text))

    def write_histograms(
        self, step: int, arrays: Mapping[str, Any], num_buckets: Mapping[str, int] | None = None
    ) -> None:
        """Arrays of any shape, in 30 buckets unless told otherwise; non-finite values are left out."""
        from tensorboardX import summary

        for tag, array in arrays.items():
            values = np.asarray(array).astype(np.float64).ravel()
            values = values[np.isfinite(values)]
            if values.size == 0:
                continue
            counts, edges = np.histogram(values, bins=(num_buckets or {}).get(tag, 30))
            histogram = summary.histogram_raw(
                tag,
                min=values.min(),
                max=values.max(),
                num=values.size,
                sum=values.sum(),
                sum_squares=(values**2).sum(),
                bucket_limits=edges.tolist(),  # upper limits: the first edge ends an empty bucket
                bucket_counts=[0, *counts.tolist()],
            )
            self._write(step, histogram)

    def write_hparams(self, hparams: Mapping[str, Any]) -> None:
        """A flat mapping; what is no number, bool or string is kept as its `str`."""
        self._write(0, session_start(hparams, time.time()))

    def write_summaries(
        self, step: int, values: Mapping[str, Any], metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Tensors for TensorBoard plugins.

        Args:
            step: of the values.
            values: arrays by tag; text as arrays of str or bytes.
            metadata: `SummaryMetadata` by tag, as a proto of any TensorBoard package or its bytes.
        """
        protos = proto("summary")
        for tag, value in values.items():
            told = (metadata or {}).get(tag, b"")
            told = told if isinstance(told, bytes) else told.SerializeToString()
            known = protos.SummaryMetadata.FromString(told)
            entry = protos.Summary.Value(tag=tag, tensor=_tensor(value), metadata=known)
            self._write(step, protos.Summary(value=[entry]))

    def flush(self) -> None:
        """Until the disk has everything."""
        self._file.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        self._file.close()

    def _write(self, step: int, summary: Any) -> None:
        self._file.event(int(step), time.time(), summary=summary)


def _each(batches: Mapping[str, Any], dims: int) -> Iterator[tuple[str, np.ndarray]]:
    """Single items of `dims` dimensions out of items or batches of them."""
    for tag, batch in batches.items():
        items = np.asarray(batch)
        items = items[None] if items.ndim == dims else items
        for index, item in enumerate(items):
            yield (tag if len(items) == 1 else f"{tag}/{index}"), item


def _wav(audio: np.ndarray, sample_rate: int) -> bytes:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(audio.shape[1])
        file.setsampwidth(2)
        file.setframerate(sample_rate)
        file.writeframes((np.clip(audio, -1, 1) * 32767).astype("<i2").tobytes())
    return target.getvalue()


def _tensor(value: Any) -> Any:
    TensorProto, TensorShapeProto = proto("tensor").TensorProto, proto("tensor_shape").TensorShapeProto
    array = np.asarray(value)
    shape = TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in array.shape])
    if array.dtype.kind in "USO":
        text = [item if isinstance(item, bytes) else str(item).encode() for item in array.ravel().tolist()]
        return TensorProto(dtype="DT_STRING", tensor_shape=shape, string_val=text)
    names = {"float16": "DT_HALF", "float32": "DT_FLOAT", "float64": "DT_DOUBLE"}
    dtype = names.get(array.dtype.name, f"DT_{array.dtype.name.upper()}")
    return TensorProto(dtype=dtype, tensor_shape=shape, tensor_content=array.tobytes())
