"""The truth of both runs over each other, a panel for each rule that parts ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..paths import AnyPath
from ..plots.style import COLOURS, QUIET, label, save, small_multiples, style
from ..plots.thinning import SMOOTH, rolling_mean, thin
from .comparison import Comparison

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

PANELS = 9


def plot_comparison(
    a: xr.Dataset, b: xr.Dataset, found: Comparison, path: str | AnyPath | None = None
) -> Figure:
    """Draws the bands of both runs; a dashed line where the states part.

    Args:
        a, b: the runs that were compared.
        found: of `compare`. Where no rule parts ways all are drawn; nine at most.
        path: where to save, in the format of the suffix; None: nowhere.
    """
    rules = (found.parted or found.rules)[:PANELS]
    figure, places = small_multiples(len(rules), 2.4, sharex=True, sharey=True)
    lines = {}
    for axes, rule in zip(places, rules, strict=True):
        note = ""
        for run, name, colour in zip((a, b), found.names, COLOURS, strict=False):
            at = _positions(run, found)
            truth = run["truth"].sel(rule=rule.rule).transpose("step", "bound").values.astype(float)
            (lower, note), (upper, _) = (rolling_mean(bound, SMOOTH) for bound in truth.T)
            band = thin(at, np.stack([lower, upper], axis=1))
            axes.fill_between(band.at, *band.mean.T, color=colour, alpha=0.25, linewidth=0)
            (lines[name],) = axes.plot(band.at, band.mean.mean(axis=1), color=colour, linewidth=1.4)
        if rule.parting:
            parted = float(_positions(a, found, rule.parting.steps[0]))
            axes.axvline(parted, color=QUIET, linestyle="--", linewidth=1)
        style(axes, label(rule.rule), note, small=True)
        axes.set_ylim(-0.05, 1.05)
        axes.set_xlabel(axes.get_xlabel() and ("Step" if found.by == "step" else "% of the schedule"))
    figure.legend(lines.values(), map(label, lines), loc="outside upper center", ncols=2, frameon=False)
    if path is not None:
        save(figure, path)
    return figure


def _positions(run: xr.Dataset, found: Comparison, step: int | None = None) -> np.ndarray:
    """Where rows stand, or one step: at their step, or in % of the last."""
    steps = run["step"].values
    at = steps if step is None else np.asarray(step)
    return at if found.by == "step" else 100 * at / max(int(steps[-1]), 1)
