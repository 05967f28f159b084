"""What the audit adds to a step, in microseconds, for short and long steps, few and many layers and rules.

    python -m benchmarks.step_cost [--rounds 30] [--bare 1 5 50] [--sizes 1x8 32x64 61x256] [--files]

A step routes tokens through all layers and multiplies matrices until it lasts as long as asked. Loops take
turns, so that a machine whose speed drifts slows all alike; each is timed until its work is done:

    bare        the step alone
    again       the step alone, for the noise of the machine
    inside      the audit rides in the step: six rules (nano_moe), and a hundred
    beside      the step returns what its routers did and `on_step` gets it; likewise
    watched     `audit.watch(step)`, and `on_step` gets the loss
    device_get, clu, eager: what people do without this package, see `rivals`

`quiet` is the difference of the tenth percentiles of each loop's turns; the rest are those within rounds.
The floor is what the six rules must read at least, probabilities, indices and parameters once, over the
bandwidth of the memory.

With MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ of some gigabytes in the environment, glibc keeps the
blocks of a step for the next. Else it gives those above 32 MB back to the system, and their pages, new in
every step, cost more than what is computed in them.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from .loops import FLUSH, SIZES, Bench
from .turns import take_turns

TURN = 0.1  # seconds
QUIET = 0.1  # share of the turns in which other users of the machine are thought to be quiet


def seconds_a_step(run: Callable[[int], None], steps: int = 20) -> float:
    """The best of three turns."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run(steps)
        times.append((time.perf_counter() - began) / steps)
    return min(times)


def set_work(bench: Bench, seconds: float) -> None:
    """Choose `work` so that a bare step lasts as long as asked, or as little as it can."""
    run = bench.loops["bare"]
    bench.work = 0
    run(1)
    least = seconds_a_step(run)
    bench.work = 100
    unit = (seconds_a_step(run) - least) / 100
    bench.work = max(0, round((seconds - least) / unit))


def bandwidth() -> float:
    """Bytes a second that one program reads of an array of 256 MB."""
    array = jnp.ones((64, 2**20), jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    return array.nbytes / seconds_a_step(
        lambda n: [total(array).block_until_ready() for _ in range(n)][-1], 5
    )


def print_table(title: str, seconds: dict[str, np.ndarray]) -> None:
    """Added microseconds between the quiet turns and within each round, and the ratio to the bare step."""
    bare = seconds["bare"]
    print(f"\n{title}: bare {np.median(bare) * 1e3:.2f} ms")
    print(f"{'':12}{'added us: quiet':>16}{'median':>8}{'quartiles':>16}{'ratio':>8}")
    for name, times in seconds.items():
        if name != "bare":
            low, mid, high = np.quantile((times - bare) * 1e6, [0.25, 0.5, 0.75])
            quiet = (np.quantile(times, QUIET) - np.quantile(bare, QUIET)) * 1e6
            spread, ratio = f"{low:.0f} .. {high:.0f}", np.median(times / bare)
            print(f"{name:12}{quiet:16.0f}{mid:8.0f}{spread:>16}{ratio:8.3f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each size and length of a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--bare", type=float, nargs="+", default=[1, 5, 50], help="milliseconds")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="layers x experts")
    parser.add_argument("--loops", nargs="+", help="only these and the bare loop")
    parser.add_argument("--files", action="store_true", help="write TensorBoard files and histories too")
    options = parser.parse_args(arguments)
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)  # alerts are not the point here
    rate = bandwidth()
    print(f"{jax.devices()[0].device_kind}, {rate / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as logdir:
        for name in options.sizes:
            size = SIZES[name]
            bench = Bench(size, logdir if options.files else None)
            for milliseconds in options.bare:
                set_work(bench, milliseconds / 1e3)
                steps = max(FLUSH, round(TURN / (milliseconds / 1e3)))
                chosen = ["bare", *(options.loops or [n for n in bench.loops if n != "bare"])]
                seconds = take_turns({n: bench.loops[n] for n in chosen}, options.rounds, steps)
                title = f"{size.layers} layers, {size.experts} experts, {size.tokens} tokens"
                print_table(f"{title}, floor {size.bytes / rate * 1e6:.0f} us", seconds)
            bench.close()


if __name__ == "__main__":
    main()
