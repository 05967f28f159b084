"""Which experts get the work: over the run, layer by layer, and in all.

Up to 16 experts are lines; more are a heatmap of their share over the fair one, 1 / E. An expert is dead
when its mean share over the last 32 rows is below a tenth of the fair share, as in `dead_expert_fraction`,
and dominant when it is above three times that (with few experts: more than half way to all of it).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator

from ..errors import HistoryError
from .style import (
    ALARM,
    COLOURS,
    DEPTHS,
    INK,
    QUIET,
    draw_line,
    layer_labels,
    looks,
    new_figure,
    small_multiples,
    style,
)
from .thinning import BINS, Thinned, rows_of, smooth, thin

LINES = 16  # experts that are drawn as lines
PANELS = 9  # layers that are shown
HEATMAP_COLUMNS = 200
LAST_ROWS = 32
RATIOS = (0.1, 10.0)  # of a share over the fair one: from dead to ten times
PERCENT = FuncFormatter(lambda share, _: f"{100 * share:.4g} %")


@dataclass(frozen=True)
class Layers:
    """Shares of the layers that have any, Y of them with up to E experts.

    Attributes:
        names: what tells the layers apart.
        shares: of assignments, parts [n, Y, E]; NaN where a layer has fewer experts.
        last: mean over the last rows, [Y, E].
        fair: the fair share in each layer, [Y, 1].
    """

    names: list[str]
    shares: Thinned
    last: np.ndarray
    fair: np.ndarray

    @property
    def dead(self) -> np.ndarray:
        """bool [Y, E]."""
        return self.last < 0.1 * self.fair

    @property
    def dominant(self) -> np.ndarray:
        """bool [Y, E]."""
        return self.last > np.minimum(3 * self.fair, (1 + self.fair) / 2)

    def most_uneven(self, count: int) -> list[int]:
        """The layers whose loads at the end differ most, in the order of the model."""
        ratio = self.last / self.fair
        spread = np.where(np.isfinite(ratio), ratio, 1).std(axis=1)
        return sorted(np.argsort(-spread, kind="stable")[:count].tolist())


def plot_experts(history: xr.Dataset) -> Figure:
    """Draws the share of each expert over the step, a panel a layer.

    Of more than nine layers the most uneven are shown.

    Args:
        history: as `open_history` gives it.

    Raises:
        HistoryError: the history has no rows, or no shares of experts.
    """
    heatmap = history.sizes.get("expert", 0) > LINES
    layers = _layers(history, HEATMAP_COLUMNS if heatmap else BINS)
    chosen = layers.most_uneven(PANELS)
    figure, panels = small_multiples(len(chosen), 2.6 if len(chosen) > 3 else 3.4, sharex=True, sharey=True)
    draw, mesh = _draw_heatmap if heatmap else _draw_lines, None
    for axes, layer in zip(panels, chosen, strict=True):
        mesh = draw(axes, layers, layer)
        style(axes, layers.names[layer], _ailing(layers, layer), note_colour=ALARM, small=True)
        axes.grid(visible=not heatmap, axis="y")
    title = "Expert utilisation: share of assignments"
    if len(chosen) < len(layers.names):
        title += f", the {len(chosen)} most uneven of {len(layers.names)} layers"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
    figure.supylabel("Expert" if heatmap else "Share", fontsize=9)
    if mesh is not None:
        _add_scale(figure, mesh, panels)
    else:
        panels[0].set_ylim(bottom=0)  # of all, and after all have had their say
        figure.supxlabel(smooth(layers.shares.of(0, 0))[1], x=0.99, ha="right", fontsize=8, color=QUIET)
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, title="Expert", loc="outside right upper", frameon=False, fontsize=9)
    return figure


def plot_expert_totals(history: xr.Dataset) -> Figure:
    """Draws the share of each expert over the whole run: bars over all layers, below them layer by layer.

    Args:
        history: as `open_history` gives it.

    Raises:
        HistoryError: the history has no rows, or no shares of experts.
    """
    layers = _layers(history, HEATMAP_COLUMNS)
    share = layers.shares.overall  # [Y, E]
    several = len(share) > 1
    below = min(7.0, 1.0 + 0.25 * len(share)) if several else 0.0
    figure = new_figure(10, 3.4 + below)
    ratios: dict[str, Any] = {"height_ratios": (3, below)} if several else {}
    panels = figure.subplots(1 + several, 1, sharex=True, squeeze=False, **ratios).ravel()
    _draw_bars(panels[0], layers, share)
    if several:
        axes, every = panels[1], -(-len(share) // 24)
        mesh = _mesh(axes, np.arange(share.shape[1] + 1) - 0.5, share / layers.fair)
        style(axes, "Layer by layer", "mean over the run", small=True)
        axes.set_yticks(range(0, len(share), every), layers.names[::every], fontsize=8)
        axes.grid(visible=False)
        axes.margins(x=0)
        _add_scale(figure, mesh, [axes])
    panels[-1].set_xlabel("Expert")
    panels[-1].xaxis.set_major_locator(MaxNLocator(LINES, integer=True, min_n_ticks=1))
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _layers(history: xr.Dataset, bins: int) -> Layers:
    if not history.sizes.get("expert"):
        raise HistoryError(
            "The history holds no shares of experts: the steps passed neither what the router chose nor the "
            "loads of the experts."
        )
    history = rows_of(history)
    step, values = history["step"].values, history["expert_share"].transpose("step", "layer", "expert")
    shares, last = thin(step, values, bins), thin(step[-LAST_ROWS:], values[-LAST_ROWS:]).overall
    known = np.any(shares.count > 0, axis=0)  # [Y, E]
    some = np.any(known, axis=1)
    if not np.any(some):
        raise HistoryError("The history holds no shares of experts: they are NaN in every row.")
    return Layers(
        names=list(compress(layer_labels(history["layer"].values.tolist()), some)),
        shares=shares.of(some),
        last=last[some],
        fair=1 / known[some].sum(axis=1, keepdims=True),
    )


def _draw_lines(axes: Axes, layers: Layers, layer: int) -> None:
    for expert, (colour, dashes) in zip(range(layers.last.shape[1]), looks(), strict=False):
        draw_line(axes, layers.shares.of(layer, expert), colour, dashes, label=str(expert))
    fair = float(layers.fair[layer, 0])
    axes.axhline(fair, color=INK, linewidth=1, linestyle=":", label="fair share")
    axes.yaxis.set_major_formatter(PERCENT)
    for experts, marker in _marked(layers, layer):
        at = np.full(len(experts), layers.shares.at[-1])
        axes.plot(at, layers.last[layer, experts], marker, color=ALARM, markersize=7, clip_on=False, zorder=4)


def _draw_heatmap(axes: Axes, layers: Layers, layer: int) -> QuadMesh:
    edges, mean = layers.shares.edges, layers.shares.of(layer).mean
    mesh = _mesh(axes, edges, (mean / layers.fair[layer]).T)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    for experts, marker in _marked(layers, layer):
        at = np.full(len(experts), edges[-1] + 0.02 * np.ptp(edges))
        axes.plot(at, experts, marker, color=ALARM, markersize=4, clip_on=False)
    axes.set_xlim(edges[0], edges[-1])
    return mesh


def _marked(layers: Layers, layer: int) -> list[tuple[np.ndarray, str]]:
    """The dead and the dominant experts of a layer, with their markers; only where there are any."""
    both = ((np.flatnonzero(layers.dead[layer]), "x"), (np.flatnonzero(layers.dominant[layer]), "^"))
    return [(experts, marker) for experts, marker in both if len(experts)]


def _mesh(axes: Axes, columns: np.ndarray, ratio: np.ndarray) -> QuadMesh:
    """Shares over the fair one, [rows, columns], the first row on top; grey where there is none."""
    rows = np.arange(len(ratio) + 1) - 0.5
    mesh = axes.pcolormesh(
        columns, rows, np.clip(ratio, *RATIOS), norm=LogNorm(*RATIOS), cmap=DEPTHS, rasterized=True
    )
    axes.set_facecolor("#e5e5e5")
    axes.set_ylim(rows[-1], rows[0])
    return mesh


def _draw_bars(axes: Axes, layers: Layers, share: np.ndarray) -> None:
    """Mean over the layers of each expert's share [Y, E]."""
    several, experts = len(share) > 1, np.arange(share.shape[1])
    depth = np.arange(len(share))
    axes.bar(experts, thin(depth, share).overall, width=0.8, color=COLOURS[4], label="mean over the run")
    size = 5 if len(experts) <= 64 else 2
    last = thin(depth, layers.last).overall
    axes.plot(experts, last, "D", color=INK, markersize=size, label=f"last {LAST_ROWS} rows")
    axes.axhline(1 / len(experts), color=INK, linewidth=1, linestyle=":", label="fair share")
    note, colour = (f"mean over {len(share)} layers", QUIET) if several else (_ailing(layers, 0), ALARM)
    style(axes, "Expert utilisation over the whole run", note, note_colour=colour)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(PERCENT)


def _ailing(layers: Layers, layer: int) -> str:
    """Which experts are dead or dominant, or how many."""
    words = []
    for kind, experts in (("dead", layers.dead[layer]), ("dominant", layers.dominant[layer])):
        which = np.flatnonzero(experts).tolist()
        if which:
            many = f"{len(which)} experts" if len(which) > 3 else f"expert {', '.join(map(str, which))}"
            words.append(f"{kind}: {many}")
    return "; ".join(words)


def _add_scale(figure: Figure, mesh: QuadMesh, panels: list[Axes]) -> None:
    bar = figure.colorbar(mesh, ax=panels, pad=0.02, aspect=30, extend="both")
    bar.set_label("times the fair share", fontsize=9)
    bar.ax.yaxis.set_major_locator(FixedLocator([0.1, 0.3, 1, 3, 10]))
    bar.ax.yaxis.set_major_formatter(FixedFormatter(["dead", ".3", "fair", "3", "10"]))
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)
