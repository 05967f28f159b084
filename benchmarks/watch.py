"""What `audit.watch` adds to a training step, as a ratio within one run, and what one delivery costs.

    python -m benchmarks.watch [--rules nano_moe] [--layers 8] [--rounds 30] [--steps 16] [--cpu]

The model is scanned and rematerialised. Loops take turns:

    bare      the step
    again     the step, for the noise of the machine
    callback  the step with an empty `jax.debug.callback`, the least that anything costs inside a jitted step
    loss      the step whose loss is watched, with `on_step` and files
    step      the jitted step itself watched, likewise: statistics are further results, without a callback

A turn ends when its rows are done; rows that fill no block of 16 cost more. `--cpu` counts processor time
of all threads instead of wall time, for a machine with other users.

Then microseconds of one delivery; the tenth is nearer to what a quiet machine takes than the median:

    callback  on the runtime's thread, while the device waits: a function that delivers, less one without
    row       on the watch thread, beside the step: the arrays made a row, and the row audited alone
    block     likewise, in a block, for each of its rows
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.tracing.watch import _send, watch
from moe_rules_callback.watched import BLOCK, Watched

from .moe import TOP_K, WIDTH, loss_of, parameters, scanned, unrolled
from .turns import print_ratios, take_turns

BATCH, TIME = 2, 256
DELIVERIES = 320
PARTS = ("callback", "row", "block")


def settle(audit: RuleAuditCallback) -> None:
    """Wait for rows without sending them to the sinks before their time, as `flush` would."""
    if audit._watched is not None:
        audit._watched.settle(lambda: None, time.monotonic() + 60)
    if audit._outgoing is not None:
        audit._outgoing.wait(time.monotonic() + 60)
        jax.block_until_ready(jax.tree.leaves(audit._outgoing.latest))


def runner(
    layers: int, audit: RuleAuditCallback | None = None, watched: str = "", callback: bool = False
) -> Callable[[int], None]:
    """Takes so many steps of gradient descent, of which nothing, the loss or the step is watched."""
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, WIDTH))
    loss_fn = loss_of(scanned)
    if audit and watched == "loss":
        loss_fn = audit.watch(loss_fn)

    def step(params: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, x)
        if callback:
            jax.debug.callback(lambda loss: None, loss)
        return jax.tree.map(lambda p, g: p - 1e-3 * g, params, grads), loss

    jitted = jax.jit(step, donate_argnums=0)
    if audit and watched == "step":
        jitted = audit.watch(jitted)
    holder = [parameters(layers)]

    def run(steps: int) -> None:
        for _ in range(steps):
            holder[0], loss = jitted(holder[0], x)
            if audit is not None:
                audit.on_step({"loss": loss})
        jax.block_until_ready(holder[0])
        if audit is not None:
            settle(audit)

    if audit is not None:
        run(1)  # alone, so that what is compiled next is a block
    return run


def deliveries(rules: str, layers: int, model: Any, clock: Callable[[], float]) -> dict[str, np.ndarray]:
    """Microseconds of the parts of a delivery."""
    args, loss_fn, given = (parameters(layers), jnp.ones((1, 1, WIDTH))), loss_of(model), []
    with RuleAuditCallback(rules, top_k=TOP_K) as audit:
        watched = watch(
            loss_fn, ask=audit.audit.statistics, deliver=lambda *of: given.append(of), top_k=TOP_K
        )
        jax.block_until_ready(jax.jit(jax.grad(watched))(*args))
        jax.effects_barrier()
        reduced, arrays = given[0]

        def sending(arrays: Any) -> Any:
            _send(lambda _: None, arrays)
            return 2 * arrays[0]

        functions = {"plain": jax.jit(lambda arrays: 2 * arrays[0]), "sending": jax.jit(sending)}
        rows = {"row": Watched(1, audit._take, 1), "block": Watched(1, audit._take)}

        def call(name: str) -> None:
            jax.block_until_ready(functions[name](arrays))
            jax.effects_barrier()

        def feed(name: str, n: int) -> None:
            for _ in range(n):
                rows[name].deliver(reduced, arrays)
                rows[name].hook({"loss": 1.0}, None)
            rows[name].settle(lambda: None, time.monotonic() + 60)
            jax.block_until_ready(jax.tree.leaves(audit._outgoing and audit._outgoing.latest))

        feed("block", 1)
        calls = {name: lambda _, name=name: call(name) for name in functions}
        feeds = {name: lambda n, name=name: feed(name, n) for name in rows}
        seconds = take_turns(calls, DELIVERIES, 1, clock) | take_turns(
            feeds, DELIVERIES // BLOCK, BLOCK, clock
        )
        for each in rows.values():
            each.settle(lambda: None, 60, ending=True)
    parts = {"callback": seconds["sending"] - seconds["plain"], **{name: seconds[name] for name in rows}}
    return {name: 1e6 * each for name, each in parts.items()}


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rules", default="nano_moe")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=16, help="steps a turn")
    parser.add_argument("--cpu", action="store_true", help="processor time in the place of wall time")
    options = parser.parse_args()
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)  # alerts are not the point here
    layers = options.layers
    with (
        tempfile.TemporaryDirectory() as logdir,
        RuleAuditCallback(options.rules, top_k=TOP_K, logdir=f"{logdir}/loss") as loss,
        RuleAuditCallback(options.rules, top_k=TOP_K, logdir=f"{logdir}/step") as step,
    ):
        runs = {
            "bare": runner(layers),
            "again": runner(layers),
            "callback": runner(layers, callback=True),
            "loss": runner(layers, loss, "loss"),
            "step": runner(layers, step, "step"),
        }
        clock = time.process_time if options.cpu else time.perf_counter
        seconds = take_turns(runs, options.rounds, options.steps, clock)
    title = f"{options.rules}, {layers} layers, {options.rounds} rounds of {options.steps} steps"
    print_ratios(title + (", processor time" if options.cpu else ""), seconds)
    print(f"\n{'us a delivery':16}" + "".join(f"{f'{name}: tenth':>16}{'median':>8}" for name in PARTS))
    for model in (scanned, unrolled):
        parts = deliveries(options.rules, layers, model, clock)
        figures = (np.quantile(parts[name], [0.1, 0.5]) for name in PARTS)
        print(
            f"{f'{layers} {model.__name__}':16}" + "".join(f"{low:16.0f}{mid:8.0f}" for low, mid in figures)
        )


if __name__ == "__main__":
    main()
