"""A comparison as plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..records import State
from .partings import Parting

if TYPE_CHECKING:
    from .comparison import Comparison

STATES = (State.TRUE, State.FALSE, State.UNKNOWN)


def told(of: Comparison) -> str:
    """The runs, a table of the rules, and what parted first."""
    return "\n".join([*_head(of), "", *_table(of), "", *_verdict(of)])


def _head(of: Comparison) -> list[str]:
    lines = [
        f"{letter}: {name}, steps {low:,} to {high:,}"
        for letter, name, (low, high) in zip("AB", of.names, of.steps, strict=True)
    ]
    how = "step" if of.by == "step" else "fraction of the schedule"
    lines.append(f"{of.rows:,} rows aligned by {how}: shares of each state in A and B, truth of B less A's")
    return lines


def _table(of: Comparison) -> list[str]:
    width = max(4, *(len(rule.rule) + (not rule.same) for rule in of.rules))
    titles = "".join(f"{state.name:>12}" for state in STATES)
    lines = [f"{'rule':{width}}{titles}     truth  parts at step"]
    for rule in of.rules:
        one, other = rule.shares
        shares = "".join(
            f"{one[name]:>7.0%}{other[name]:>5.0%}" for name in (state.name.lower() for state in STATES)
        )
        at = _steps(rule.parting) if rule.parting else "-" if rule.rows else "not judged: it warms up"
        lines.append(f"{rule.rule + '*' * (not rule.same):{width}}{shares}{rule.difference:>+10.2f}  {at}")
    return lines


def _verdict(of: Comparison) -> list[str]:
    lines = []
    if any(not rule.same for rule in of.rules):
        lines.append("* not the same rule: formula, threshold or kind differ.")
    lines += [f"Only in {x}: {', '.join(names)}." for x, names in zip("AB", of.only, strict=True) if names]
    if of.rows < of.patience:
        return [*lines, f"{of.rows:,} rows are too few to tell what parts ways for {of.patience} rows."]
    if of.first is None or of.first.parting is None:
        return [*lines, f"No rule parts ways: no states differ in most of {of.patience} rows in succession."]
    one, other = (value.upper() for value in of.first.parting.values)
    lines.append(
        f"First to part ways: {of.first.rule} at step {_steps(of.first.parting)}, from where it is mostly "
        f"{one} in A and {other} in B."
    )
    for signal, at in of.first.before:
        lines.append(
            f"  By then {signal} had parted, at step {_steps(at)}: on average {at.values[0]:.4g} in A and "
            f"{at.values[1]:.4g} in B."
        )
    if not of.first.before:
        lines.append("  None of its signals had parted by then.")
    return lines


def _steps(parting: Parting) -> str:
    one, other = parting.steps
    return f"{one:,}" if one == other else f"{one:,} of A, {other:,} of B"
