"""How good a detector is: what it finds, what it calls it, and how often it cries wolf.

    score(judged, reference)      a `Score`; `reference` holds the alarms that leads are counted against

An alarm in a faulty run counts as right from the fault's onset on. A fault is detected by any right alarm,
and diagnosed by one that names its illness. Names of illnesses are counted once a run; a rule may also be
about a symptom, which is no diagnosis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .catalogue import FAULTS
from .judging import Judged
from .runs import WARM


@dataclass(frozen=True)
class Score:
    """The figures of one detector over some runs.

    Attributes:
        faulty, detected: runs with a fault that signals can show, and those with a right alarm.
        hidden, seen: runs with a fault that they cannot be expected to show, and those with a right alarm.
        alarmed_healthy: runs without a fault that had an alarm.
        diagnosed: faulty runs whose illness was named.
        names, right_names: illnesses named in all runs, and those that were right.
        false_alarms, healthy_steps: alarms before any onset and in healthy runs; steps after the warm-up of
            runs without a fault.
        delay: median steps from the onset, or the end of the warm-up, to the first right alarm; NaN: none.
        lead: for each other detector, the median number of steps by which this one is earlier in the runs
            that it detects; the other's silence counts as the end of the run.
        silent: for each other detector, of how many of these runs it says nothing.
    """

    faulty: int
    detected: int
    hidden: int
    seen: int
    alarmed_healthy: int
    diagnosed: int
    names: int
    right_names: int
    false_alarms: int
    healthy_steps: int
    delay: float
    lead: dict[str, float]
    silent: dict[str, int]

    @property
    def recall(self) -> float:
        return _ratio(self.detected, self.faulty)

    @property
    def precision(self) -> float:
        """Share of runs with an alarm that have a fault."""
        alarmed = self.detected + self.seen
        return _ratio(alarmed, alarmed + self.alarmed_healthy)

    @property
    def diagnosis_recall(self) -> float:
        return _ratio(self.diagnosed, self.faulty)

    @property
    def diagnosis_precision(self) -> float:
        return _ratio(self.right_names, self.names)

    @property
    def false_per_1000(self) -> float:
        return 1000 * _ratio(self.false_alarms, self.healthy_steps)


def score(judged: Sequence[Judged], reference: Mapping[str, Sequence[Judged]]) -> Score:
    """See the module."""
    first = {each.run.name: _first(each) for each in judged}
    shown = [each for each in judged if each.run.illness and FAULTS[each.run.fault].shows]
    hidden = [each for each in judged if each.run.illness and not FAULTS[each.run.fault].shows]
    healthy = [each for each in judged if not each.run.illness]
    found = [each for each in shown if first[each.run.name] is not None]
    known = {fault.illness for fault in FAULTS.values()}  # other names are symptoms
    named = [(each.run, name) for each in judged for name in {a.name for a in _right(each)} & known]
    false = sum(len(each.alarms) for each in healthy)
    false += sum(len(each.alarms) - len(_right(each)) for each in (*shown, *hidden))
    lead, silent = {}, {}
    for name, others in reference.items():
        theirs = {each.run.name: _first(each) for each in others}
        steps = [each.run.steps if theirs[each.run.name] is None else theirs[each.run.name] for each in found]
        leads = [(step or 0) - (first[each.run.name] or 0) for step, each in zip(steps, found, strict=True)]
        lead[name] = float(np.median(leads)) if leads else np.nan
        silent[name] = sum(theirs[each.run.name] is None for each in found)
    delays = [(first[each.run.name] or 0) - max(each.onset, WARM if not each.onset else 0) for each in found]
    return Score(
        faulty=len(shown),
        detected=len(found),
        hidden=len(hidden),
        seen=sum(first[each.run.name] is not None for each in hidden),
        alarmed_healthy=sum(bool(each.alarms) for each in healthy),
        diagnosed=sum(any(a.name == each.run.illness for a in _right(each)) for each in shown),
        names=len(named),
        right_names=sum(run.illness == name for run, name in named),
        false_alarms=false,
        healthy_steps=sum(each.run.healthy_rows for each in healthy),
        delay=float(np.median(delays)) if delays else np.nan,
        lead=lead,
        silent=silent,
    )


def confusion(judged: Sequence[Judged]) -> dict[str, dict[str, int]]:
    """fault -> name -> number of its runs in which it was named after the onset; "" for healthy runs."""
    table: dict[str, dict[str, int]] = {}
    for each in judged:
        row = table.setdefault(each.run.fault if each.run.illness else "", {})
        row["runs"] = row.get("runs", 0) + 1
        for name in {alarm.name for alarm in _right(each)}:
            row[name] = row.get(name, 0) + 1
    return table


def _right(judged: Judged) -> tuple:
    """Alarms from the onset on; of a healthy run, all (they are wrong, but they were raised)."""
    return tuple(alarm for alarm in judged.alarms if alarm.step >= judged.onset)


def _first(judged: Judged) -> int | None:
    return min((alarm.step for alarm in _right(judged)), default=None)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else np.nan
