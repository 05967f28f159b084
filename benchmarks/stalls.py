"""How long a training thread is held up while sinks write: they share one Python interpreter.

    python -m benchmarks.stalls [--rules 6] [--layers 1] [--experts 8] [--rounds 10] [--seconds 2]

The training thread takes pieces of work of some 100 us: a loop in Python, and a dispatch to JAX for which it
does not wait. Every 64 ms, as of a step of 1 ms, 64 rows go to a thread of the sinks, unless that is busy.

    none                 nothing receives the rows
    zarr, tensorboard    the files of a `logdir`, one or the other
    both                 as they are by default

A piece is held up while its thread neither runs nor waits for a processor, as Linux counts it: other users
of the machine do not count, unless they keep the sinks' thread from its processor while that has the
interpreter. Loops take turns.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moe_rules_callback.records import Records, Run

from .rows import Source
from .sinks import SINKS

ROWS = 64
STEPS_A_SECOND = 1_000.0
WARM = 20  # flushes before those that count: imports, the first 1,000 rows
NAMES = ("none", "zarr", "tensorboard", "both")


class Writer:
    """A thread that hands records to sinks, as the delivery of the audit does."""

    def __init__(self, name: str, source: Source, place: Path) -> None:
        self._sinks = SINKS[name](place) if name in SINKS else []
        self._run, self._next, self._source = Run(source.schema), 0, source
        for sink in self._sinks:
            sink.on_train_start(self._run)
        self._queue: queue.Queue[Records | None] = queue.Queue()
        self._records = source(0, ROWS)
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def flush(self) -> None:
        """Hands over the next rows without waiting, unless the thread is busy."""
        if not self._queue.unfinished_tasks:
            self._queue.put(self._records)
            self._next += ROWS
            self._records = self._source(self._next, ROWS)

    def fill(self, flushes: int) -> None:
        """So many flushes, one after the other."""
        for _ in range(flushes):
            self.flush()
            self._queue.join()

    def close(self) -> None:
        """Waits until all is written."""
        self._queue.put(None)
        self._thread.join()
        for sink in self._sinks:
            sink.on_train_end(self._run)

    def _write(self) -> None:
        while (records := self._queue.get()) is not None:
            for sink in self._sinks:
                sink.on_records(records)
            self._queue.task_done()


def make_piece() -> Callable[[], None]:
    """Some 100 us of a trainer's Python and a dispatch."""
    step = jax.jit(lambda x: x + 1)
    holder = [step(jnp.zeros(8))]

    def piece() -> None:
        total = 0
        for i in range(1_500):
            total += i
        holder[0] = step(holder[0])

    return piece


def turn(piece: Callable[[], None], writer: Writer, seconds: float, period: float) -> np.ndarray:
    """Seconds that each piece of a turn is held up."""
    status = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    held, end = [], time.perf_counter() + seconds
    due = before = time.perf_counter()
    ran = busy(status)
    while before < end:
        if before >= due:
            writer.flush()
            due = before + period
            before, ran = time.perf_counter(), busy(status)
        piece()
        before, began, ran, ran_before = time.perf_counter(), before, busy(status), ran
        held.append(max(0.0, before - began - (ran - ran_before)))
    os.close(status)
    return np.array(held)


def busy(status: int) -> float:
    """Seconds that this thread has run or waited for a processor."""
    return time.thread_time() + 1e-9 * int(os.pread(status, 64, 0).split()[1])


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, number in (("rules", 6), ("layers", 1), ("experts", 8), ("rounds", 10)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    options = parser.parse_args()
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)
    source = Source(options.rules, options.layers, options.experts, STEPS_A_SECOND)
    piece, period = make_piece(), ROWS / STEPS_A_SECOND
    held: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as folder:
        writers = {}
        for name in NAMES:
            (place := Path(folder) / name).mkdir()
            writers[name] = Writer(name, source, place)
            writers[name].fill(WARM)
        for _ in range(options.rounds):
            for name, writer in writers.items():
                held[name].append(turn(piece, writer, options.seconds, period))
        for writer in writers.values():
            writer.close()
    print(
        f"{source.width}, {options.rounds} turns of {options.seconds:g} s; ms that a piece is held up, "
        "and of all pieces in 1,000"
    )
    print(f"{'':12}{'p50':>8}{'p99':>8}{'p99.9':>8}{'max':>8}{'of 1,000: median':>20}{'quartiles':>16}")
    for name, turns in held.items():
        pieces = 1e3 * np.concatenate(turns)
        figures = "".join(f"{each:8.2f}" for each in np.quantile(pieces, [0.5, 0.99, 0.999, 1]))
        share = [1e3 * times.sum() / options.seconds for times in turns]
        low, middle, high = np.quantile(share, [0.25, 0.5, 0.75])
        print(f"{name:12}{figures}{middle:20.1f}{f'{low:.1f} .. {high:.1f}':>16}")


if __name__ == "__main__":
    main()
