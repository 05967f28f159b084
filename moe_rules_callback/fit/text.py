"""A fit as plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .fitting import Fitted, RuleFit


def told(of: Fitted) -> str:
    """A verdict and tables for each rule."""
    return "\n\n".join("\n".join([*_verdict(each), *_changes(each), *_scores(each)]) for each in of.fits)


def _verdict(of: RuleFit) -> list[str]:
    positive, negative = of.runs
    gain, error = of.gain
    what = "accepted" if of.accepted else "not accepted, the old rule stays"
    lines = [
        f"{of.rule.name}: {what}",
        f"  {positive} runs in which it ought to be TRUE, {negative} in which it ought not.",
        f"  On runs held out, balanced accuracy goes from {of.before.accuracy:.3f} to "
        f"{of.after.accuracy:.3f} ({gain:+.3f}, standard error {error:.3f}).",
    ]
    if not of.accepted:
        lines.append(
            "  So few runs give as much by chance: it is not surely better than the old rule and than 0.5."
        )
    return [*lines, *(f"  Note: {note}." for note in of.notes)]


def _changes(of: RuleFit) -> list[str]:
    title = "learnt from all runs"
    width = max(len(title), *(len(change.label) for change in of.changes))
    lines = ["", f"  {title:{width}}    before     after"]
    return lines + [f"  {c.label:{width}}{c.before:>10.4g}{c.after:>10.4g}" for c in of.changes]


def _scores(of: RuleFit) -> list[str]:
    rows = [("the old rule", of.before), ("the new rule", of.after)]
    rows += [(each.what, each.outcome) for each in of.ablations]
    title = "on runs held out"
    width = max(len(title), *(len(what) for what, _ in rows))
    lines = ["", f"  {title:{width}}  accuracy  cross-entropy"]
    return lines + [f"  {what:{width}}{x.accuracy:>10.3f}{x.loss:>15.3f}" for what, x in rows]
