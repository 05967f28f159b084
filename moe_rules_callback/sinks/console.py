"""What the rules say, on the terminal.

    step 1,280  loss 2.310  +expert_specialization TRUE [.87, .95]  -load_imbalance FALSE [.02, .11]
    step 3,400  71/s  loss 1.480  3 true  2 false  1 unknown        (rewritten in place, on a terminal)

A line says which states differ from those of the line before. The first 20 such lines come as they
arise, later ones at most every 10 seconds; changes in between are not lost but told together.
"""

from __future__ import annotations

import shutil
import sys
from typing import TextIO

import numpy as np

from ..hookspecs import hookimpl
from ..records import Records, Run, State
from ..terminal import plain

SIGNS = {State.TRUE: "+", State.FALSE: "-", State.UNKNOWN: "?", State.CONTRADICTORY: "!"}
FREE_LINES = 20
SECONDS_BETWEEN_LINES = 10.0
RULES_IN_A_LINE = 6


class ConsoleSink:
    """Prints changes of state, and on a terminal a live line of progress.

    Args:
        stream: where to print; None: standard error.
        total_steps: number of steps that the run will have, for the percentage.
    """

    def __init__(self, stream: TextIO | None = None, total_steps: int | None = None) -> None:
        self._stream = stream
        self._total = total_steps

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        self._out = self._stream or sys.stderr
        self._live = self._out.isatty()
        self._told = np.full(len(run.schema.rules), State.UNKNOWN)
        self._lines = 0
        self._line_time = -np.inf
        self._first: Records | None = None
        self._last: Records | None = None

    @hookimpl
    def on_records(self, records: Records) -> None:
        if len(records) == 0:
            return
        before, self._last = self._last, records[-1:]
        self._first = self._first or records[:1]
        now = float(self._last.wall_time[0])
        since = abs(now - self._line_time)  # a clock set back silences nobody
        due = self._lines < FREE_LINES or since >= SECONDS_BETWEEN_LINES
        if due and (self._last.state[0] != self._told).any():
            self._print(_changes(self._last, self._told))
            self._told = self._last.state[0]
            self._lines += 1
            self._line_time = now
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._out.write("\r" + self._progress(before or self._first, self._last)[:width] + "\x1b[K")
            self._out.flush()

    @hookimpl
    def on_rewind(self, step: int) -> None:
        self._print(f"step {step:,}  rows from here on come again")

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        if self._first and self._last:
            self._print(f"ended at {self._progress(self._first, self._last)}")

    def _print(self, line: str) -> None:
        clear = "\r\x1b[K" if self._live else ""
        self._out.write(f"{clear}{plain(line)}\n")
        self._out.flush()

    def _progress(self, since: Records, last: Records) -> str:
        """One line about the row `last`; the speed is the mean since the row `since`."""
        step = int(last.step[0])
        told = f"step {step:,}"
        if self._total:
            told += f" of {self._total:,} ({(step + 1) / self._total:.0%})"
        seconds = float(last.wall_time[0] - since.wall_time[0])
        if seconds > 0:
            told += f"  {(step - int(since.step[0])) / seconds:.3g}/s"
        counts = [(int((last.state == state).sum()), state.name.lower()) for state in SIGNS]
        return "  ".join([told, *_loss(last), *(f"{count} {name}" for count, name in counts if count)])


def _changes(last: Records, told: np.ndarray) -> str:
    changed = np.flatnonzero(last.state[0] != told)
    words = []
    for rule in changed[:RULES_IN_A_LINE]:
        state = State(int(last.state[0, rule]))
        lower, upper = last.truth[0, rule]
        words.append(
            f"{SIGNS[state]}{last.schema.rules[rule].name} {state.name} [{_short(lower)}, {_short(upper)}]"
        )
    if len(changed) > len(words):
        words.append(f"and {len(changed) - len(words)} more")
    return "  ".join([f"step {int(last.step[0]):,}", *_loss(last), *words])


def _loss(last: Records) -> list[str]:
    return [f"loss {last.loss[0]:.4g}"] if "loss" in last.schema.signal_names else []


def _short(truth: float) -> str:
    """.87 rather than 0.87."""
    return f"{truth:.2f}".removeprefix("0")
