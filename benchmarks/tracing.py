"""How long tracing takes for a Mixture of Experts that is unrolled or scanned.

    python -m benchmarks.tracing [--layers 60] [--rounds 5] [--cpu]

    make_jaxpr    of the loss
    discover      finding the routers in that jaxpr
    bare          tracing the training step, forward and backward: what comes before the compiler
    tap, watch    tracing it with the loss tapped or watched

Medians of interleaved rounds, in seconds; with `--cpu` of processor time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.tracing import tap
from moe_rules_callback.tracing.arguments import Arguments
from moe_rules_callback.tracing.discovery import discover
from moe_rules_callback.tracing.program import Program

from .moe import TOP_K, WIDTH, loss_of, parameters, scanned, unrolled
from .turns import take_turns


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu", action="store_true", help="processor time in the place of wall time")
    options = parser.parse_args()
    clock = time.process_time if options.cpu else time.perf_counter
    columns = {
        model.__name__: figures(model, options.layers, options.rounds, clock) for model in (unrolled, scanned)
    }
    print(f"{options.layers} layers, {options.rounds} rounds, {jax.devices()[0].device_kind}; seconds")
    print(f"{'':12}" + "".join(f"{name:>12}" for name in columns))
    for name in columns["scanned"]:
        print(f"{name:12}" + "".join(f"{column[name]:12.3f}" for column in columns.values()))


def figures(model: Any, layers: int, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each part."""
    args = parameters(layers), jnp.ones((2, 16, WIDTH))
    loss_fn = loss_of(model)
    arguments = Arguments(loss_fn, args, {})
    program = Program.of(loss_fn, arguments)

    def making(_: int) -> None:
        jax.make_jaxpr(lambda *x: loss_fn(*x))(*args)  # a new function each time: jax remembers old ones

    def discovering(_: int) -> None:
        discover(program)

    def tracing(step: Callable[..., Any]) -> Callable[[int], None]:
        def run(_: int) -> None:
            jax.jit(lambda *x: step(*x)).trace(*args)

        return run

    with RuleAuditCallback("nano_moe", top_k=TOP_K) as audit:
        runs = {
            "make_jaxpr": making,
            "discover": discovering,
            "bare": tracing(jax.value_and_grad(loss_fn)),
            "tap": tracing(jax.value_and_grad(tap(loss_fn), has_aux=True)),
            "watch": tracing(jax.value_and_grad(audit.watch(loss_fn))),
        }
        seconds = take_turns(runs, rounds, 1, clock)
    return {name: float(np.median(times)) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
