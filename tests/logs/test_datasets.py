"""zarr stores and netCDF files that are no history of this package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs import read_log


def dataset(step: str = "step") -> xr.Dataset:
    load = np.arange(12.0).reshape(3, 2, 2)
    return xr.Dataset(
        {
            "loss": (step, [3.0, 2.0, 1.0]),
            "expert_load": ((step, "layer", "expert"), load),
            "utilization": ((step, "expert"), load[:, 0]),
            "entropy": ((step, "layer"), load[:, :, 0]),
            "phase": (step, ["a", "b", "c"]),
            "seed": 1,
        },
        {step: [10, 20, 30], "layer": ["block_0", "block_1"]},
    )


def write(folder: Path, what: xr.Dataset) -> Path:
    what.to_zarr(folder / "log.zarr", zarr_format=2, consolidated=False)
    return folder / "log.zarr"


@pytest.mark.parametrize("step", ["step", "epoch", "global_step"])
def test_variables_over_a_step_become_columns(step: str, tmp_path: Path):
    log = read_log(write(tmp_path, dataset(step)))
    assert (log.format, log.step_column, log.steps.tolist()) == ("dataset", step, [10, 20, 30])
    assert {name: values.tolist() for name, values in log.columns.items()} == {
        "loss": [3, 2, 1],
        "expert_load.block_0": [[0, 1], [4, 5], [8, 9]],
        "expert_load.block_1": [[2, 3], [6, 7], [10, 11]],
        "utilization": [[0, 1], [4, 5], [8, 9]],
        "entropy.block_0": [0, 4, 8],
        "entropy.block_1": [2, 6, 10],
    }
    assert log.notes == ("'phase' holds no numbers and is left out",)


def test_a_dimension_without_coordinate_numbers_the_rows(tmp_path: Path):
    log = read_log(write(tmp_path, dataset().drop_vars("step")))
    assert (log.step_column, log.steps.tolist()) == ("", [0, 1, 2])


def test_netcdf(tmp_path: Path):
    path = tmp_path / "log.nc"
    dataset()[["loss", "utilization"]].to_netcdf(path, engine="scipy")
    log = read_log(path)
    assert log.steps.tolist() == [10, 20, 30]
    assert log.columns["utilization"].tolist() == [[0, 1], [4, 5], [8, 9]]


def test_no_dimension_like_a_step(tmp_path: Path):
    with pytest.raises(LogError, match=r"none of its dimensions is like a step: .*token.* Rename one"):
        read_log(write(tmp_path, xr.Dataset({"x": ("token", [1.0])})))


def test_what_xarray_cannot_open(tmp_path: Path):
    path = tmp_path / "log.nc"
    path.write_bytes(b"\x89HDF\r\n\x1a\n and no more")
    with pytest.raises(LogError, match=r"xarray cannot open it .*pip install h5netcdf") as caught:
        read_log(path)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(LogError, match=r"empty\.zarr: "):
        read_log(tmp_path / "empty.zarr")
