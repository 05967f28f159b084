"""The pictures of a report: each a data URI, with the words that stand by it.

A picture is an image of its own inside the page, so that neither its styles nor its ids meet those of
another. Its letters are outlines: no reader needs the font.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from ..errors import HistoryError
from ..plots import AFFINITY, FIGURES, plot_affinity

if TYPE_CHECKING:
    import xarray as xr

    from ..plots import Affinity

DPI = 150
LARGEST_SVG = 200_000  # bytes; what has more lines and patches than that is sent as pixels
SALT = "moe_rules_callback"  # the ids of an SVG are random without one

# Title, and how to read it; by the names of the files
WORDS = {
    "audit": (
        "Loss and truth of the rules",
        "A rule is a line at the upper bound of its truth, with a band down to the lower one. A thin band is "
        "a sure verdict; a band from 0 to 1 knows nothing.",
    ),
    "rule_timeline": (
        "State of every rule",
        "A row is a rule, coloured by its state; the orange strip below it marks where it fires.",
    ),
    "expert_utilization": (
        "Expert utilisation, layer by layer",
        "Share of the assignments that each expert gets. Crosses mark dead experts, triangles dominant ones.",
    ),
    "expert_utilization_total": (
        "Expert utilisation over the whole run",
        "Mean share of each expert, beside the fair share.",
    ),
    "router_entropy": (
        "Router entropy",
        "1: tokens are spread evenly; 0: one expert gets each token for sure.",
    ),
    "routing_accuracy": ("Routing accuracy", "Share of the tokens that go to the expert of their label."),
    "expert_coactivation": (
        "Expert co-activation",
        "How surely one expert brings another along, for the closest pair of each layer.",
    ),
    "layer_signals": (
        "Signals, layer by layer",
        "A panel a signal; a thin line a layer, the thick one is pooled.",
    ),
    AFFINITY: ("Router affinity", "How much of each domain or sample goes to which expert."),
}


@dataclass(frozen=True)
class Picture:
    """Attributes: title, how to read it, what it shows of this run, data URI, size in CSS pixels."""

    title: str
    reading: str
    alt: str
    uri: str
    width: int
    height: int


def pictures(history: xr.Dataset, affinity: Affinity | None, verdict: str) -> tuple[list[Picture], list[str]]:
    """All that the history can give, and why others are left out.

    Args:
        history: as `open_history` gives it.
        affinity: a table of domains by experts, or None.
        verdict: one sentence about all rules.
    """
    drawn, left_out = [], []
    # On a terminal a bar: the pictures of a long run take some seconds.
    for name, draw in tqdm(FIGURES.items(), "pictures", disable=None, leave=False):
        try:
            drawn.append(_picture(name, draw(history), _shows(name, history, verdict)))
        except HistoryError as error:
            left_out.append(f"{WORDS[name][0]}: {error}")
    if affinity is not None:
        rows, experts = affinity.values.shape
        drawn.append(_picture(AFFINITY, plot_affinity(affinity), f"{rows} rows by {experts} experts."))
    return drawn, left_out


def _picture(name: str, figure: Figure, shows: str) -> Picture:
    title, reading = WORDS[name]
    svg = _draw(figure, "svg", {"Date": None})
    uri = _data("image/svg+xml", svg)
    if len(svg) > LARGEST_SVG:
        uri = _data("image/png", _draw(figure, "png", {}))
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Picture(title, reading, f"{title}. {shows}", uri, width, height)


def _draw(figure: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": SALT, "svg.fonttype": "path"}):
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    return file.getvalue()


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _shows(name: str, history: xr.Dataset, verdict: str) -> str:
    """What a picture shows of this run, for those who do not see it."""
    sizes, steps = history.sizes, history["step"].values
    if name == "audit":
        loss = history["loss"].values
        falls = (
            f"The loss goes from {loss[0]:.3g} to {loss[-1]:.3g}. "
            if np.isfinite(loss[[0, -1]]).all()
            else ""
        )
        return f"{falls}Truth of {sizes['rule']} rules over steps {steps[0]:,} to {steps[-1]:,}."
    if name == "rule_timeline":
        return verdict
    if name in ("expert_utilization", "expert_utilization_total"):
        return f"{sizes['expert']} experts in {sizes['layer']} layers."
    if name == "layer_signals":
        return (
            f"{sizes['signal']} signals in {sizes['layer']} layers: "
            + ", ".join(history["signal"].values)
            + "."
        )
    recorded = next(one for one in (name, "routing_acc") if one in history["signal"].values)
    pooled = history["signal_pooled"].sel(signal=recorded).values
    ends = pooled[np.isfinite(pooled)][[0, -1]]
    return f"Pooled over the layers it goes from {ends[0]:.3g} to {ends[1]:.3g}."
