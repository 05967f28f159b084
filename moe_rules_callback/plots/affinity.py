"""How much of each domain, or sample, goes to which expert: a heatmap from a table in a file.

    figure = plot_affinity(read_affinity("router_affinity_matrix.csv"))

A history holds no domains, so the table comes from whoever knows them. A row is a domain or a sample, a
column an expert; the first line may name the experts, and the first column the rows.
"""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..errors import MetricsError
from ..paths import AnyPath, as_path
from .style import DEPTHS, label, new_figure, style
from .thinning import thin

WRITTEN = 16  # rows and columns of a table whose values are written into it
NAMED_ROWS = 40


@dataclass(frozen=True)
class Affinity:
    """A table of n rows and E experts.

    Attributes:
        values: float64 [n, E]; NaN is drawn grey.
        rows: names of the rows, or None if they have none.
        experts: names of the experts, or None.
    """

    values: np.ndarray
    rows: list[str] | None = None
    experts: list[str] | None = None


def read_affinity(path: str | AnyPath) -> Affinity:
    """The table in a CSV file, separated by commas, semicolons or tabs.

    Raises:
        MetricsError: it is no text, there are no numbers, rows differ in length, or a cell is not a number.
    """
    try:
        text = as_path(path).read_text("utf-8-sig")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        lines = [(n, [cell.strip() for cell in line]) for n, line in _lines(text, separator) if any(line)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise MetricsError(f"{path} is no table in UTF-8: {error}.") from None
    first = lines[0][1] if lines else []
    header = first if _is_header(first, [cells for _, cells in lines[1:]]) else None
    body = lines[1:] if header else lines
    named = (header is not None and header[0] == "") or not any(_is_number(cells[0]) for _, cells in body)
    if not body or len(body[0][1]) == named:
        raise MetricsError(
            f"{path} holds no rows of numbers. A row is a domain or a sample, a column an expert."
        )
    width = len(body[0][1])
    for line, cells in body:
        if len(cells) != width:
            raise MetricsError(
                f"{path}, line {line}: {len(cells)} cells, but line {body[0][0]} has {width}. Every row "
                "needs one number for each expert."
            )
        for column, cell in enumerate(cells[named:], start=1 + named):
            if not _is_number(cell):
                told = f"{cell!r} is not a number" if cell else "the cell is empty"
                raise MetricsError(
                    f"{path}, line {line}, column {column}: {told}. Write nan where there is none."
                )
    values = np.array([[float(cell) for cell in cells[named:]] for _, cells in body])
    if not np.isfinite(values).any():
        raise MetricsError(
            f"{path} holds no finite number in {len(values)} rows of {values.shape[1]} columns."
        )
    if header and len(header) - (header[0] == "") not in (width, width - named):
        raise MetricsError(
            f"{path}: the first line names {len(header)} columns, but the rows below have {width}. Name "
            "each once."
        )
    experts = header[-values.shape[1] :] if header else None
    return Affinity(values, [cells[0] for _, cells in body] if named else None, experts)


def plot_affinity(affinity: Affinity) -> Figure:
    """Draws the table as a heatmap; a small one with its numbers, of a long one the mean of neighbours."""
    rows, experts = affinity.values.shape
    parts = thin(np.arange(rows), affinity.values)
    values = parts.mean if parts.rows > 1 else affinity.values
    finite = values[np.isfinite(values)]
    low, high = min(0.0, float(finite.min())), float(finite.max())
    figure = new_figure(float(np.clip(3.5 + 0.6 * experts, 6, 12)), 1.3 + float(np.clip(0.32 * rows, 1.6, 8)))
    axes = figure.subplots()
    image = axes.imshow(
        values, cmap=DEPTHS, vmin=low, vmax=high if high > low else low + 1,
        aspect="auto", interpolation="nearest", extent=(-0.5, experts - 0.5, rows - 0.5, -0.5),
    )  # fmt: skip
    thinned = f"; a line: mean of up to {parts.rows:,} rows" if parts.rows > 1 else ""
    style(axes, "Router affinity", f"{rows:,} x {experts}{thinned}")
    axes.grid(visible=False)
    axes.set_facecolor("#e5e5e5")
    axes.spines[:].set_visible(False)
    axes.set_xlabel("Expert")
    if affinity.experts and experts <= 2 * WRITTEN:
        turned = max(map(len, affinity.experts)) > 5
        names = [label(name, 16) for name in affinity.experts]
        axes.set_xticks(
            range(experts), names, rotation=45 if turned else 0, ha="right" if turned else "center"
        )
    if affinity.rows:
        every = math.ceil(rows / NAMED_ROWS)
        axes.set_yticks(range(0, rows, every), [label(name) for name in affinity.rows[::every]])
    else:
        axes.set_ylabel("Row")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if rows <= WRITTEN and experts <= WRITTEN:
        for (row, expert), value in np.ndenumerate(values):
            if np.isfinite(value):
                told = f"{value:.2f}" if high <= 1 else f"{value:.3g}"
                ink = "white" if value - low < 0.55 * (high - low) else "black"
                axes.text(expert, row, told, ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=axes, pad=0.02).ax.tick_params(labelsize=8)
    return figure


def _lines(text: str, separator: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(text.splitlines(), delimiter=separator)
    return [(reader.line_num, cells) for cells in reader]


def _is_header(first: list[str], others: list[list[str]]) -> bool:
    """Whether a line names columns: by words, by an empty corner, or by counting three or more."""
    if not first or not others:
        return False
    counted = any(
        len(names) > 2 and names == [str(i) for i in range(start, start + len(names))]
        for names in (first, first[1:])
        for start in (0, 1)
    )
    return first[0] == "" or counted or not any(map(_is_number, first[1:] or first))


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
