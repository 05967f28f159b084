"""What sinks add to a training step that is audited beside: flushes run while the next steps do.

    python -m benchmarks.while_writing [--bare 1 5] [--layers 4] [--experts 8] [--rounds 30] [--cpu]

A step multiplies matrices until it lasts as long as asked, in milliseconds, and `on_step` gets its loss and
the probabilities of routers. Loops take turns of 128 steps; flushes go off after the 32nd and the 96th, so
that steps go on beside them. A turn ends when its steps are done and the rows of its flushes are written.

    memory               no files: the history stays in memory
    again                the same, for the noise of the machine
    zarr, tensorboard    files of one kind
    both                 as they are by default with a `logdir`

Ratios are to `memory`, within each round. `--cpu` counts processor time of all threads instead of wall time,
for a machine with other users: what writing costs, but not what waits for it.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from moe_rules_callback import RuleAuditCallback

from .turns import print_ratios, take_turns

STEPS, FLUSH, SIDE, TOKENS, TOP_K = 128, 64, 128, 64, 2
LOOPS = {
    "memory": (),
    "again": (),
    "zarr": ("zarr",),
    "tensorboard": ("tensorboard",),
    "both": ("zarr", "tensorboard"),
}


def make_step(milliseconds: float) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    """A jitted step of about this length: x -> x, loss."""

    def stepping(times: int) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
        def step(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            x = jax.lax.fori_loop(0, times, lambda _, y: jnp.tanh(y @ y), x)
            return x, x.mean()

        return jax.jit(step)

    def lasts(step: Callable[..., Any], calls: int = 20) -> float:
        jax.block_until_ready(step(x))
        began = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(step(x))
        return 1e3 * (time.perf_counter() - began) / calls

    x, times = jnp.eye(SIDE), 64
    return stepping(max(1, round(times * milliseconds / lasts(stepping(times)))))


def runner(step: Callable[..., Any], audit: RuleAuditCallback, probs: Any) -> Callable[[int], None]:
    """Takes so many steps."""
    holder = [jnp.eye(SIDE)]

    def run(steps: int) -> None:
        for _ in range(steps):
            holder[0], loss = step(holder[0])
            audit.on_step({"loss": loss, "router_probs": probs, "params": probs})
        jax.block_until_ready(holder)
        if audit._outgoing is not None:
            jax.block_until_ready(jax.tree.leaves(audit._outgoing.latest))
            audit._outgoing.wait(time.monotonic() + 60)

    run(FLUSH // 2)
    return run


def main() -> None:
    """Print a table for each length of the step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--bare", type=float, nargs="+", default=[1.0, 5.0], help="milliseconds of the step")
    for name, number in (("layers", 4), ("experts", 8), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=number)
    parser.add_argument("--rules", default="nano_moe")
    parser.add_argument("--cpu", action="store_true", help="processor time in the place of wall time")
    options = parser.parse_args()
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)
    clock = time.process_time if options.cpu else time.perf_counter
    shape = (options.layers, TOKENS, options.experts)
    probs = list(jax.nn.softmax(jax.random.normal(jax.random.key(0), shape)))
    for milliseconds in options.bare:
        step, audits = make_step(milliseconds), {}
        with tempfile.TemporaryDirectory() as folder:
            for name, sinks in LOOPS.items():
                audits[name] = RuleAuditCallback(
                    options.rules, top_k=TOP_K, sinks=sinks, logdir=Path(folder) / name, flush_every=FLUSH
                )
            runs = {name: runner(step, audit, probs) for name, audit in audits.items()}
            seconds = take_turns(runs, options.rounds, STEPS, clock)
            for audit in audits.values():
                audit.close()
        size = f"{options.rules}, {options.layers} layers, {options.experts} experts"
        what = "processor time" if options.cpu else "wall time"
        print_ratios(f"{size}, step of {milliseconds:g} ms, {what}", seconds)


if __name__ == "__main__":
    main()
