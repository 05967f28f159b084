"""The scores as tables in Markdown: detectors against each other, then fault by fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .judging import Judged, Loaded, fixed_thresholds, judge, leaves_band, load, loss_spikes
from .runs import Run
from .scores import Score, confusion, score

DETECTORS: dict[str, Callable[[Loaded], list[Judged]]] = {
    "`router_health`": lambda loaded: judge(loaded, "router_health"),
    "`balanced_but_not_learning`": lambda loaded: judge(loaded, "balanced_but_not_learning"),
    "`nano_moe`, the tutorial's six": lambda loaded: judge(loaded, "nano_moe"),
    "fixed thresholds": fixed_thresholds,
    "6-sigma loss spike": loss_spikes,
    "loss leaves the healthy band": leaves_band,
}
REFERENCES = {"spike": "6-sigma loss spike", "band": "loss leaves the healthy band"}
HEAD = ("detector", "detected", "precision", "diagnosed", "precision", "false alarms / 1,000 steps",
        "delay", "ahead of spike", "ahead of band")  # fmt: skip


def tables(runs: Sequence[Run], directory: Path, rules: Sequence[str] = ()) -> str:
    """Both tables over some runs.

    Args:
        runs: which, all recorded.
        directory: where.
        rules: further books, by name or path.
    """
    loaded = load(runs, directory)
    judged = {name: detect(loaded) for name, detect in DETECTORS.items()}
    judged |= {f"`{Path(book).stem}`": judge(loaded, book) for book in rules}
    reference = {short: judged[name] for short, name in REFERENCES.items()}
    scores = {name: score(each, reference) for name, each in judged.items()}
    first = next(iter(scores.values()))
    silent = {name: f"{first.silent[short]} of {first.detected}" for short, name in REFERENCES.items()}
    lines = [
        f"{first.faulty} runs with a fault that signals can show, {first.hidden} with another, "
        f"{first.healthy_steps:,} healthy steps after the warm-up.",
        "",
        _row(HEAD),
        _row("---" for _ in HEAD),
        *(_row(_cells(name, each)) for name, each in scores.items()),
        "",
        "Of the runs that the first row detects "
        + " and ".join(f"the {name} is silent in {count}" for name, count in silent.items())
        + ".",
        "",
        _by_fault(next(iter(judged.values()))),
    ]
    return "\n".join(lines)


def _cells(name: str, of: Score) -> list[str]:
    named = of.right_names > 0
    return [
        name,
        f"{_percent(of.recall)} ({of.detected} of {of.faulty})",
        _percent(of.precision),
        _percent(of.diagnosis_recall) if named else "-",
        _percent(of.diagnosis_precision) if named else "-",
        f"{of.false_per_1000:.2f} ({of.false_alarms} in all)",
        f"{of.delay:.0f}",
        f"{of.lead['spike']:.0f}",
        f"{of.lead['band']:.0f}",
    ]


def _by_fault(judged: Sequence[Judged]) -> str:
    lines = ["| fault | runs | named, in so many runs |", "|---|---|---|"]
    for fault, row in confusion(judged).items():
        names = sorted(((n, count) for n, count in row.items() if n != "runs"), key=lambda pair: -pair[1])
        told = ", ".join(f"{name} {count}" for name, count in names) or "nothing"
        lines.append(_row((fault or "none", str(row["runs"]), told)))
    return "\n".join(lines)


def _row(cells) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
