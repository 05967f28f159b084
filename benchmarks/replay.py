"""How fast rules are evaluated over steps that are past, and how fast a log of them is read.

    python -m benchmarks.replay [--rows 1000000] [--singly 5000]

    replay     rules over a table of five metrics: the loss and four signals by name
    row by row the same, each row handed to `on_step`, as a script without `replay` would do it
    log        a file of JSON lines with these five: read, then judged by nano_moe, and the history written

A replay is timed with its compilation, since it happens once; row by row without.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.records import Run
from moe_rules_callback.replay import Replay
from moe_rules_callback.runs import read_recording
from moe_rules_callback.sinks import ZarrSink

METRICS = ("loss", "router_entropy", "routing_confidence", "expert_imbalance", "weight_norm")
FIRST = 100  # rows before those that are timed one by one
WRITTEN = 4_096  # rows that `moe-rules replay` writes together


def hundred() -> dict[str, str]:
    """A hundred rules over the five metrics, no two the same."""
    words = [f"{how}_{name}" for name in METRICS[1:] for how in ("high", "low", "increasing", "decreasing")]
    pairs = [(a, b) for i, a in enumerate(words) for b in words[i + 1 :]]
    return {f"rule_{i:03d}": f"0.8 :: {a} & ~{b}" for i, (a, b) in enumerate(pairs[:100])}


def table(rows: int) -> dict[str, np.ndarray]:
    """Make-believe metrics, float32 [rows] each."""
    random, progress = np.random.default_rng(0), np.linspace(0, 1, rows)
    ends = dict(zip(METRICS, (1.5, 0.6, 0.7, 0.1, 40.0), strict=True))
    starts = dict(zip(METRICS, (4.0, 0.9, 0.2, 0.3, 10.0), strict=True))
    return {
        name: (starts[name] + (ends[name] - starts[name]) * progress + noise).astype(np.float32)
        for name, noise in zip(METRICS, 0.01 * random.normal(size=(len(METRICS), rows)), strict=True)
    }


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--singly", type=int, default=5_000, help="rows that are evaluated one by one")
    options = parser.parse_args()
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)
    metrics = table(options.rows)
    print(f"{options.rows:,} rows of {len(METRICS)} metrics, {jax.devices()[0].device_kind}")
    print(f"{'':32}{'rows':>12}{'seconds':>10}{'rows/s':>12}")
    for name, rules in (("nano_moe", "nano_moe"), ("router_health", "router_health"), ("", hundred())):
        count, replayed = replaying(metrics, rules)
        told = f"{name}, {count} rules" if name else f"{count} rules"
        show(f"replay {told}", options.rows, replayed)
        show(f"row by row {told}", options.singly, singly(metrics, rules, options.singly))
    for name, seconds in log(metrics).items():
        show(f"log {name}", options.rows, seconds)


def show(name: str, rows: int, seconds: float) -> None:
    """One line."""
    print(f"{name:32}{rows:12,}{seconds:10.2f}{rows / seconds:12,.0f}")


def replaying(metrics: dict[str, np.ndarray], rules: Any) -> tuple[int, float]:
    """Number of rules, and seconds until all rows are judged."""
    began = time.perf_counter()
    replay = Replay(metrics, rules, top_k=2)
    for _ in replay:
        pass
    return len(replay.audit.schema.rules), time.perf_counter() - began


def singly(metrics: dict[str, np.ndarray], rules: Any, rows: int) -> float:
    """Seconds of so many calls of `on_step`, until all rows have arrived."""
    began = 0.0
    with RuleAuditCallback(rules, top_k=2) as audit:
        for row in range(FIRST + rows):
            if row == FIRST:
                audit.flush()
                began = time.perf_counter()
            audit.on_step({name: values[row] for name, values in metrics.items()})
        audit.flush()
        return time.perf_counter() - began


def log(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """Seconds of what `moe-rules replay` does with a file of JSON lines."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log.jsonl"
        columns = zip(*(values.tolist() for values in metrics.values()), strict=True)
        with path.open("w") as file:
            for step, row in enumerate(columns):
                file.write(json.dumps({"step": step} | dict(zip(METRICS, row, strict=True))) + "\n")
        times = [time.perf_counter()]
        recording = read_recording(path)
        times.append(time.perf_counter())
        replay = recording.replay("nano_moe")
        batches = list(replay)
        times.append(time.perf_counter())
        sink, run = ZarrSink(), Run(replay.audit.schema, Path(folder), flush_every=WRITTEN)
        sink.on_train_start(run)
        for records in batches:
            sink.on_records(records)
        sink.on_train_end(run)
        times.append(time.perf_counter())
    return dict(zip(("read", "judged", "written"), np.diff(times), strict=True))


if __name__ == "__main__":
    main()
