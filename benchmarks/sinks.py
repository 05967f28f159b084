"""What a flush of 64 rows costs each sink, at the beginning of a run and late in it.

    python -m benchmarks.sinks [--rules 6] [--layers 1] [--experts 8] [--flushes 1000] [--sinks zarr ..]

    zarr, tensorboard, both    the files of a `logdir`, as they are by default
    memory                     the history of a run without one
    clu                        a CLU writer: `TensorBoardXWriter`, since CLU's own needs TensorFlow
    console                    lines of text, to nowhere

Sinks take turns, flush by flush. A figure is the median of the 20 flushes that end with the one named. The
make-believe run takes 200 steps a second, of which TensorBoard gets its first 1,000 and then 20 a second.
Figures are of wall time, with what the disk takes, and of processor time, of all threads. TMPDIR=/dev/shm
leaves the disk out.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe_rules_callback.records import Run
from moe_rules_callback.sinks import CluSink, ConsoleSink, TensorBoardSink, TensorBoardXWriter, ZarrSink
from moe_rules_callback.sinks.memory import MemorySink

from .rows import Source

MEDIAN_OF, ROWS = 20, 64
SINKS: dict[str, Callable[[Path], list[Any]]] = {
    "zarr": lambda where: [ZarrSink(where / "audit.zarr")],
    "tensorboard": lambda where: [TensorBoardSink(where)],
    "both": lambda where: [ZarrSink(where / "audit.zarr"), TensorBoardSink(where)],
    "memory": lambda where: [MemorySink()],
    "clu": lambda where: [CluSink(TensorBoardXWriter(where))],
    "console": lambda where: [ConsoleSink((where / "console.txt").open("w"))],
}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name, number in (("rules", 6), ("layers", 1), ("experts", 8), ("flushes", 1_000)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--sinks", nargs="+", choices=SINKS, default=list(SINKS))
    options = parser.parse_args()
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)
    source = Source(options.rules, options.layers, options.experts)
    marks = [mark for mark in (10, 1_000, 100_000) if mark < options.flushes] + [options.flushes]
    with tempfile.TemporaryDirectory() as folder:
        places = {name: Path(folder) / name for name in options.sinks}
        seconds = flush(source, places, options.flushes)
        sizes = {name: sum(file.stat().st_size for file in at.rglob("*")) for name, at in places.items()}
    print(f"{source.width}; ms a flush: wall, processor")
    heads = "".join(f"{f'flush {mark:,}':>18}" for mark in marks)
    print(f"{'':12}{heads}{'mean':>18}{'rows/s':>11}{'bytes a row':>13}")
    for name, times in seconds.items():
        spans = [slice(max(0, mark - MEDIAN_OF), mark) for mark in marks]
        middles = [1e3 * np.median(times[span], axis=0) for span in spans] + [1e3 * times.mean(axis=0)]
        figures = "".join(f"{wall:10.2f}{cpu:8.2f}" for wall, cpu in middles)
        rate, size = ROWS / times[:, 0].mean(), sizes[name] / (options.flushes * ROWS)
        print(f"{name:12}{figures}{rate:11,.0f}{size:13.1f}")


def flush(source: Source, places: dict[str, Path], flushes: int) -> dict[str, np.ndarray]:
    """Seconds of each flush, [flushes, 2] of wall and processor time, by the name of the sink."""
    run = Run(source.schema, flush_every=ROWS)
    sinks: dict[str, list[Any]] = {}
    for name, place in places.items():
        place.mkdir()
        sinks[name] = SINKS[name](place)
    seconds = {name: np.zeros((flushes, 2)) for name in sinks}
    every = [sink for some in sinks.values() for sink in some]
    for sink in every:
        if hasattr(sink, "on_train_start"):
            sink.on_train_start(run)
    for number in range(flushes):
        records = source(number * ROWS, ROWS)
        for name, some in sinks.items():
            began = time.perf_counter(), time.process_time()
            for sink in some:
                sink.on_records(records)
            ended = time.perf_counter(), time.process_time()
            seconds[name][number] = np.subtract(ended, began)
    for sink in every:
        if hasattr(sink, "on_train_end"):
            sink.on_train_end(run)
    return seconds


if __name__ == "__main__":
    main()
