"""zarr stores and netCDF files: every variable over a step-like dimension.

loss(step)                          a column `loss`
expert_load(step, expert)           a column `expert_load` of lists
expert_load(step, layer, expert)    a column for each layer: `expert_load.block_0`, ..
entropy(step, layer)                likewise: `entropy.block_0`, .. of single numbers
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import LogError
from ..paths import AnyPath, zarr_store
from .cells import MAX_CELLS, Column, Note, Table, too_large
from .log import STEP_NAMES

if TYPE_CHECKING:
    import xarray as xr

MAX_PARTS = 4096  # columns of one variable
# An index would read the steps, however many are declared.
LAZILY: Any = {"decode_times": False, "create_default_indexes": False}


def read_dataset(path: AnyPath, note: Note) -> Table:
    """Reads a store or file.

    Raises:
        LogError: xarray cannot open it, or no dimension is like a step.
    """
    with _open(path) as dataset:
        try:
            return _table(dataset, note)
        except LogError:
            raise
        except Exception as error:  # whatever the library under xarray raises over what it cannot read
            raise LogError(
                f"its values cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:200]}). "
                "Usual cause: it was copied in part. Copy it again."
            ) from None


def _table(dataset: xr.Dataset, note: Note) -> Table:
    dim = _step_dimension(dataset)
    rows = dataset.sizes[dim]
    columns: dict[str, Column] = {}
    cells = sum(each.size for each in dataset.variables.values() if dim in each.dims)
    if cells > MAX_CELLS:  # a store may declare what nobody ever wrote
        raise too_large(cells)
    for name, variable in dataset.variables.items():
        if dim not in variable.dims or name == dim:
            continue
        if not np.issubdtype(variable.dtype, np.number) and variable.dtype != bool:
            note(f"'{name}' holds no numbers and is left out")
            continue
        columns |= _columns(str(name), dataset, dim, note)
    steps = dataset.variables.get(dim)
    if steps is None:
        return Table(columns, rows)
    columns[dim] = Column(np.arange(rows), np.asarray(steps.values, np.float64))
    return Table(columns, rows)


def _open(path: AnyPath) -> xr.Dataset:
    import xarray as xr

    try:
        if path.is_dir():
            from ..guarded import Guarded

            store: Any = Guarded(zarr_store(path, read_only=True))
            return xr.open_dataset(store, engine="zarr", consolidated=False, **LAZILY)
        return xr.open_dataset(str(path), **LAZILY)
    except Exception as error:  # whatever the library under xarray raises over a file of somebody else
        told = " ".join(str(error).split())[:200]
        install = "pip install h5netcdf" if path.is_file() else "copy the whole directory"
        raise LogError(
            f"xarray cannot open it ({type(error).__name__}: {told}). Usual causes: the library for its "
            f"format is not installed ({install}), or it is damaged."
        ) from None


def _step_dimension(dataset: xr.Dataset) -> str:
    found = {str(name).lower(): str(name) for name in dataset.dims}
    for name in (*STEP_NAMES, "time"):
        if name in found:
            return found[name]
    dims = ", ".join(map(str, dataset.dims)) or "none"
    raise LogError(
        f"none of its dimensions is like a step: {dims}. Rename one: "
        "dataset.rename(time_index='step').to_netcdf('log.nc')"
    )


def _columns(name: str, dataset: xr.Dataset, dim: str, note: Note) -> dict[str, Column]:
    """The columns of a variable; its last dimension is that of a list if it speaks of experts."""
    array = dataset[name].transpose(dim, ...)
    lists = array.ndim > 1 and (
        array.ndim > 2 or "expert" in str(array.dims[-1]).lower() or not _layered(array)
    )
    parts = array.dims[1:-1] if lists else array.dims[1:]
    shape = tuple(array.sizes[part] for part in parts)
    if np.prod(shape) > MAX_PARTS:
        note(f"'{name}' has {int(np.prod(shape)):,} columns and is left out")
        return {}
    values = np.asarray(array.values, np.float64)
    rows = np.arange(len(values))
    found = {}
    for index in np.ndindex(shape):
        labels = (str(array[part].values[i]) for part, i in zip(parts, index, strict=True))
        found[".".join([name, *labels])] = Column(rows, values[(slice(None), *index)])
    return {key: column for key, column in found.items() if column.values.size}


def _layered(array: xr.DataArray) -> bool:
    return any(word in str(array.dims[-1]).lower() for word in ("layer", "block"))
