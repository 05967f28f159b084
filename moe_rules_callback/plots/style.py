"""How every figure looks: colours, titles, axes, and how it is saved.

No pyplot, so that nothing global changes and no display is needed. The colours are those of Okabe and Ito
(2008), which the colour-blind tell apart; where colours mean something, they differ in lightness as well.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from ..paths import AnyPath, as_path, put
from .thinning import Thinned, smooth

# Without black and yellow, which stand out and fade, and without vermilion, which is the alarm
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
INK, ALARM, QUIET = "#2c3e50", "#d55e00", "#666666"  # what stands for all, what asks for a look, notes
DEPTHS = "cividis"  # of a quantity: even in lightness, the same to the colour-blind
DPI = 200
LONGEST_LABEL = 32


class Picture(Figure):
    """A figure that a notebook shows, also where pyplot, which would see to it, was never imported."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches that makes room for its labels."""
    return Picture(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))


def looks() -> Iterator[tuple[str, Any]]:
    """Colours with dashes: 20 that differ, over and over, neighbours in both."""
    return zip(itertools.cycle(COLOURS), itertools.cycle(DASHES), strict=False)


def label(name: str, longest: int = LONGEST_LABEL) -> str:
    """A name as text of a figure; of a long one both ends, for names often share a beginning."""
    if len(name) > longest:
        tail = longest // 3
        name = name[: longest - tail - 1] + "\N{HORIZONTAL ELLIPSIS}" + name[-tail:]
    return name.replace("$", r"\$")


def layer_labels(layers: Sequence[str]) -> list[str]:
    """What tells layers apart: decoder/block_0/moe and decoder/block_1/moe become block_0 and block_1."""
    paths = [layer.split("/") for layer in layers]
    if len(layers) > 1 and len({len(path) for path in paths}) == 1:
        differ = [len(set(parts)) > 1 for parts in zip(*paths, strict=True)]
        paths = [[part for part, kept in zip(path, differ, strict=True) if kept] for path in paths]
    return [label("/".join(path), 22) for path in paths]


def style(axes: Axes, title: str, note: str = "", *, note_colour: str = QUIET, small: bool = False) -> None:
    """Title on the left, note on the right, light horizontal lines, whole steps below."""
    axes.set_title(title, loc="left", fontsize=9 if small else 11, fontweight="bold")
    if note:
        axes.set_title(note, loc="right", fontsize=8 if small else 9, color=note_colour)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.tick_params(labelsize=8 if small else 9)
    axes.xaxis.set_major_locator(MaxNLocator(5 if small else "auto", integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def draw_line(
    axes: Axes, values: Thinned, colour: Any, dashes: Any = "-", *, width: float = 1.4, **line: Any
) -> str:
    """A smooth line over a pale band of what is under it, and how it was smoothed."""
    mean, note = smooth(values)
    axes.fill_between(values.at, values.low, values.high, color=colour, alpha=0.18, linewidth=0.5)
    axes.plot(values.at, mean, color=colour, linestyle=dashes, linewidth=width, **line)
    return note


def small_multiples(count: int, height: float, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of this height in inches, in rows of up to three."""
    columns = count if count <= 3 else math.ceil(math.sqrt(count)) if count <= 9 else 3
    lines = math.ceil(count / columns)
    figure = new_figure(max(7.0, 4.2 * columns), 0.9 + height * lines)
    places = figure.subplots(lines, columns, squeeze=False, **shared).ravel().tolist()
    for unused in places[count:]:
        unused.remove()
    for axes in places[max(0, count - columns) : count]:  # the lowest of each column
        axes.set_xlabel("Step", fontsize=9)
        axes.tick_params(labelbottom=True)
    return figure, places[:count]


def save(figure: Figure, path: str | AnyPath) -> None:
    """Writes the figure in the format of the suffix; its folder is made if need be."""
    path = as_path(path)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DPI, format=path.suffix[1:] or None)
    put({path: picture.getvalue()})
