"""A zarr store of which xarray sees the rows that are written, and no others."""

from __future__ import annotations

from typing import Any

from zarr.abc.store import Store

from .guarded import Guarded


class Trimmed(Guarded):
    """A store whose arrays over `step` all hold `rows` rows.

    They are declared far ahead, and for a moment they differ in length, which xarray refuses: while a run
    grows or closes its store, or for good if it is killed right then.
    """

    def __init__(self, store: Store, rows: int) -> None:
        super().__init__(store)
        self._rows = rows

    def _metadata(self, key: str, data: bytes) -> dict[str, Any]:
        told = super()._metadata(key, data)
        if told.get("node_type") == "array" and "step" in (told.get("dimension_names") or ()):
            told["shape"][0] = self._rows
        return told
