"""Logs at a URL, on fsspec's file system in memory."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import fake_records as fake
import numpy as np
import pytest
import xarray as xr
from upath import UPath

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs import read_log
from moe_rules_callback.records import Run
from moe_rules_callback.runs import is_history
from moe_rules_callback.sinks import TensorBoardSink

LOSS = [3.0, 2.5, 2.25]


@pytest.fixture
def root() -> Iterator[UPath]:
    root = UPath(f"memory://{uuid.uuid4().hex}")
    (root / "log.jsonl").write_text("\n".join(json.dumps({"step": i, "loss": x}) for i, x in enumerate(LOSS)))
    (root / "log.csv").write_text("step,loss\n" + "".join(f"{i},{x}\n" for i, x in enumerate(LOSS)))
    xr.Dataset({"loss": ("step", LOSS)}).to_zarr(f"{root}/log.zarr", zarr_format=2, consolidated=False)
    yield root
    root.rmdir(recursive=True)


@pytest.mark.parametrize("name", ["log.jsonl", "log.csv", "log.zarr"])
def test_columns_come_back(name: str, root: UPath) -> None:
    assert not is_history(f"{root}/{name}")
    log = read_log(f"{root}/{name}")
    np.testing.assert_array_equal(log.columns["loss"], LOSS)
    assert str(log.path) == f"{root}/{name}"


def test_event_files_are_read_as_in_a_folder(root: UPath, tmp_path: Path) -> None:
    logs = []
    for logdir in (root / "events", tmp_path):
        for name in ("train", "eval/late"):
            fake.feed(TensorBoardSink(logdir / name), fake.make_records(20), Run(fake.make_schema()))
        logs.append(read_log(logdir))
    there, here = logs
    assert list(there.columns) == list(here.columns)
    assert "eval/late/signals/loss" in there.columns
    for name, values in here.columns.items():
        np.testing.assert_array_equal(there.columns[name], values)


def test_nothing_there(root: UPath) -> None:
    with pytest.raises(LogError, match=f"^{root}/no: there is no such file or directory"):
        read_log(f"{root}/no")
