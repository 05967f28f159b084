"""Signals over the run, layer by layer: a thin line each, and a thick one for the pooled value.

Up to six layers have colours of their own; of more, the colour tells the depth, and the lowest and the
highest at the end are named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure

from ..errors import HistoryError
from .style import DEPTHS, INK, draw_line, label, layer_labels, looks, new_figure, small_multiples, style
from .thinning import Thinned, rows_of, smooth, thin

NAMED = 6  # layers with a colour of their own
DEPTH_COLOURS = ListedColormap(matplotlib.colormaps[DEPTHS](np.linspace(0, 0.9, 256)))  # the rest is too pale
ACCURACY = ("routing_accuracy", "routing_acc")


def plot_entropy(history: xr.Dataset) -> Figure:
    """Draws the normalised routing entropy: 1 if tokens are spread evenly, 0 if one expert gets them all.

    Args:
        history: as `open_history` gives it.

    Raises:
        HistoryError: the history has no rows, or no `router_entropy`.
    """
    return _plot_one(
        history, ("router_entropy",), "Router entropy", "0: one expert for a token .. 1: undecided"
    )


def plot_accuracy(history: xr.Dataset) -> Figure:
    """Draws the routing accuracy: the share of tokens that go to the expert of their label.

    Args, Raises: as `plot_entropy`, for `routing_accuracy` or `routing_acc`.
    """
    return _plot_one(history, ACCURACY, "Routing accuracy", "Tokens sent to the expert of their label")


def plot_coactivation(history: xr.Dataset) -> Figure:
    """Draws how surely one expert brings another along, for the closest pair of each layer.

    Args, Raises: as `plot_entropy`, for `expert_coactivation`.
    """
    return _plot_one(
        history,
        ("expert_coactivation",),
        "Expert co-activation",
        "Closest pair of experts, 1: always together",
    )


def plot_layers(history: xr.Dataset) -> Figure:
    """Draws every signal that is known by layer, a panel a signal.

    Args:
        history: as `open_history` gives it.

    Raises:
        HistoryError: the history has no rows, or no signal by layer.
    """
    history = rows_of(history)
    told = json.loads(history.attrs["signals"])
    names = [name for name in history["signal"].values.tolist() if told[name]["per_layer"]]
    curves = [curve for curve in _curves(history, names) if np.isfinite(curve.pooled.mean).any()]
    if not curves:
        raise HistoryError("The history holds no signal by layer: its rules judge the model as a whole.")
    figure, panels = small_multiples(len(curves), 2.6, sharex=True)
    for axes, curve in zip(panels, curves, strict=True):
        _draw(axes, curve)
        units = told[curve.name]["units"]
        style(axes, label(curve.name), "" if units == "1" else units, small=True)
    _add_key(figure, panels, curves[0])
    return figure


@dataclass(frozen=True)
class Curves:
    """A signal over n parts of the run: pooled [n] and by layer [n, Y]; Y is 0 for the whole model's."""

    name: str
    pooled: Thinned
    by_layer: Thinned
    layers: list[str]


def _curves(history: xr.Dataset, names: list[str]) -> list[Curves]:
    told, step = json.loads(history.attrs["signals"]), history["step"].values
    layers = layer_labels(history["layer"].values.tolist())
    chosen = history.sel(signal=names)  # all at once: a store is read in rows
    pooled = thin(step, chosen["signal_pooled"].transpose("step", "signal"))
    values = thin(step, chosen["signal_value"].transpose("step", "signal", "layer"))
    curves = []
    for i, name in enumerate(names):
        several = len(layers) if told[name]["per_layer"] and len(layers) > 1 else 0
        curves.append(Curves(name, pooled.of(i), values.of(i, slice(several)), layers[:several]))
    return curves


def _plot_one(history: xr.Dataset, names: Sequence[str], title: str, meaning: str) -> Figure:
    """The first of these signals that the history has, between 0 and 1."""
    history = rows_of(history)
    recorded = [name for name in names if name in history["signal"].values]
    curves = [curve for curve in _curves(history, recorded) if np.isfinite(curve.pooled.mean).any()]
    if not curves:
        why = "it is NaN in every row" if recorded else "name it in a rule or in signals=[..]"
        raise HistoryError(f"The history holds no {' or '.join(names)}: {why}.")
    figure = new_figure(10, 4.4)
    axes = figure.subplots()
    smoothed = _draw(axes, curves[0])
    style(axes, title, smoothed)
    axes.set_ylim(-0.02, 1.02)
    axes.set_ylabel(meaning, fontsize=9)
    axes.set_xlabel("Step")
    _add_key(figure, [axes], curves[0])
    return figure


def _draw(axes: Axes, curve: Curves) -> str:
    """The lines of a signal; how they were smoothed."""
    for i, (colour, dashes) in enumerate(_looks(len(curve.layers))):
        if len(curve.layers) <= NAMED:
            draw_line(axes, curve.by_layer.of(i), colour, dashes, width=1, label=curve.layers[i])
        else:
            axes.plot(curve.by_layer.at, smooth(curve.by_layer.of(i))[0], color=colour, linewidth=0.8)
    if len(curve.layers) > NAMED:
        _name_extremes(axes, curve.by_layer, curve.layers)
    return draw_line(axes, curve.pooled, INK, width=2.2, label="pooled")


def _looks(layers: int) -> Iterable[tuple[Any, Any]]:
    if layers <= NAMED:
        return list(islice(looks(), layers))
    return [(DEPTH_COLOURS(depth), "-") for depth in np.linspace(0, 1, layers)]


def _name_extremes(axes: Axes, by_layer: Thinned, layers: list[str]) -> None:
    """The names of the layers that end lowest and highest, beside the ends of their lines."""
    ends = by_layer.mean[-1]
    if not np.isfinite(ends).any():
        return
    for layer, side in ((int(np.nanargmin(ends)), "top"), (int(np.nanargmax(ends)), "bottom")):
        axes.annotate(
            layers[layer], (by_layer.at[-1], ends[layer]), xytext=(0, 3 if side == "bottom" else -3),
            textcoords="offset points", ha="right", va=side, fontsize=7, color=INK,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip


def _add_key(figure: Figure, panels: list[Axes], curve: Curves) -> None:
    """Which line is which layer: a legend, or for many layers a scale of their depth."""
    count = len(curve.layers)
    if not count:
        return
    if count <= NAMED:
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside right upper", frameon=False, fontsize=9)
        return
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, count - 1), DEPTH_COLOURS), ax=panels, pad=0.02, aspect=40
    )
    bar.set_ticks([0, count - 1], labels=[curve.layers[0], curve.layers[-1]])
    bar.set_label(f"{count} layers; thick: pooled", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.ax.invert_yaxis()
