"""A zarr store read with care: metadata that makes no sense and chunks that are damaged are told by name.

A chunk says itself how many bytes it becomes, and a few bytes may say ten gigabytes. So chunks encoded by
zstd, as all of ours are, are decoded here, and only if they say what the shape of their array says.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from math import prod
from typing import Any

import numpy as np
from zarr.abc.store import Store
from zarr.storage import WrapperStore

from .damage import damaged
from .errors import HistoryError

MAX_METADATA = 2**26  # bytes of a zarr.json
MAX_ROW = 2**26  # values of one row; those of a thousand experts in a thousand layers are 2**20
MAX_CHUNK = 2**32  # bytes
MAX_TEXT = 2**26  # bytes of the names of rules or layers
CODECS = ("bytes", "vlen-utf8", "blosc", "crc32c", "transpose")  # besides zstd; they cannot outgrow MAX_CHUNK


class Guarded(WrapperStore[Store]):
    """A store to read from, whose zstd chunks come decoded.

    Raises:
        HistoryError: on reading what is damaged, or is far larger than a history can be.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        # Of each array that is decoded here the bytes of a chunk, None for text, and its items.
        self._chunks: dict[str, tuple[int | None, int]] = {}

    async def get(self, key: str, *arguments: Any, **options: Any) -> Any:
        value = await self._store.get(key, *arguments, **options)
        name = key.partition("/c/")[0]
        if value is not None and key.endswith("zarr.json"):
            told = self._metadata(key, value.to_bytes())
            return type(value).from_bytes(json.dumps(told).encode())
        if value is None or key == name or name not in self._chunks:
            return value
        return type(value).from_bytes(await asyncio.to_thread(self._decoded, key, value.to_bytes()))

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        async for name in self._store.list_dir(prefix):
            if not name.endswith(".partial"):  # a process was killed while it wrote it
                yield name

    def _metadata(self, key: str, data: bytes) -> dict[str, Any]:
        """The metadata of an array or a group, without the codec that is taken care of here."""
        try:
            told = json.loads(data) if len(data) <= MAX_METADATA else None
        except (ValueError, RecursionError):
            told = None
        if not isinstance(told, dict):
            raise damaged(self._store, f"{key} is no JSON object of at most {MAX_METADATA:,} bytes")
        if told.get("node_type") == "array":
            try:
                self._array(key.removesuffix("/zarr.json"), told)
            except (KeyError, TypeError, IndexError, AttributeError) as error:
                raise damaged(self._store, f"{key} lacks what describes an array ({error!r})") from None
        told.pop("consolidated_metadata", None)  # each array tells its own, which is looked at here
        return told

    def _array(self, name: str, told: dict[str, Any]) -> None:
        shape, chunk = told["shape"], told["chunk_grid"]["configuration"]["chunk_shape"]
        whole = all(type(n) is int and n >= 0 for n in shape) and all(type(n) is int and n > 0 for n in chunk)
        if not whole or len(shape) != len(chunk):
            raise damaged(self._store, f"{name} has shape {str(shape)[:80]} in chunks of {str(chunk)[:80]}")
        over_steps = "step" in (told.get("dimension_names") or ())
        if prod(shape[1:] if over_steps else shape) > MAX_ROW:
            raise damaged(self._store, f"{name} has shape {str(shape)[:80]}, more than a history can hold")
        try:
            expected = prod(chunk) * np.dtype(told["data_type"]).itemsize
        except TypeError:  # text
            expected = None
        if (expected or 0) > MAX_CHUNK:
            raise damaged(self._store, f"{name} has chunks of {expected:,} bytes")
        codecs = [codec["name"] for codec in told["codecs"]]
        if codecs[-1] == "zstd":
            self._chunks[name] = expected if codecs == ["bytes", "zstd"] else None, prod(chunk)
            told["codecs"], codecs = told["codecs"][:-1], codecs[:-1]
        if strange := set(codecs).difference(CODECS):
            raise HistoryError(
                f"{self._store}: the chunks of {name} are encoded by {', '.join(sorted(map(str, strange)))}, "
                "and this package writes zstd. Copy it: xarray.open_zarr(STORE).to_zarr(COPY), without its "
                "old encoding (drop_encoding)."
            )

    def _decoded(self, key: str, data: bytes) -> bytes:
        from numcodecs.zstd import Zstd

        expected, items = self._chunks[key.partition("/c/")[0]]
        size = _content_size(data)
        if size is None or size > (expected or MAX_TEXT) or (expected and size != expected):
            told = "says nothing of its size" if size is None else f"says that it holds {size:,} bytes"
            wanted = f", and its array says {expected:,}" if expected else ""
            raise damaged(self._store, f"the chunk {key} {told}{wanted}")
        try:
            content = Zstd().decode(data)
        except (RuntimeError, MemoryError) as error:
            raise damaged(self._store, f"the chunk {key} cannot be decoded ({error})") from None
        if expected is None and int.from_bytes(content[:4], "little") != items:  # text says how many it is
            raise damaged(self._store, f"the chunk {key} does not hold {items:,} texts")
        return content


def _content_size(frame: bytes) -> int | None:
    """How many bytes a zstd frame becomes, as it says itself (RFC 8878, section 3.1.1); None: it does not."""
    if frame[:4] != b"\x28\xb5\x2f\xfd" or len(frame) < 14:
        return None
    descriptor = frame[4]
    single = descriptor >> 5 & 1
    at = 6 - single + (0, 1, 2, 4)[descriptor & 3]
    width = (single, 2, 4, 8)[descriptor >> 6]
    size = int.from_bytes(frame[at : at + width], "little")
    return size + 256 * (width == 2) if width else None
