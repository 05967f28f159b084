"""One picture of a run: the loss above, the truth of every rule below.

    plot_audit(open_history("runs/demo"), "audit.png")
    history.moe_rules.plot("audit.svg")

A rule is a line at its upper bound with a band down to its lower one: a thin band is a sure verdict,
a band from 0 to 1 knows nothing. No pyplot, so that nothing global changes and no display is needed.
"""

from __future__ import annotations

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
LEGEND_RULES = 24
PIXELS = 1_200  # about the width of the panel in a print


def plot_audit(
    history: xr.Dataset, path: str | Path | None = None, *, smooth_loss: int = 50, smooth_rules: int = 30
) -> Figure:
    """Draws loss and truth intervals over the step.

    Args:
        history: as `open_history` gives it.
        path: where to save, in the format of the suffix (150 dots per inch); None: nowhere.
        smooth_loss, smooth_rules: rows of the rolling means, at most a fifth of the run.

    Raises:
        HistoryError: the history has no rows.
    """
    from matplotlib.figure import Figure

    if history.sizes["step"] == 0:
        raise HistoryError(
            "There is nothing to draw: the history has no rows. Rows arrive with the first flush; in a "
            "run that goes on, call flush() on the callback first."
        )
    step = history["step"].values
    loss = history["loss"].values.astype(float)
    if np.isfinite(loss).any():
        figure = Figure(figsize=(10, 6.2), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        _draw_loss(above, step, loss, _window(smooth_loss, len(step)))
    else:
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        below = figure.subplots()
    _draw_rules(below, step, history, _window(smooth_rules, len(step)))
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_loss(axes: Axes, step: np.ndarray, loss: np.ndarray, window: int) -> None:
    at, low, high = _envelope(step, loss)
    _line(axes, at, low, high, color=LOSS_COLOUR, alpha=0.25, linewidth=0.7)
    at, low, high = _envelope(step, _rolling_mean(loss, window))
    _line(axes, at, low, high, color=LOSS_COLOUR, linewidth=1.6)
    _style(axes, "Loss", _smoothed(window))


def _draw_rules(axes: Axes, step: np.ndarray, history: xr.Dataset, window: int) -> None:
    rules = history["rule"].values.tolist()
    crowd = len(rules) > len(DASHES) * 3
    others = 0
    for index, rule in enumerate(rules):
        if rule in TUTORIAL:
            colour, dashes = TUTORIAL[rule]
        else:
            colour = COLOURS[others % len(COLOURS)]
            dashes = DASHES[others // len(COLOURS) % len(DASHES)]
            others += 1
        truth = history["truth"].isel(rule=index).values.astype(float)
        at, lower, _ = _envelope(step, _rolling_mean(truth[:, 0], window))
        _, low, high = _envelope(step, _rolling_mean(truth[:, 1], window))
        axes.fill_between(at, lower, high, color=colour, alpha=0.05 if crowd else 0.15, linewidth=0)
        label = rule if index < LEGEND_RULES else None
        _line(axes, at, low, high, color=colour, linestyle=dashes, linewidth=1.0 if crowd else 1.8, label=label)
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1), ("0", ".25", ".5", ".75", "1"))
    axes.set_xlabel("Step")
    _style(axes, "Truth of the rules", "upper bound, band down to the lower; " + _smoothed(window))
    more = len(rules) - LEGEND_RULES
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.03), frameon=False, fontsize=9, handlelength=3.2,
        title=f"the first {LEGEND_RULES} of {len(rules)} rules" if more > 0 else None,
    )  # fmt: skip


def _style(axes: Axes, title: str, note: str) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_title(note, loc="right", fontsize=9, color="#666666")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _smoothed(window: int) -> str:
    return f"rolling mean of {window} rows" if window > 1 else "every row"


def _window(rows: int, total: int) -> int:
    return max(1, min(rows, total // 5))


def _rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the last `window`; NaN stays where a value is not finite."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.where(finite, sums / np.maximum(counts, 1), np.nan)


def _envelope(step: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step, minimum and maximum of what falls on one pixel, so that thinning hides no spike."""
    edges = np.linspace(step[0], step[-1], PIXELS, endpoint=False)
    starts = np.unique(np.searchsorted(step, edges)) if len(step) > 2 * PIXELS else np.arange(len(step))
    return step[starts], np.fmin.reduceat(values, starts), np.fmax.reduceat(values, starts)


def _line(axes: Axes, at: np.ndarray, low: np.ndarray, high: np.ndarray, **style: Any) -> None:
    """A line through the minimum and maximum at every step; a lone point, which no line shows, as a dot."""
    marker = "o" if len(at) == 1 else None
    same = np.array_equal(low, high, equal_nan=True)
    points = (at, low) if same else (at.repeat(2), np.stack([low, high], axis=1).ravel())
    axes.plot(*points, marker=marker, markersize=4, solid_joinstyle="round", **style)
