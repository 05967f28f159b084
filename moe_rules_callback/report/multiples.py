"""Small multiples: the truth of a rule layer by layer, a panel a layer, drawn as SVG in the text's colour.

A panel shows a band from the lower bound up to the upper one over the run, dashes where a bound must be for
the rule to fire, and a strip at the bottom wherever the layer alone would fire it in any row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..plots.thinning import Thinned, rows_of, thin
from ..verdicts import Verdict
from .markup import Html, breakable, fill, join

if TYPE_CHECKING:
    import xarray as xr

PARTS = 60  # of the run, at least: a panel is about 150 pixels wide
PANELS = 12  # layers of a rule that are shown
WIDTH, HEIGHT, STRIP = 240, 100, 8

PANEL = """<figure class="panel$worst"><svg viewBox="0 0 240 110" preserveAspectRatio="none" role="img"
aria-label="$alt"><path class="band" d="$band"/><path class="must" d="M0 ${must}H240"/>
<path class="fires" d="$fires"/></svg><figcaption>$layer</figcaption></figure>"""


def layer_multiples(history: xr.Dataset, found: Sequence[Verdict]) -> dict[str, Html]:
    """Of each of these rules, all with a kind, its panels.

    Of more than twelve layers those are shown that would fire it most, in the order of the model.
    """
    if not found or not history.sizes["step"]:
        return {}
    history = rows_of(history)
    names = [verdict.rule for verdict in found]
    truth = history["truth_layer"].sel(rule=names).transpose("step", "rule", "layer", "bound")
    parts = thin(history["step"].values, truth, PARTS)
    layers: list[str] = history["layer"].values.tolist()
    return {verdict.rule: _panels(parts.of(i), verdict, layers) for i, verdict in enumerate(found)}


def _panels(parts: Thinned, verdict: Verdict, layers: list[str]) -> Html:
    """`parts` of values [n, Y, 2]."""
    threshold = np.float32(verdict.threshold)
    if verdict.kind == "risk":
        fires, must = parts.high[..., 0] >= threshold, verdict.threshold
    else:
        fires, must = 1 - parts.low[..., 1] >= threshold, 1 - verdict.threshold
    fires &= parts.mean[..., 0] <= parts.mean[..., 1]  # where axioms contradict each other nothing fires
    fires &= (parts.edges[1:] > verdict.warmup)[:, None]
    certain = parts.mean.sum(axis=(0, 2)) * (1 if verdict.kind == "risk" else -1)

    worst = layers.index(verdict.layer) if len(layers) > 1 else None

    def rank(y: int) -> tuple[bool, int, float]:
        return y != worst, -fires[:, y].sum(), -certain[y]

    chosen = sorted(sorted(range(len(layers)), key=rank)[:PANELS])
    panels = [_panel(parts.of(y), fires[:, y], must, layers[y], y == worst) for y in chosen]
    told = "The truth from 0 to 1 over the run" + (", layer by layer" if len(layers) > 1 else "")
    told += f": the {PANELS} worst of {len(layers)}." if len(layers) > PANELS else "."
    return fill(
        '<p class="quiet">$told The rule fires where the whole band is $side the dashes; an orange strip '
        'marks where the layer alone would fire it.</p><div class="panels">$panels</div>',
        told=told,
        side="above" if verdict.kind == "risk" else "below",
        panels=join(panels),
    )


def _panel(parts: Thinned, fires: np.ndarray, must: float, layer: str, worst: bool) -> Html:
    """One layer: `parts` of values [n, 2], `fires` [n]."""
    edges = parts.edges - parts.edges[0]
    x = np.rint(edges * (WIDTH / edges[-1])).astype(int)
    middle = np.rint((x[:-1] + x[1:]) / 2).astype(int)
    lower, upper = (np.rint((1 - parts.mean[:, bound]) * HEIGHT).astype(int) for bound in (0, 1))
    lower = np.maximum(lower, upper + 1)  # a sure verdict is still seen
    outline = [*zip(middle, upper, strict=True), *zip(middle[::-1], lower[::-1], strict=True)]
    strips = [
        f"M{x[begin]} {HEIGHT + 2}H{x[end]}v{STRIP}H{x[begin]}z"
        for begin, end in np.flatnonzero(np.diff(fires, prepend=False, append=False)).reshape(-1, 2)
    ]
    low, high = parts.mean[-1]
    words = "never fires the rule"
    if fires.any():
        words = f"fires the rule, first near step {parts.at[fires.argmax()]:,.0f}"
    return fill(
        PANEL,
        worst=" worst" if worst else "",
        alt=f"{layer}: truth from {low:.2f} to {high:.2f} at the end; alone it {words}.",
        band="M" + "L".join(f"{a} {b}" for a, b in outline) + "z",
        must=round((1 - must) * HEIGHT),
        fires="".join(strips),
        layer=breakable(f"{layer} (worst)" if worst else layer),
    )
