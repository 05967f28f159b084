"""What the audit costs before the first step: importing the package, and compiling rules.

    python -m benchmarks.startup [--rounds 5]

Imports are timed in new processes, one after the other in turns. Rules ride in a step of a model with 1 layer
of 8 experts and one with 32 of 64; tracing and compiling are timed together, without JAX's cache on disk.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_rules_callback import Audit

from .loops import SIZES, WIDTH, Size, learn, many, start

IMPORTS = ("jax", "moe_rules_callback")


def import_seconds(module: str) -> float:
    """In a new process, less what starting Python takes."""
    program = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return float(done.stdout)


def compile_seconds(size: Size, rules: Any) -> float:
    """Of a step without an audit (None) or with one."""
    state = start(size)
    x = jnp.zeros((size.tokens, WIDTH))
    audit = None if rules is None else Audit(rules, layer_axis=0)
    if audit is not None:
        state |= {"audit": audit.init(jax.eval_shape(learn, state, x, 0)[1])}

    def step(state: Any, x: jax.Array) -> Any:
        new, metrics = learn(state, x, jnp.int32(0))
        return {**new, "audit": audit.update(state["audit"], metrics)} if audit is not None else new

    began = time.perf_counter()
    jax.jit(step).lower(state, x).compile()
    return time.perf_counter() - began


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)  # what is left out is not the point here
    jax.config.update("jax_enable_compilation_cache", False)

    imports = np.array([[import_seconds(name) for name in IMPORTS] for _ in range(rounds)])
    print(f"{'import':24}{'median s':>10}")
    for name, seconds in zip(IMPORTS, imports.T, strict=True):
        print(f"{name:24}{np.median(seconds):10.2f}")

    books = {"no audit": None, "nano_moe": "nano_moe", "router_health": "router_health"}
    books |= {f"{n:,} rules": many(n) for n in (100, 1000)}
    print(f"\n{'compile, median s':24}" + "".join(f"{name:>10}" for name in ("1x8", "32x64")))
    for title, rules in books.items():
        sizes = (SIZES["1x8"], SIZES["32x64"])
        seconds = [np.median([compile_seconds(size, rules) for _ in range(rounds)]) for size in sizes]
        print(f"{title:24}" + "".join(f"{each:10.2f}" for each in seconds))


if __name__ == "__main__":
    main()
