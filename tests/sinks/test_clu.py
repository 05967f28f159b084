"""Against the real CLU, of which TensorFlow-free modules stay importable without TensorFlow."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import wave
from pathlib import Path
from typing import Any

import fake_records as fake
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback.sinks import CluSink, TensorBoardXWriter
from moe_rules_callback.sinks.scalars import ScalarTable

pytest.importorskip("clu")
pytest.importorskip("tensorboard")

# Without TensorFlow the package cannot be imported, but leaves the modules behind that it got to.
with contextlib.suppress(ImportError):
    import clu.metric_writers  # noqa: F401
from clu.metric_writers.async_writer import AsyncWriter
from clu.metric_writers.interface import MetricWriter
from clu.metric_writers.multi_writer import MultiWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

summary_pb2: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
plugin_data_pb2: Any = importlib.import_module("tensorboard.plugins.hparams.plugin_data_pb2")


def read(logdir: Path) -> EventAccumulator:
    return EventAccumulator(str(logdir), size_guidance={"scalars": 0, "tensors": 0}).Reload()


class Notebook:
    """A writer that only remembers, and knows scalars alone."""

    def __init__(self):
        self.rows = {}

    def write_scalars(self, step, scalars):
        assert step not in self.rows, "the interface forbids a second write of a step"
        self.rows[step] = scalars


def test_sink_hands_over_every_scalar():
    records, notebook = fake.make_records(40), Notebook()
    fake.feed(CluSink(notebook), records, fake.make_run())
    table = ScalarTable(records.schema)
    assert list(notebook.rows) == list(range(40))
    assert tuple(notebook.rows[7]) == table.tags
    assert list(notebook.rows[7].values()) == table.values(records)[7].tolist()
    assert all(type(value) is float for value in notebook.rows[7].values())


def test_sink_thins_as_tensorboard_does():
    records, notebook = fake.make_records(1_500, steps_per_second=1e6), Notebook()
    records.state[:] = 0
    fake.feed(CluSink(notebook), records, fake.make_run())
    assert list(notebook.rows) == list(range(1_000))


def test_sink_survives_a_writer_without_texts():
    class NoTexts(Notebook):
        def write_texts(self, step, texts):
            raise NotImplementedError

    notebook = NoTexts()
    fake.feed(CluSink(notebook), fake.make_records(3), fake.make_run())
    assert len(notebook.rows) == 3


def test_through_clus_own_writers_and_back(tmp_path):
    records = fake.make_records(30)
    sides: list[Any] = [TensorBoardXWriter(tmp_path / side) for side in ("left", "right")]
    writer = AsyncWriter(MultiWriter(sides))
    fake.feed(CluSink(writer), records, fake.make_run())
    for side in ("left", "right"):
        accumulator = read(tmp_path / side)
        for rule, bounds in zip(records.schema.rule_names, records.truth.transpose(1, 2, 0), strict=True):
            for bound, values in zip(("lower", "upper"), bounds, strict=True):
                events = accumulator.Scalars(f"rules/{rule}/{bound}")
                np.testing.assert_array_equal(np.array([event.value for event in events], np.float32), values)
        assert "rules/text_summary" in accumulator.Tags()["tensors"]
    writer.close()


# The writer.


def test_writer_has_all_of_clus_interface():
    abstract = MetricWriter.__abstractmethods__
    assert len(abstract) == 10
    for name in abstract:
        theirs = inspect.signature(getattr(MetricWriter, name)).parameters
        ours = inspect.signature(getattr(TensorBoardXWriter, name)).parameters
        assert list(ours) == list(theirs), name
        for parameter, twin in zip(ours.values(), theirs.values(), strict=True):
            assert (parameter.kind, parameter.default) == (twin.kind, twin.default), name


@pytest.fixture
def written(tmp_path):
    """Gives a function that writes through CLU's AsyncWriter and reads back."""

    def write(act):
        ours: Any = TensorBoardXWriter(tmp_path)
        writer = AsyncWriter(ours)
        act(writer)
        writer.close()
        return read(tmp_path)

    return write


def test_scalars_of_every_type(written):
    values = {
        "int": 3,
        "float": 0.5,
        "numpy": np.float32(0.25),
        "array": np.array([2.0]),
        "jax": jnp.bfloat16(1.5),
    }
    accumulator = written(lambda writer: writer.write_scalars(np.int64(4), values))
    back = {tag: accumulator.Scalars(tag)[0].value for tag in values}
    assert back == {"int": 3.0, "float": 0.5, "numpy": 0.25, "array": 2.0, "jax": 1.5}
    assert accumulator.Scalars("int")[0].step == 4


def test_images(written):
    from PIL import Image

    random = np.random.default_rng(0)
    colour = random.integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    grey = random.random((6, 3, 1), np.float32)
    grey[0, 0] = 1.01  # must not wrap around to black
    accumulator = written(lambda writer: writer.write_images(1, {"colour": colour, "grey": grey}))
    assert set(accumulator.Tags()["images"]) == {"colour/0", "colour/1", "grey"}

    def pixels(tag):
        return np.asarray(Image.open(io.BytesIO(accumulator.Images(tag)[0].encoded_image_string)))

    np.testing.assert_array_equal(pixels("colour/1"), colour[1])
    want = (np.minimum(grey[..., 0], 1) * 255).astype(np.uint8)
    np.testing.assert_array_equal(pixels("grey")[..., 0], want)


def test_audios(written):
    tone = np.sin(np.arange(800) / 5)[None, :, None] * [0.5, 1.5]  # [1, T, 2], too loud on the right
    accumulator = written(lambda writer: writer.write_audios(1, {"tone": tone}, sample_rate=8000))
    (event,) = accumulator.Audio("tone")
    assert (event.sample_rate, event.length_frames) == (8000, 800)
    with wave.open(io.BytesIO(event.encoded_audio_string)) as file:
        samples = np.frombuffer(file.readframes(800), "<i2").reshape(800, 2) / 32767
    np.testing.assert_allclose(samples, np.clip(tone[0], -1, 1), atol=1e-4)


def test_texts(written):
    accumulator = written(lambda writer: writer.write_texts(2, {"note": "**bold**, grün"}))
    (event,) = accumulator.Tensors("note/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "**bold**, grün"


def test_histograms(written):
    values = np.random.default_rng(0).normal(size=1_000).astype(np.float32)
    arrays = {
        "coarse": values.reshape(10, 100),
        "default": np.append(values, [np.nan, np.inf]),
        "empty": values[:0],
    }
    accumulator = written(lambda writer: writer.write_histograms(3, arrays, {"coarse": 4}))
    assert set(accumulator.Tags()["histograms"]) == {"coarse", "default"}
    for tag, bins in (("coarse", 4), ("default", 30)):
        histogram = accumulator.Histograms(tag)[0].histogram_value
        counts, edges = np.histogram(values.astype(float), bins)
        assert histogram.bucket == [0, *counts]
        np.testing.assert_allclose(histogram.bucket_limit, edges, rtol=1e-6)
        assert histogram.num == 1_000
        assert histogram.sum == pytest.approx(values.sum(dtype=float), rel=1e-6)


def test_hparams_do_not_cost_the_events_written_before(written):
    def act(writer):
        writer.write_scalars(0, {"before": 1.0})
        writer.write_hparams({"lr": np.float32(0.5), "layers": 4, "relu": True, "name": "x", "shape": (2, 3)})
        writer.write_scalars(1, {"after": 1.0})

    accumulator = written(act)
    assert {"before", "after"} <= set(accumulator.Tags()["scalars"])
    content = accumulator.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["lr"].number_value == 0.5
    assert hparams["layers"].number_value == 4
    assert hparams["relu"].bool_value is True
    assert hparams["name"].string_value == "x"
    assert hparams["shape"].string_value == "(2, 3)"


def test_summaries_are_tensors_with_the_metadata_of_a_plugin(written):
    metadata = summary_pb2.SummaryMetadata(summary_description="of mine")
    metadata.plugin_data.plugin_name = "my_plugin"
    values = {
        "f32": np.arange(6, dtype=np.float32).reshape(2, 3),
        "i32": jnp.arange(3),
        "f64": np.float64(0.1),
        "half": np.array([0.5], np.float16),
        "flag": np.array([True, False]),
        "text": np.array(["a", "ü"]),
    }
    told = {"f32": metadata, "text": metadata.SerializeToString()}
    accumulator = written(lambda writer: writer.write_summaries(5, values, told))
    for tag, value in values.items():
        (event,) = accumulator.Tensors(tag)
        back = tensor_util.make_ndarray(event.tensor_proto)
        if tag == "text":
            back = np.array([item.decode() for item in back])
        np.testing.assert_array_equal(back, value, err_msg=tag)
    for tag in told:
        assert accumulator.SummaryMetadata(tag).plugin_data.plugin_name == "my_plugin"
        assert accumulator.SummaryMetadata(tag).summary_description == "of mine"


def test_videos_are_dropped_with_one_warning(written, caplog):
    def act(writer):
        writer.write_videos(0, {"clip": np.zeros((1, 2, 2, 2, 3))})
        writer.write_videos(1, {"clip": np.zeros((1, 2, 2, 2, 3))})

    written(act)
    assert [record.getMessage() for record in caplog.records] == [
        "TensorBoardXWriter does not write videos (clip)."
    ]
