"""The state of every rule over the run, one row a rule: what fired, and when.

A row is coloured by the state of its rule; where a long run is thinned, by how often each state occurred.
The strip below a row is orange wherever the rule fires, if only in one of many rows. Risks come first,
then the rules of health, those that are only watched, and axioms.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from ..errors import HistoryError
from ..formula import RuleKind
from ..proof import proofs_of
from ..records import State, fires_in
from .style import ALARM, QUIET, label, new_figure, style
from .thinning import Thinned, rows_of, thin

# From light to dark: how much there is to say
STATES = {
    State.UNKNOWN: "#efefef",
    State.FALSE: "#8ec7e8",
    State.TRUE: "#0072b2",
    State.CONTRADICTORY: "#1a1a1a",
}
WARMUP: dict[str, Any] = {"facecolor": "none", "edgecolor": "#777777", "hatch": "////", "linewidth": 0}
BAND, STRIP = (0.12, 0.66), (0.69, 0.9)  # of a row of height 1, from above
KINDS: dict[RuleKind, str] = {
    "risk": "Risks fire when TRUE",
    "health": "Health rules fire when FALSE",
    None: "Rules that are only watched",
}
AXIOMS = "Axioms, by the state of their evidence"
HEADING = 0.75  # height of a group's, in rows
HEADING_TEXT: dict[str, Any] = {"fontsize": 8, "color": QUIET, "style": "italic", "va": "bottom"}


def plot_timeline(history: xr.Dataset) -> Figure:
    """Draws one row a rule, coloured by its state.

    Args:
        history: as `open_history` gives it.

    Raises:
        HistoryError: the history has no rows, or no rules.
    """
    history = rows_of(history)
    step = history["step"].values
    told: dict[str, dict[str, Any]] = json.loads(history.attrs["rules"])
    proofs = proofs_of(history)
    axioms = [r for r in told if proofs and proofs.role(r) == "axiom" and not told[r]["kind"]]
    groups: dict[str, list[str]] = {
        words: [rule for rule in told if told[rule]["kind"] == kind and rule not in axioms]
        for kind, words in KINDS.items()
    }
    groups[AXIOMS] = axioms
    rules = [rule for group in groups.values() for rule in group]
    if not rules:
        raise HistoryError("The history holds no rules: only signals were recorded.")
    states = history["state"].sel(rule=rules).compute().transpose("rule", "step").values
    height = (0.42 if len(rules) <= 12 else 0.27) * (len(rules) + HEADING * sum(map(bool, groups.values())))
    figure = new_figure(10, 1.3 + height)
    axes = figure.subplots()
    tops, notes, top, rows = [], [], 0.0, 1
    for words, group in groups.items():
        if group:
            where: dict[str, Any] = {"transform": axes.get_yaxis_transform()}
            axes.text(0.004, top + 0.9 * HEADING, words, **HEADING_TEXT, **where)
            top += HEADING
        for rule in group:
            state, warmup, kind = states[len(tops)], told[rule]["warmup"], told[rule]["kind"]
            judged = step >= warmup
            fired = judged & (state == fires_in([kind]))
            parts = thin(step, np.stack([*(state == one for one in STATES), fired], axis=1))
            rows = parts.rows
            _draw_states(axes, top, parts)
            _draw_firing(axes, top, parts)
            _draw_warmup(axes, top, parts.edges, warmup)
            notes.append(_note(step, judged, fired, state, kind))
            tops.append(top)
            top += 1
    thinned = f"a column: up to {rows:,} rows, filled by the share of each state"
    style(axes, "State of the rules", thinned if rows > 1 else "")
    axes.set_ylim(top, 0)
    _name_rows(axes, np.array(tops) + np.mean(BAND), rules, notes)
    axes.margins(x=0)
    axes.set_xlabel("Step")
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    _add_legend(figure, states, any(told[rule]["warmup"] > step[0] for rule in rules))
    return figure


def _draw_states(axes: Axes, top: float, parts: Thinned) -> None:
    """Each column of the row filled from below, by the share of each state in it."""
    base = np.full(len(parts.at), top + BAND[1])
    for i, colour in reversed(list(enumerate(STATES.values()))):
        height = parts.mean[:, i] * (BAND[1] - BAND[0])
        _fill(axes, parts.edges, base - height, base, colour)
        base = base - height


def _draw_firing(axes: Axes, top: float, parts: Thinned) -> None:
    """The strip below a row: where the rule fires in any row of a column."""
    bottom = np.full(len(parts.at), top + STRIP[1])
    _fill(axes, parts.edges, bottom - (parts.high[:, -1] > 0) * (STRIP[1] - STRIP[0]), bottom, ALARM)


def _fill(axes: Axes, edges: np.ndarray, above: np.ndarray, below: np.ndarray, colour: str) -> None:
    """Columns between two heights each; nothing where all are empty."""
    if (above < below).any():
        above, below = (np.append(height, height[-1]) for height in (above, below))
        axes.fill_between(edges, above, below, step="post", color=colour, linewidth=0)


def _draw_warmup(axes: Axes, top: float, edges: np.ndarray, warmup: int) -> None:
    width = min(warmup, edges[-1]) - edges[0]
    if width > 0:
        axes.add_patch(Rectangle((edges[0], top + BAND[0]), width, BAND[1] - BAND[0], **WARMUP))


def _note(
    step: np.ndarray, judged: np.ndarray, fired: np.ndarray, state: np.ndarray, kind: str | None
) -> str:
    """What a row says, in a few words."""
    if not judged.any():
        return "not judged"
    if fired.any():
        return f"fired in {_percent(fired.sum() / judged.sum())}, first at {step[fired.argmax()]:,}"
    if not (judged & np.isin(state, (State.TRUE, State.FALSE))).any():
        return "never decided"
    if kind:
        return "did not fire"
    return f"TRUE in {_percent((judged & (state == State.TRUE)).sum() / judged.sum())}"


def _percent(share: float) -> str:
    """Neither rounded down to 0 nor up to 100 %."""
    if 0 < share < 0.01:
        return "<1 %"
    return ">99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"


def _name_rows(axes: Axes, centres: np.ndarray, rules: list[str], notes: list[str]) -> None:
    """Names on the left, what the rows say on the right; those that fired stand out."""
    size = 9 if len(rules) <= 30 else 8
    axes.set_yticks(centres, [label(rule) for rule in rules], fontsize=size)
    right = axes.secondary_yaxis("right")
    right.set_yticks(centres, notes, fontsize=size, color=QUIET)
    right.spines["right"].set_visible(False)
    for side in (axes, right):
        side.tick_params(axis="y", length=0)
    for name, words in zip(axes.get_yticklabels(), right.get_yticklabels(), strict=True):
        if words.get_text().startswith("fired"):
            words.set_color(ALARM)
            name.set_fontweight("bold")


def _add_legend(figure: Figure, states: np.ndarray, warms_up: bool) -> None:
    seen = [
        Patch(color=colour, label=state.name)
        for state, colour in reversed(STATES.items())
        if (states == state).any()
    ]
    fires = Patch(color=ALARM, label="fires: a risk is TRUE, health is FALSE")
    warmup = Patch(**WARMUP, label="warm-up: cannot fire")
    figure.legend(
        handles=[*seen, fires, *([warmup] if warms_up else [])],
        loc="outside lower center", ncols=6, frameon=False, fontsize=9, handlelength=1.4,
    )  # fmt: skip
