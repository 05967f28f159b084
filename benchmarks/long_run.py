"""Memory, threads, open files and files on disk over a long run with all sinks: all but the last stay flat.

    python -m benchmarks.long_run [--steps 100000] [--rules nano_moe] [--tokens 64]

The audit stands beside a loop that does nothing else, so rows come as fast as they can be evaluated. What
Linux counts for this process is printed at powers of ten and half-way; what waits for the sinks is written
first.
"""

from __future__ import annotations

import argparse
import logging
import os
import tempfile
import threading
from pathlib import Path

import jax
import numpy as np

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.sinks import ConsoleSink

MIB = 2**20
FIRST = 1_000


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--rules", default="nano_moe")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)
    probs = jax.nn.softmax(jax.random.normal(jax.random.key(0), (options.tokens, 8)))
    params = {"router": {"kernel": probs}}
    loss = np.random.default_rng(0).normal(2, 0.1, options.steps + 1).astype(np.float32)
    marks = {FIRST * 10**power for power in range(9)} | {options.steps // 2, options.steps}
    print(f"{options.rules}, {options.tokens} tokens, 8 experts")
    print(f"{'steps':>10}{'resident MiB':>14}{'threads':>9}{'open files':>12}{'files':>8}{'MiB on disk':>13}")
    with (
        tempfile.TemporaryDirectory() as logdir,
        open(os.devnull, "w") as nowhere,
        RuleAuditCallback(
            options.rules, logdir=logdir, top_k=2, sinks=["zarr", "tensorboard", ConsoleSink(nowhere)]
        ) as audit,
    ):
        for step in range(1, options.steps + 1):
            audit.on_step({"loss": loss[step], "router_probs": probs, "params": params})
            if step % FIRST == 0:
                audit.flush()
            if step in marks:
                files = [path for path in Path(logdir).rglob("*") if path.is_file()]
                size = sum(path.stat().st_size for path in files) / MIB
                print(
                    f"{step:10,}{resident() / MIB:14.1f}{threading.active_count():9}"
                    f"{len(os.listdir('/proc/self/fd')):12}{len(files):8,}{size:13.1f}"
                )


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
