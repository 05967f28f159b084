"""Logs made to take all time or memory, and values that stand where none should."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs import map_columns, read_log
from moe_rules_callback.logs.cells import MAX_COLUMNS, MAX_LINE

LONG = [
    "a" * 100_000,
    "1" * 100_000 + "x",
    "_" * 100_000 + "y",
    "a." * 50_000,
    "expert" * 20_000 + "1",
    "a/" * 50_000,
]


def refusal(path: Path, content: str | bytes, **options: Any) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LogError) as caught:
        read_log(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def record(data: bytes, says: int | None = None) -> bytes:
    """A record of an event file; `says` is the length that it claims."""

    def masked(part: bytes) -> bytes:
        crc = crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data) if says is None else says)
    return length + masked(length) + data + masked(data)


def tensor(step: int, shape: list[int], *values: float) -> bytes:
    dims = [{"size": size} for size in shape]
    told = {"dtype": 1, "tensor_shape": {"dim": dims}, "float_val": values}
    return record(
        Event(step=step, summary=Summary(value=[{"tag": "load", "tensor": told}])).SerializeToString()
    )


def test_names_of_a_hundred_thousand_characters_are_left_out(tmp_path: Path):
    """To look for an expert's number in them would take hours."""
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(dict.fromkeys(LONG, 1.0) | {"step": 3, "loss": 2.0}) + "\n")
    log = read_log(path)
    assert list(log.columns) == ["loss"]
    assert log.notes == ("6 columns are left out, their names of over 1,000 characters",)
    path.write_text(f"step,{LONG[1]},loss\n1,2,3\n")
    assert list(map_columns(read_log(path, format="csv")).metrics) == ["loss"]


def test_a_line_without_end(tmp_path: Path):
    for content in ('{"x": [' + "[], " * (MAX_LINE // 4), "[" * (MAX_LINE + 1)):
        told = refusal(tmp_path / "log.jsonl", '{"loss": 1}\n' + content, format="json")
        assert "line 2 has more than 16,777,216 bytes" in told
    assert "the first line has more than" in refusal(tmp_path / "log.csv", "a," * (MAX_LINE // 2 + 1))


@pytest.mark.parametrize("depth", [60, 900, 100_000])
@pytest.mark.parametrize(("opens", "closes"), [("[", "]"), ('{"a":', "}")])
def test_values_nested_deeply(opens: str, closes: str, depth: int, tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text(
        '{"loss": 1}\n{"loss": 2}\n{"loss": 3, "x": ' + opens * depth + "1" + closes * depth + "}\n"
    )
    log = read_log(path)
    assert log.columns["loss"].tolist()[:2] == [1, 2]
    assert len(log) == 3 or "line 3, the last, is cut off and left out" in log.notes


def test_a_table_of_a_hundred_thousand_columns(tmp_path: Path):
    wide = [f"c{i}" for i in range(100_000)]
    told = refusal(tmp_path / "log.csv", ",".join(wide) + "\n" + ",".join(["1"] * len(wide)) + "\n")
    assert f"the log has more than {MAX_COLUMNS:,} columns" in told


def test_an_integer_of_thousands_of_digits(tmp_path: Path):
    told = refusal(tmp_path / "log.jsonl", '{"loss": ' + "9" * 5_000 + '}\n{"loss": 1}\n')
    assert "line 1 is not a JSON object (Exceeds the limit (4300 digits)" in told


@pytest.mark.parametrize("says", [2**28 + 1, 2**31 - 1, 2**62])
def test_an_event_that_says_it_is_huge(says: int, tmp_path: Path):
    told = refusal(tmp_path / "x.tfevents", record(b"abc", says))
    assert f"the record at byte 0 is to have {says:,} bytes, more than 268,435,456" in told


def test_tensors_of_absurd_shapes_are_none(tmp_path: Path):
    """A value that is repeated is written once, so that thirty bytes may say what fills the memory."""
    shapes = [[-5], [2**62], [2**16], [0], [2, 2]]
    good = tensor(9, [3], 0.25) + tensor(10, [3], 0.25, 0.5, 1.0)
    content = good + b"".join(tensor(10 + i, shape, 1.0) for i, shape in enumerate(shapes, 1))
    (tmp_path / "x.tfevents").write_bytes(content)
    log = read_log(tmp_path / "x.tfevents")
    np.testing.assert_array_equal(log.columns["load"], [[0.25] * 3, [0.25, 0.5, 1.0]])


def test_a_tensor_of_rank_0_may_be_written_as_a_value(tmp_path: Path):
    (tmp_path / "x.tfevents").write_bytes(tensor(4, [], 0.5))
    assert read_log(tmp_path / "x.tfevents").columns["load"].tolist() == [0.5]


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08" + b"\x00" * 50, b"PK\x03\x04" + b"\x00" * 50])
def test_archives_are_not_unpacked(content: bytes, tmp_path: Path):
    for name in ("log.csv", "log.jsonl", "log.json"):
        refusal(tmp_path / name, content)
