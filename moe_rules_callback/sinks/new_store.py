"""An empty zarr store for the history of a run: all arrays declared far ahead.

The metadata of its arrays also stand in the `zarr.json` of the group ("consolidated"). Where they change
together, that file is replaced in one piece, so that readers see all arrays long or all short.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ..columns import Column, attributes, columns, coordinates
from ..records import Run
from ..stores import CODECS

DECLARED_ROWS = 2**20
STEP_CHUNK = 4096  # xarray reads all of `step` on opening: 256 files, not 16,000
CHUNK_BYTES = 2**18  # a flush rewrites the last chunk of every array; a reader wants few files


def empty_store(run: Run, further: dict[str, str]) -> dict[str, bytes]:
    """The files of a store without rows, by their paths in it; `zarr.json` makes it one.

    Args:
        run: what its rows will hold.
        further: attributes.
    """
    import zarr

    files: dict[str, Any] = {}
    group = zarr.create_group(files, attributes=attributes(run.schema, run.config) | further)
    known = coordinates(run.schema)
    for name, values in known.items():
        text = values.dtype.kind == "U"  # zarr v3 specifies "string", but no strings of a fixed length
        dtype = "string" if text else values.dtype
        array = group.create_array(
            name, shape=values.shape, chunks=(max(1, len(values)),), dtype=dtype, dimension_names=[name]
        )
        array[:] = values.astype(object) if text else values
    for column in columns(run.schema):
        shape = (DECLARED_ROWS, *(len(known[dim]) for dim in column.dims[1:]))
        group.create_array(
            column.name,
            shape=shape,
            chunks=_chunk_shape(column, shape, run.flush_every),
            serializer=CODECS[0],
            compressors=CODECS[1:],
            dtype=column.dtype,
            fill_value=column.fill,
            dimension_names=column.dims,
            attributes=dict(column.attrs),
        )
    written = {key: buffer.to_bytes() for key, buffer in files.items()}
    told = json.loads(written["zarr.json"])
    metadata = {name: json.loads(written[f"{name}/zarr.json"]) for name in sorted(dict(group.arrays()))}
    told["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": metadata}
    return written | {"zarr.json": json.dumps(told, indent=2).encode()}


def _chunk_shape(column: Column, shape: tuple[int, ...], flush_every: int) -> tuple[int, ...]:
    """A flush at least, and as many whole flushes as fit in CHUNK_BYTES, up to STEP_CHUNK rows."""
    inner = tuple(max(1, size) for size in shape[1:])
    row_bytes = np.dtype(column.dtype).itemsize * int(np.prod(inner))
    rows = min(STEP_CHUNK, CHUNK_BYTES // row_bytes)
    return max(flush_every, rows // flush_every * flush_every), *inner
