"""How a rule, a verdict and the audit of a run show themselves in a notebook.

    parse_rule("0.85 :: high_load_cv", "uneven")         the last line of a cell: a rule
    history.moe_rules                                    the audit: one line a rule, with its band
    history.moe_rules.verdicts()[0]                      what the run says about one rule

The markup reads without its styles, which some viewers strip, and takes its ink from the page: it can be
dark. Where treescope shows objects, it gets its usual tree with the same words as a comment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from .proof import Reason
from .verdicts import Verdict, by_role, summary

if TYPE_CHECKING:
    import xarray as xr

    from .formula import Rule

WIDTH, HEIGHT = 160, 26  # of a band, in CSS pixels
POINTS = 120  # along a band
BAND, ALARM = "#0072b2", "#d55e00"  # of Okabe and Ito (2008), as in the figures
LEFT = "text-align:left;vertical-align:middle"
FIRES = {"risk": "a risk: fires when TRUE", "health": "health: fires when FALSE", None: "only watched"}


def rule_html(rule: Rule) -> str:
    """Name, text, when it fires, and its words."""
    text = rule.text.strip() or f"{rule.threshold:g} :: {rule.formula}"
    when = FIRES[rule.kind] + (f", {rule.severity}" if rule.kind else "")
    when += f", from step {rule.warmup:,} on" if rule.warmup else ""
    words = (("", rule.description), ("Likely cause: ", rule.cause), ("Next: ", rule.next_step))
    told = "".join(f"<div>{before}{escape(said)}</div>" for before, said in words if said)
    return f"<div><b>{escape(rule.name)}</b> <small>({when})</small><pre>{escape(text)}</pre>{told}</div>"


def verdict_html(verdict: Verdict) -> str:
    """What the run says; why and what to do next for a rule that fired."""
    told = f"<div><b>{escape(verdict.rule)}</b>{_badge(verdict)}: {escape(verdict.sentence)}</div>"
    if verdict.fired:
        cause = f"Likely cause: {verdict.cause}" if verdict.cause else ""
        why = " ".join(filter(None, (verdict.description, cause)))
        told += f"<div>Why: <code>{escape(verdict.text)}</code> {escape(why)}</div>"
    if verdict.proof:
        told += f"<div>Proof at step {verdict.proof_step:,}:</div>{_reasons(verdict.proof)}"
    if verdict.fired and verdict.next_step:
        told += f"<div>Next: {escape(verdict.next_step)}</div>"
    return f"<div>{told}</div>"


def audit_html(dataset: xr.Dataset, found: Sequence[Verdict]) -> str:
    """A table of all rules: the band of truth over the run, the state at its end, when it fired."""
    truth = dataset["truth"].compute().transpose("rule", "step", "bound").values
    heads = ("Rule", "Truth over the run", "At the end", "Fired")
    table = "".join(f'<th style="{LEFT}">{head}</th>' for head in heads)
    table = f"<thead><tr>{table}</tr></thead><tbody>"
    bands = {verdict.rule: bounds for verdict, bounds in zip(found, truth, strict=True)}
    for verdict in by_role(found):
        bounds = bands[verdict.rule]
        interval = f"[{verdict.truth[0]:.2f}, {verdict.truth[1]:.2f}]"
        at_end = f'<span style="white-space:nowrap">{verdict.state.name} {interval}</span>'
        cells = (
            f'<b title="{escape(verdict.text)}">{escape(verdict.rule)}</b>{_badge(verdict)}',
            _band(bounds, verdict.fired),
            at_end if verdict.end is not None else "",
            escape(_when(verdict)),
        )
        table += "<tr>" + "".join(f'<td style="{LEFT}">{cell}</td>' for cell in cells) + "</tr>"
    return f"<div><p>{escape(summary(found))}</p><table>{table}</tbody></table></div>"


def in_treescope(node: Any, comment: str, path: str | None, subtree_renderer: Any) -> Any:
    """What treescope, which calls this, shows of a dataclass; with a comment behind it."""
    from treescope import rendering_parts, repr_lib

    attributes = {field.name: getattr(node, field.name) for field in fields(node)}
    tree = repr_lib.render_object_constructor(
        type(node), attributes, path, subtree_renderer, roundtrippable=True
    )
    note = rendering_parts.text(f"  # {' '.join(comment.split())}")
    return rendering_parts.siblings_with_annotations(
        tree, extra_annotations=[rendering_parts.comment_color(note)]
    )


def _reasons(reasons: Sequence[Reason]) -> str:
    items = (f"<li>{escape(str(reason))}{_reasons(reason.reasons)}</li>" for reason in reasons)
    return f"<ul>{''.join(items)}</ul>" if reasons else ""


def _badge(verdict: Verdict) -> str:
    if not verdict.fired:
        return ""
    return f' <span style="color:{ALARM}">{"fires" if verdict.fires_now else "fired"}</span>'


def _when(verdict: Verdict) -> str:
    """When it fired, in a few words."""
    if not verdict.rows:
        return "not judged"
    if verdict.fired:
        rows = f"{verdict.rows_fired:,} of {verdict.rows:,} rows"
        return f"{rows}, first at step {verdict.first_step:,}, worst in {verdict.layer}"
    if verdict.contradicted is not None:
        return f"contradictory, first at step {verdict.contradicted:,}"
    if verdict.kind is None:
        return "only watched" if verdict.role != "axiom" else "an axiom"
    return "did not fire" if verdict.decided else "never decided"


def _band(bounds: np.ndarray, fired: bool) -> str:
    """Truth [rows, 2] as a band, 0 below and 1 above: the least and the most of the rows behind a point."""
    if not len(bounds):
        return ""
    count = min(len(bounds), POINTS)
    starts = np.arange(count) * len(bounds) // count
    lower, upper = np.fmin.reduceat(bounds[:, 0], starts), np.fmax.reduceat(bounds[:, 1], starts)
    if count == 1:  # a point has no line
        lower, upper = np.repeat(lower, 2), np.repeat(upper, 2)
    at = np.linspace(0, WIDTH, len(lower))
    high, low = (HEIGHT - 1 - (HEIGHT - 2) * np.nan_to_num(bound) for bound in (upper, lower))
    corners = zip([*at, *at[::-1]], [*high, *low[::-1]], strict=True)
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    colour = ALARM if fired else BAND
    return (
        f'<svg width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<path d="M0 .5H{WIDTH}M0 {HEIGHT - 0.5}H{WIDTH}" stroke="currentColor" stroke-opacity=".25"/>'
        f'<polygon points="{points}" fill="{colour}" fill-opacity=".55" stroke="{colour}" stroke-width=".8"/>'
        "</svg>"
    )
