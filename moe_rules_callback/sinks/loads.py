"""Pictures of the experts' loads, as PNG from NumPy and zlib alone.

    loads = Loads(schema)
    loads.add(records)
    for tag, description, png in loads.pictures(): ...

    experts_by_layer             layers from top to bottom, experts from left to right; the last batch of rows
    experts_over_time/<layer>    experts from top to bottom, the run from left to right

The colour of a cell is its share over the fair one, 1 / E, on a logarithmic scale from a tenth (dark blue)
over fair (grey) to ten times (yellow). The colours are those of cividis (Nuñez, Anderton and Renslow 2018):
even in lightness, the same to the colour-blind. A cell without a load is transparent.
"""

from __future__ import annotations

import math
import struct
import zlib
from functools import cache

import numpy as np

from ..records import Records, Schema
from .scalars import ScalarTable

COLUMNS = 256  # over time; a power of two
RATIOS = (0.1, 10.0)
LEVELS = 33  # of colour, 15% apart, the middle one fair; more would store noise
SIZE = (96, 256)  # height and width in pixels, of pictures with fewer cells; TensorBoard enlarges them
COLOURS = "Share over the fair share: dark blue a tenth or less, grey fair, yellow ten times or more."
BY_LAYER = f"Layers from top to bottom, experts from left to right, over the latest rows. {COLOURS}"
OVER_TIME = f"Experts from top to bottom, the run so far from left to right. {COLOURS}"
CIVIDIS = (
    (0, 34, 78), (8, 51, 112), (53, 69, 108), (79, 87, 108), (102, 105, 112), (125, 124, 120),
    (148, 142, 119), (174, 163, 113), (200, 184, 102), (229, 207, 82), (254, 232, 56),
)  # fmt: skip


class Loads:
    """Mean shares over time in at most `COLUMNS` columns, however long the run.

    When all columns are full, neighbours are merged, and each stands for twice as many rows.

    Attributes:
        rows: taken in so far.
    """

    def __init__(self, schema: Schema) -> None:
        self._layers = ScalarTable(schema).layers
        self._sums = np.zeros((COLUMNS, len(schema.layers), schema.experts), np.float32)
        self._counts = np.zeros(self._sums.shape, np.int32)  # of shares that are not NaN
        self._last = np.full(self._sums.shape[1:], np.nan, np.float32)
        self._rows_per_column = 1
        self.rows = 0

    def add(self, records: Records) -> None:
        """Takes in a batch of at least one row."""
        share = records.expert_share
        while self.rows + len(share) > COLUMNS * self._rows_per_column:
            self._sums, self._counts = _in_pairs(self._sums), _in_pairs(self._counts)
            self._rows_per_column *= 2
        known = ~np.isnan(share)
        share = np.where(known, share, 0)
        stop = self.rows + len(share)
        for column in range(self.rows // self._rows_per_column, -(-stop // self._rows_per_column)):
            first, last = (max(0, n * self._rows_per_column - self.rows) for n in (column, column + 1))
            self._sums[column] += share[first:last].sum(axis=0)
            self._counts[column] += known[first:last].sum(axis=0)
        self._last = _mean(share.sum(axis=0), known.sum(axis=0))
        self.rows = stop

    def pictures(self) -> list[tuple[str, str, bytes]]:
        """Tag, description in Markdown, and PNG of each picture; none where no router is seen."""
        if not self._last.size:
            return []
        columns = -(-self.rows // self._rows_per_column)
        mean = _mean(self._sums[:columns], self._counts[:columns])
        pictures = []
        if len(self._layers) > 1:
            pictures.append(("experts_by_layer", BY_LAYER, _picture(_ratio(self._last))))
        for layer, share in zip(self._layers, np.moveaxis(mean, 1, 0), strict=True):
            ratio = _ratio(share)[:, ~np.isnan(share).all(axis=0)]  # less the experts that it does not have
            pictures.append((f"experts_over_time/{layer}", OVER_TIME, _picture(ratio.T)))
        return pictures


def png(pixels: np.ndarray, palette: np.ndarray) -> bytes:
    """A PNG file.

    Args:
        pixels: uint8 [height, width], indices of colours.
        palette: uint8 [colours, 4], red, green, blue and opacity.
    """
    height, width = pixels.shape
    above = np.zeros_like(pixels)
    above[1:] = pixels[:-1]
    same = (pixels == above).all(axis=1)
    lines = np.empty((height, width + 1), np.uint8)
    lines[:, 0] = np.where(same, 2, 0)  # filter "up": a line like the one above it is all 0
    lines[:, 1:] = np.where(same[:, None], 0, pixels)
    packed = zlib.compressobj(strategy=zlib.Z_RLE)  # half the time of the default, and as small
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", palette[:, :3].tobytes()),
        (b"tRNS", palette[:, 3].tobytes()),
        (b"IDAT", packed.compress(lines.tobytes()) + packed.flush()),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def _in_pairs(columns: np.ndarray) -> np.ndarray:
    """Sums of neighbours, and as many empty columns."""
    merged = columns.reshape(COLUMNS // 2, 2, *columns.shape[1:]).sum(axis=1, dtype=columns.dtype)
    return np.concatenate([merged, np.zeros_like(merged)])


def _mean(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(total.shape, np.nan, np.float32), where=count > 0)


def _ratio(share: np.ndarray) -> np.ndarray:
    """Over the fair share; experts are the last dimension."""
    return share * (~np.isnan(share)).sum(axis=-1, keepdims=True, dtype=np.float32)


def _picture(ratio: np.ndarray) -> bytes:
    if not ratio.size:  # a layer that has had no load yet
        ratio = np.full((1, 1), np.nan)
    low, high = map(math.log, RATIOS)
    place = (np.log(np.clip(ratio, *RATIOS)) - low) * ((LEVELS - 1) / (high - low)) + 0.5
    cells = np.where(np.isnan(ratio), LEVELS, place).astype(np.uint8)
    height, width = (
        np.arange(max(n, least)) * n // max(n, least) for n, least in zip(cells.shape, SIZE, strict=True)
    )
    return png(cells[height][:, width], _palette())


@cache
def _palette() -> np.ndarray:
    """uint8 [LEVELS + 1, 4]; the last is transparent."""
    at = np.linspace(0, len(CIVIDIS) - 1, LEVELS)
    colours = [np.interp(at, np.arange(len(CIVIDIS)), channel) for channel in np.transpose(CIVIDIS)]
    opaque = np.stack([*colours, np.full(LEVELS, 255)], axis=1)
    return np.vstack([opaque, np.zeros(4)]).round().astype(np.uint8)
