"""Which column of a log is which signal: guessed by name, shown with the reason, and settable.

    mapping = map_columns(log, ["entropy=router_entropy:nats", "gpu_util=-"])
    print(mapping)               a table: column, signal, unit, why
    mapping.metrics              what `replay` takes

Columns of single numbers that are no signal of this package go through under a name that rules can
speak: `metrics.my loss` is `metrics_my_loss`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import LogError
from ..metrics import ROUTER_METRICS, TREES
from ..signals import SCALAR_RAMPS, shipped
from .chosen import Choice, read_choices
from .loads import choose_loads, describe_loads
from .log import Log
from .names import LOAD, guess
from .units import ENTROPIES, SHARES, to_signal, units_of

SCALED_BELOW = {"load_balancing_loss": 0.5, "router_z_loss": 0.5}  # then a coefficient is in it
SHOWN = 12  # columns under their own name, one line each


@dataclass(frozen=True)
class Assignment:
    """What became of one column.

    Attributes:
        column: its name in the log.
        signal: its name in the metrics; "" if it is left out.
        layer: for loads of experts; "" if the column names none.
        unit: that its values were in; "" where there is but one.
        why: how that is known.
    """

    column: str
    signal: str
    layer: str = ""
    unit: str = ""
    why: str = ""

    @property
    def target(self) -> str:
        """What the table shows: `expert_load/block_0`, or "-"."""
        return (f"{self.signal}/{self.layer}" if self.layer else self.signal) or "-"


@dataclass(frozen=True)
class SignalMapping:
    """All columns of a log as metrics.

    Attributes:
        assignments: one for each column but the step's, in the order of the log.
        metrics: float64 [n] by name, and `expert_load` as {layer: float64 [n, E]}; what `replay` takes.
        experts: E, or None if the log does not tell.
        top_k: experts that a token uses, where loads are given; None without loads.
        notes: what was assumed.
    """

    assignments: tuple[Assignment, ...]
    metrics: Mapping[str, Any]
    experts: int | None
    top_k: int | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        own = [each for each in self.assignments if each.signal and each.why == "own name"]
        few = self.assignments
        if len(own) > SHOWN:
            few = tuple(each for each in self.assignments if each not in own[SHOWN:])
        rows = [("column", "signal", "unit", "why")]
        rows += [(each.column, each.target, each.unit or "-", each.why) for each in few]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3]]) for row in rows]
        if len(few) < len(self.assignments):
            lines.append(f"and {len(self.assignments) - len(few):,} more columns under their own names")
        return "\n".join(lines)


def map_columns(
    log: Log, maps: Iterable[str] = (), *, experts: int | None = None, top_k: int | None = None
) -> SignalMapping:
    """Finds the signal of every column.

    Args:
        maps: "column=signal", "column=signal:unit", "column=-" to leave it out; `expert_load/LAYER` names
            the layer of a list. They win over every guess.
        experts: E; None: the length of the lists of loads.
        top_k: experts that a token uses; None: told by loads that sum to it, else 1, which is noted.

    Raises:
        LogError: a map names no column of the log or makes no sense, a unit cannot be told, or `experts`
            fits no loads.
    """
    choices = read_choices(maps, log.columns)
    notes: list[str] = []
    found = choose_loads(log.columns, choices)
    loads = {layer or "router": log.columns[column] for column, layer in found.items()}
    widths = {values.shape[1] for values in loads.values()}
    if experts is not None and widths and experts not in widths:
        raise LogError(
            f"{log.path}: {experts} experts do not fit loads of {', '.join(map(str, sorted(widths)))}. Leave "
            "--experts out, or the column: --map COLUMN=-"
        )
    if experts is None and len(widths) == 1:
        (experts,) = widths
    if loads:
        unit, told = describe_loads(list(loads.values()))
        if top_k is None and told is None:
            notes.append("experts per token are not known: 1 is assumed; say --top-k K if it is more")
        top_k = top_k or told or 1
    else:
        unit, top_k = "", None

    signals = _choose_signals(log.columns, choices)
    metrics: dict[str, Any] = {LOAD: loads} if loads else {}
    assignments = []
    for column, values in log.columns.items():
        choice = choices.get(column)
        if column in found:
            why = "as told" if choice else f"its name, lists of {values.shape[1]}"
            assignment = Assignment(column, LOAD, found[column], unit, why)
        elif choice and not choice.signal:
            assignment = Assignment(column, "", why="as told")
        elif values.ndim > 1:
            why = f"lists of {values.shape[1]}; if they are loads: --map '{column}={LOAD}'"
            assignment = Assignment(column, "", why=why)
        else:
            assignment, values = _scalar(column, values, signals.get(column, ""), choice, experts, metrics)
            metrics[assignment.signal] = values
        assignments.append(assignment)
    if not metrics:
        raise LogError(f"{log.path}: no column is left to replay. Map one: --map COLUMN=SIGNAL")
    return SignalMapping(tuple(assignments), metrics, experts, top_k, tuple(notes))


def _choose_signals(columns: Mapping[str, np.ndarray], choices: Mapping[str, Choice]) -> dict[str, str]:
    """The signal of each column that has one: as told, else by the surest name."""
    told = {column: choice.signal for column, choice in choices.items() if choice.signal}
    best: dict[str, tuple[int, str]] = {}
    for column, values in columns.items():
        guessed = guess(column) if values.ndim == 1 and column not in choices else None
        if guessed is None or guessed[0] in told.values():
            continue
        signal, rank = guessed
        if signal not in best or rank < best[signal][0]:
            best[signal] = rank, column
    return {column: signal for signal, (_, column) in best.items()} | told


def _scalar(
    column: str,
    values: np.ndarray,
    signal: str,
    choice: Choice | None,
    experts: int | None,
    taken: Mapping[str, Any],
) -> tuple[Assignment, np.ndarray]:
    """What becomes of a column of single numbers, and its values in the signal's unit."""
    if not signal:
        return Assignment(column, _own_name(column, taken), why="own name"), values
    try:
        converted, unit, why = to_signal(
            signal, values, choice.unit if choice else "", experts=experts, name=column
        )
    except LogError as error:
        if choice or signal in ENTROPIES:
            raise LogError(_ask(column, signal, error)) from None
        return Assignment(column, _own_name(column, taken), why=f"{error}: own name"), values
    if not choice and _is_scaled(signal, values):
        why = f"below {SCALED_BELOW[signal]}, as with a coefficient: no {signal}, own name"
        return Assignment(column, _own_name(column, taken), why=why), values
    why = "; ".join(filter(None, ["as told" if choice else "its name", why if why != "as told" else ""]))
    return Assignment(column, signal, unit=unit, why=why), converted


def _is_scaled(signal: str, values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return signal in SCALED_BELOW and len(finite) > 0 and bool(np.median(finite) < SCALED_BELOW[signal])


def _ask(column: str, signal: str, error: LogError) -> str:
    units = " or ".join(f":{unit}" for unit in units_of(signal))
    say = f"Say --map '{column}={signal}:UNIT' with {units}, or" if units else "Name another signal, or"
    end = "" if str(error).endswith("?") else "."
    return f"column '{column}' {error}{end} {say} leave it out: --map '{column}=-'"


def _own_name(column: str, taken: Mapping[str, Any]) -> str:
    """A name of letters, digits and underscores that means nothing else."""
    name = re.sub(r"\W+", "_", column, flags=re.ASCII).strip("_") or "column"
    if name[0].isdigit():
        name = f"_{name}"
    if name in {*shipped(), *SCALAR_RAMPS, *SHARES, *ROUTER_METRICS, *TREES, "loss"}:
        name = f"{name}_logged"
    free, number = name, 2
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free
