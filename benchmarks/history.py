"""A long history: what it takes on disk, and how long to open it, to read a rule and to draw it.

    python -m benchmarks.history [--rows 1000000] [--rules 6] [--layers 1] [--experts 8] [--rounds 3]

    live      as a run that goes on or was killed leaves it: declared far ahead
    closed    by the sink, at the end of the run
    xarray    `xarray.open_zarr(path)`, as those do who do not know this package
    truth     of one rule, both bounds, from a history that has just been opened
    a plot    each picture of `moe-rules plot`, from a history that has just been opened, without saving

Medians of the rounds, in seconds, with the files in the cache of the system.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr

from moe_rules_callback.history import open_history
from moe_rules_callback.plots import FIGURES
from moe_rules_callback.records import Run
from moe_rules_callback.sinks import ZarrSink

from .rows import Source

FLUSH, TOGETHER = 64, 2**14  # rows of a run's flush, which lay out the store, and rows that are written here


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    numbers = {"rows": 1_000_000, "rules": 6, "layers": 1, "experts": 8, "rounds": 3}
    for name, number in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    options = parser.parse_args()
    plt.switch_backend("agg")
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)
    source = Source(options.rules, options.layers, options.experts)
    run, store = Run(source.schema, flush_every=FLUSH), Path()
    with tempfile.TemporaryDirectory() as folder:
        sink = ZarrSink(store := Path(folder) / "audit.zarr")
        sink.on_train_start(run)
        for first in range(0, options.rows, TOGETHER):
            sink.on_records(source(first, min(TOGETHER, options.rows - first)))
        table = {"live": figures(store, options.rounds)}
        began = time.perf_counter()
        sink.on_train_end(run)
        closing = time.perf_counter() - began
        table["closed"] = figures(store, options.rounds)
        files = [path for path in store.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
    print(
        f"{options.rows:,} rows of {source.width}: {size / 2**20:.1f} MiB in {len(files):,} files; "
        f"closed in {closing:.2f} s"
    )
    print(f"{'seconds':18}" + "".join(f"{name:>10}" for name in table))
    for name in table["closed"]:
        print(f"{name:18}" + "".join(f"{column[name]:10.3f}" for column in table.values()))


def figures(store: Path, rounds: int) -> dict[str, float]:
    """Seconds of each way to read."""

    def truth() -> Any:
        history = open_history(store)
        return history.moe_rules[history.moe_rules.rules[-1]].values

    def drawing(plot: Callable[[xr.Dataset], Any]) -> Callable[[], Any]:
        def draw() -> None:
            plot(open_history(store))
            plt.close("all")

        return draw

    ways: dict[str, Callable[[], Any]] = {
        "open_history": lambda: open_history(store),
        "xarray": lambda: xr.open_zarr(store),
        "truth": truth,
        "verdicts": lambda: open_history(store).moe_rules.verdicts(),
        **{name: drawing(plot) for name, plot in FIGURES.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(times)) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
