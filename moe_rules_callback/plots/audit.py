"""The loss above, the truth of every rule below.

A rule is a line at its upper bound with a band down to its lower one: a thin band is a sure verdict,
a band from 0 to 1 knows nothing. Where rules conclude, their evidence is left out, and conclusions for which
nothing ever spoke.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..paths import AnyPath
from ..proof import proofs_of
from .style import INK, label, looks, new_figure, save, style
from .thinning import rolling_mean, rows_of, thin

TUTORIAL: dict[str, tuple[str, Any]] = {  # colour and dashes of the rules of the tutorial
    "expert_specialization": ("#e74c3c", "-"),
    "healthy_specialization": ("#27ae60", (0, (6, 1.5))),
    "load_imbalance": ("#f39c12", (0, (1.2, 1.2))),
    "learning_progress": ("#3498db", (0, (5, 1.5, 1.2, 1.5))),
    "routing_stability": ("#9b59b6", (0, (3, 1.5))),
    "underutilized_experts": ("#95a5a6", (0, (8, 1.5, 1.2, 1.5, 1.2, 1.5))),
}
LEGEND_RULES = 18  # as many as stand beside the panel


def plot_audit(
    history: xr.Dataset, path: str | AnyPath | None = None, *, smooth_loss: int = 50, smooth_rules: int = 30
) -> Figure:
    """Draws loss and truth intervals over the step.

    Args:
        history: as `open_history` gives it.
        path: where to save, in the format of the suffix; None: nowhere.
        smooth_loss, smooth_rules: rows of the rolling means, at most a tenth of the run.

    Raises:
        HistoryError: the history has no rows.
    """
    history = rows_of(history)
    step, loss = history["step"].values, history["loss"].values.astype(float)
    if np.isfinite(loss).any():
        figure = new_figure(10, 6.2)
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
        _draw_loss(above, step, loss, smooth_loss)
    else:
        figure = new_figure(10, 4.4)
        below = figure.subplots()
    _draw_rules(below, history, smooth_rules)
    if path is not None:
        save(figure, path)
    return figure


def _draw_loss(axes: Axes, step: np.ndarray, loss: np.ndarray, smooth: int) -> None:
    smoothed, note = rolling_mean(loss, smooth)
    every, line = thin(step, loss), thin(step, smoothed)
    axes.fill_between(every.at, every.low, every.high, color=INK, alpha=0.25, linewidth=0.7)
    axes.plot(line.at, line.mean, color=INK, linewidth=1.6)
    style(axes, "Loss", note if smoothed is loss else f"pale: every row, line: {note}")


def _draw_rules(axes: Axes, history: xr.Dataset, smooth: int) -> None:
    everything, step = history["rule"].values.tolist(), history["step"].values
    truths = history["truth"].compute().transpose("rule", "step", "bound").values  # read once
    proofs = proofs_of(history)
    roles = [proofs.role(rule) if proofs else "rule" for rule in everything]
    kept = _telling(roles, truths)
    rules, truths = [everything[i] for i in kept], truths[kept]
    concluded = np.array([roles[i] == "conclusion" for i in kept])
    # Little speaks against conclusions, so their upper bounds stay at 1; what speaks for them counts.
    truths = np.where(concluded[:, None, None], truths[..., :1], truths)
    crowded = len(rules) > 12
    last, lines, note = {}, {}, ""
    for rule, truth, (colour, dashes) in zip(rules, truths, _looks(rules), strict=True):
        lower, _ = rolling_mean(truth[:, 0].astype(float), smooth)
        upper, note = rolling_mean(truth[:, 1].astype(float), smooth)
        below, line = thin(step, lower), thin(step, upper)
        at, mean = line.at, line.mean
        axes.fill_between(at, below.low, mean, color=colour, alpha=min(0.15, 1.5 / len(rules)), linewidth=0)
        if line.rows > 1:  # what the parts of a long run would hide
            axes.fill_between(at, line.low, line.high, color=colour, alpha=0.4, linewidth=0)
        (lines[rule],) = axes.plot(at, mean, color=colour, linestyle=dashes, linewidth=1 if crowded else 1.8)
        last[rule] = np.nan_to_num(mean[-1])
    axes.set_ylim(-0.05, 1.05)
    axes.set_yticks((0, 0.25, 0.5, 0.75, 1), ("0", ".25", ".5", ".75", "1"))
    axes.set_xlabel("Step")
    bounds = "line: upper bound, band: down to the lower" + (
        "; conclusions: lower" if concluded.any() else ""
    )
    style(axes, "Truth of the rules", f"{bounds}; {note}")
    shown = sorted(rules[:LEGEND_RULES], key=last.__getitem__, reverse=True)  # as the lines end
    axes.legend(
        [lines[rule] for rule in shown],
        [label(rule) for rule in shown],
        title=f"{len(shown)} of {len(everything)} rules" if len(shown) < len(everything) else None,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.03),
        frameon=False,
        fontsize=8 if crowded else 9,
        handlelength=3.6,
    )


def _telling(roles: Sequence[str], truths: np.ndarray) -> list[int]:
    """Numbers of the rules to draw: where there are axioms, what follows from them and is ever known."""
    others = [i for i, role in enumerate(roles) if role != "axiom"]
    if len(others) == len(roles):
        return others
    known = [i for i in others if np.nanmin(truths[i, :, 1] - truths[i, :, 0]) < 0.5]
    return known or others


def _looks(rules: list[str]) -> list[tuple[str, Any]]:
    """Colour and dashes of each rule: the tutorial's for its six."""
    cycle = looks()
    return [TUTORIAL[rule] if rule in TUTORIAL else next(cycle) for rule in rules]
