"""TensorBoard event files, written by tensorboardX and by hand."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs import read_log


def write(folder: Path, scalars: dict[str, list[float]], first: int = 0) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for tag, values in scalars.items():
            for step, value in enumerate(values, start=first):
                writer.add_scalar(tag, value, step)
        writer.add_text("notes", "no number", 0)
        writer.add_histogram("weights", np.arange(9), 0)
    return next(folder.glob("*tfevents*"))


def test_a_file_and_its_directory_read_the_same(tmp_path: Path):
    file = write(
        tmp_path,
        {"train/loss": [3, 2, 1], "moe/load/expert_0": [0.5, 0.25], "moe/load/expert_1": [0.5, 0.75]},
    )
    for path in (file, tmp_path):
        log = read_log(path)
        assert (log.format, log.steps.tolist(), log.notes) == ("events", [0, 1, 2], ())
        assert log.columns["train/loss"].tolist() == [3, 2, 1]
        np.testing.assert_array_equal(
            log.columns["moe/load/expert"], [[0.5, 0.5], [0.25, 0.75], [np.nan, np.nan]]
        )


def test_tensorboards_own_reader_finds_the_same(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    values = np.random.default_rng(0).standard_normal(50).tolist()
    write(tmp_path, {"loss": values})
    theirs = event_accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    ours = read_log(tmp_path)
    assert ours.steps.tolist() == [each.step for each in theirs]
    assert ours.columns["loss"].tolist() == [each.value for each in theirs]


def test_subdirectories_are_part_of_the_name(tmp_path: Path):
    for name in ("train", "eval"):
        write(tmp_path / name, {"loss": [1.0, 2.0]})
    assert sorted(read_log(tmp_path).columns) == ["eval/loss", "train/loss"]


def test_a_run_that_was_continued_replaces_its_rows(tmp_path: Path):
    write(tmp_path, {"loss": [1, 2, 3]}).rename(tmp_path / "events.out.tfevents.1.host")
    folder = tmp_path / "later"
    write(folder, {"loss": [20, 30, 40]}, first=1).rename(tmp_path / "events.out.tfevents.2.host")
    folder.rmdir()
    log = read_log(tmp_path)
    assert log.steps.tolist() == [0, 1, 2, 3]
    assert log.columns["loss"].tolist() == [1, 20, 30, 40]


def record(event: Any) -> bytes:
    def checksum(data: bytes) -> bytes:
        crc = crc32c(data)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    body = event.SerializeToString()
    length = struct.pack("<Q", len(body))
    return length + checksum(length) + body + checksum(body)


def tensor_event(step: int, **fields: Any) -> Any:
    event = Event(step=step)
    event.summary.value.add(tag="load").tensor.SetInParent()
    tensor = event.summary.value[0].tensor
    for size in fields.pop("shape"):
        tensor.tensor_shape.dim.add(size=size)
    for name, value in fields.items():
        if name.endswith("_val"):
            getattr(tensor, name).extend(value)
        else:
            setattr(tensor, name, value)
    return event


def test_tensors_of_rank_0_and_1(tmp_path: Path):
    path = tmp_path / "events.out.tfevents.1"
    content = np.array([0.25, 0.75], "<f8").tobytes()
    events = [
        tensor_event(0, shape=[2], dtype=1, float_val=[0.5, 0.5]),
        tensor_event(1, shape=[2], dtype=2, tensor_content=content),
        tensor_event(2, shape=[2], dtype=3, int_val=[4]),  # one value stands for all
        tensor_event(3, shape=[2, 2], dtype=1, float_val=[1, 2, 3, 4]),  # a picture, say
        tensor_event(4, shape=[2], dtype=7, string_val=[b"a", b"b"]),
        tensor_event(5, shape=[3], dtype=1, float_val=[1, 2]),  # broken
        tensor_event(6, shape=[2], dtype=2, tensor_content=content[:-1]),
    ]
    path.write_bytes(b"".join(map(record, events)))
    log = read_log(path)
    assert log.steps.tolist() == [0, 1, 2]
    assert log.columns["load"].tolist() == [[0.5, 0.5], [0.25, 0.75], [4, 4]]


def test_a_file_that_is_being_written_ends_at_its_last_whole_record(tmp_path: Path):
    file = write(tmp_path, {"loss": [1, 2, 3]})
    events = [Event(step=step) for step in range(3)]
    for step, event in enumerate(events):
        event.summary.value.add(tag="loss", simple_value=step)
    whole = b"".join(map(record, events))
    for cut in (1, 5, 20):
        file.write_bytes(whole[:-cut])
        log = read_log(file)
        assert log.steps.tolist() == [0, 1]
        assert log.notes == (f"{file.name}: the last record is cut off and left out",)


def test_a_damaged_record_is_told(tmp_path: Path):
    file = write(tmp_path, {"loss": [1, 2, 3]})
    sound = file.read_bytes()
    at = sound.index(b"loss")
    file.write_bytes(sound[:at] + b"lost" + sound[at + 4 :])
    with pytest.raises(LogError, match=r"tfevents.*: the record at byte \d+ is damaged. Copy the file again"):
        read_log(tmp_path)
    file.write_bytes(b"no events at all, but some text")
    with pytest.raises(
        LogError, match="the record at byte 0 is damaged, or the file is none of TensorBoard's"
    ):
        read_log(file)


@pytest.mark.parametrize("step", [-1, 2**31])
def test_steps_out_of_range(step: int, tmp_path: Path):
    path = tmp_path / "events.out.tfevents.1"
    path.write_bytes(record(Event(step=step)))
    with pytest.raises(LogError, match="record 1 is of step"):
        read_log(path)


def test_a_directory_without_events(tmp_path: Path):
    with pytest.raises(LogError, match="the directory holds no event files"):
        read_log(tmp_path)
