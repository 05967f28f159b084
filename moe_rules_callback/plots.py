"""One picture of a run: the loss above, the truth of every rule below.

    plot_audit(open_history("runs/demo"), "audit.png")
    history.moe_rules.plot("audit.svg")

A rule is a line at its upper bound with a band down to its lower one: a thin band is a sure verdict,
a band from 0 to 1 knows nothing. No pyplot, so that nothing global changes and no display is needed.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import HistoryError

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOSS_COLOUR = "#2c3e50"
TUTORIAL = {  # colour and dashes of the rules of the tutorial
    "expert_specialization": ("#e74c3c", "-"),
    "healthy_specialization": ("#27ae60", (0, (6, 1.5))),
    "load_imbalance": ("#f39c12", (0, (1.2, 1.2))),
    "learning_progress": ("#3498db", (0, (5, 1.5, 1.2, 1.5))),
    "routing_stability": ("#9b59b6", (0, (3, 1.5))),
    "underutilized_experts": ("#95a5a6", (0, (8, 1.5, 1.2, 1.5, 1.2, 1.5))),
}
# Okabe and Ito 2008, told apart by the colour-blind; black and yellow left out, which stand out and fade
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
LEGEND_RULES = 18  # as many as stand beside the panel
BINS = 400  # points of a line in a long run: dashes stay dashes


def plot_audit(
    history: xr.Dataset, path: str | Path | None = None, *, smooth_loss: int = 50, smooth_rules: int = 30
) -> Figure:
    """Draws loss and truth intervals over the step.

    Args:
        history: as `open_history` gives it.
        path: where to save, in the format of the suffix (150 dots per inch); None: nowhere.
        smooth_loss, smooth_rules: rows of the rolling means, at most a tenth of the run.

    Raises:
        HistoryError: the history has no rows.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if history.sizes["step"] == 0:
        raise HistoryError(
            "There is nothing to draw: the history has no rows. Rows arrive with the first flush; in a "
            "run that goes on, call flush() on the callback first."
        )
    if history.sizes["step"] == 1:  # a point has no line: draw it one step wide
        step = history["step"].item() + np.array([-0.5, 0.5])
        history = history.isel(step=[0, 0]).assign_coords(step=step)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    loss = history["loss"].values.astype(float)
    if np.isfinite(loss).any():
        figure = Figure(figsize=(10, 6.2), layout=layout)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        _draw_loss(above, history["step"].values, loss, smooth_loss)
    else:
        figure = Figure(figsize=(10, 4.4), layout=layout)
        below = figure.subplots()
    _draw_rules(below, history, smooth_rules)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_loss(axes: Axes, step: np.ndarray, loss: np.ndarray, smooth: int) -> None:
    smoothed, note = _rolling_mean(loss, smooth)
    at, lowest, _, highest = _bins(step, loss)
    axes.fill_between(at, lowest, highest, color=LOSS_COLOUR, alpha=0.25, linewidth=0.7)
    at, _, mean, _ = _bins(step, smoothed)
    axes.plot(at, mean, color=LOSS_COLOUR, linewidth=1.6)
    _style(axes, "Loss", note if smoothed is loss else f"pale: every row, line: {note}")


def _draw_rules(axes: Axes, history: xr.Dataset, smooth: int) -> None:
    rules, step = history["rule"].values.tolist(), history["step"].values
    truths = history["truth"].transpose("rule", "step", "bound").values.astype(float)  # read once
    crowded = len(rules) > 12
    last, lines, note = {}, {}, ""
    for rule, truth, (colour, dashes) in zip(rules, truths, _looks(rules), strict=True):
        lower, _ = _rolling_mean(truth[:, 0], smooth)
        upper, note = _rolling_mean(truth[:, 1], smooth)
        at, lowest, _, _ = _bins(step, lower)
        _, least, mean, most = _bins(step, upper)
        axes.fill_between(at, lowest, mean, color=colour, alpha=min(0.15, 1.5 / len(rules)), linewidth=0)
        if len(at) < len(step):  # what the bins of a long run would hide
            axes.fill_between(at, least, most, color=colour, alpha=0.4, linewidth=0)
        (lines[rule],) = axes.plot(at, mean, color=colour, linestyle=dashes, linewidth=1 if crowded else 1.8)
        last[rule] = np.nan_to_num(mean[-1])
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1), ("0", ".25", ".5", ".75", "1"))
    axes.set_xlabel("Step")
    _style(axes, "Truth of the rules", f"line: upper bound, band: down to the lower; {note}")
    shown = sorted(rules[:LEGEND_RULES], key=last.__getitem__, reverse=True)  # as the lines end
    title = f"{LEGEND_RULES} of {len(rules)} rules" if len(rules) > LEGEND_RULES else None
    axes.legend(
        [lines[rule] for rule in shown],
        [_label(rule) for rule in shown],
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.03),
        frameon=False,
        fontsize=8 if crowded else 9,
        handlelength=3.6,
    )


def _looks(rules: list[str]) -> list[tuple[str, Any]]:
    """Colour and dashes of each rule: the tutorial's for its six, a cycle of 24 for all others."""
    cycle = itertools.cycle((colour, dashes) for dashes in DASHES for colour in COLOURS)
    return [TUTORIAL[rule] if rule in TUTORIAL else next(cycle) for rule in rules]


def _label(rule: str) -> str:
    shortened = rule if len(rule) <= 32 else rule[:31] + "\N{HORIZONTAL ELLIPSIS}"
    return shortened.replace("$", r"\$")


def _style(axes: Axes, title: str, note: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_title(note, loc="right", fontsize=9, color="#666666")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.tick_params(labelsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _rolling_mean(values: np.ndarray, rows: int) -> tuple[np.ndarray, str]:
    """Mean of the finite values among the `rows` around each, at most a tenth of all, and a note of it.

    Centred, so that a curve stands where its data do. NaN stays where a value is not finite.
    """
    window = min(rows, len(values) // 10)
    if window < 2:
        return values, "every row"
    finite = np.isfinite(values)
    ends = np.arange(len(values)) + (window + 1) // 2
    begin, end = np.maximum(ends - window, 0), np.minimum(ends, len(values))
    sums, counts = (np.concatenate([[0], np.cumsum(x)]) for x in (np.where(finite, values, 0.0), finite))
    means = (sums[end] - sums[begin]) / np.maximum(counts[end] - counts[begin], 1)
    return np.where(finite, means, np.nan), f"rolling mean of {window} rows"


def _bins(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Step, minimum, mean and maximum of the finite values in each of at most BINS equal parts."""
    starts = np.arange(len(step))
    if len(step) > 2 * BINS:
        starts = np.unique(np.searchsorted(step, np.linspace(step[0], step[-1], BINS, endpoint=False)))
    finite = np.isfinite(values)
    known = np.where(finite, values, np.nan)
    counts = np.add.reduceat(finite, starts, dtype=int)
    sums = np.add.reduceat(np.where(finite, values, 0.0), starts)
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return step[starts], np.fmin.reduceat(known, starts), means, np.fmax.reduceat(known, starts)
