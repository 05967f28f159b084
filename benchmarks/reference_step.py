"""What the audit adds to a step of the reference trainer, as a ratio within one run.

    python -m benchmarks.reference_step [--rules nano_moe] [--rounds 30] [--steps 20]

Three loops take turns:

    bare      the training step alone
    inside    the audit rides in the step and is drained after it
    beside    the step returns its losses and what its routers did, and `on_step` gets them; rules over
              parameters are left out, since a step that donates them would have to return a copy

Each turn is timed until all of its work, the audit's included, is done on the device.
"""

from __future__ import annotations

import argparse
import functools
import logging
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moe_rules_callback import RuleAuditCallback
from reference.config import Config
from reference.data import load_corpus
from reference.train import create, learn, make_step

from .turns import print_ratios, take_turns


def loops(
    config: Config, logdir: str
) -> tuple[dict[str, Callable[[int], None]], tuple[RuleAuditCallback, ...]]:
    """Name -> function that takes so many steps, and the callbacks to close after use."""
    corpus = load_corpus(config.dataset)
    domains = len(corpus.domains)
    rng = np.random.default_rng(0)
    batches = [corpus.batch(rng, config.batch, config.context) for _ in range(16)]
    graphdef, start = jax.jit(create, static_argnums=0)(config)
    look = functools.partial(learn, graphdef=graphdef, config=config, domains=domains)

    def runner(take: Callable[[Any, Any], Any], state: Any) -> Callable[[int], None]:
        holder = [jax.tree.map(lambda array: array.copy(), state)]

        def run(steps: int) -> None:
            for i in range(steps):
                holder[0] = take(holder[0], batches[i % len(batches)])
            jax.block_until_ready(holder[0])

        return run

    bare_step = jax.jit(make_step(graphdef, config, domains), donate_argnums=0)

    def bare(state: Any, batch: Any) -> Any:
        return bare_step(state, *batch)[0]

    inside = RuleAuditCallback(config.rules, logdir=f"{logdir}/inside")
    _, metrics = jax.eval_shape(look, start, *batches[0])
    audited_step = jax.jit(make_step(graphdef, config, domains, inside), donate_argnums=0)

    def ride(state: Any, batch: Any) -> Any:
        state, _ = audited_step(state, *batch)
        inside.drain(state)
        return state

    beside = RuleAuditCallback(config.rules, logdir=f"{logdir}/beside")
    reads = ("loss", "router_probs", "expert_index")

    @functools.partial(jax.jit, donate_argnums=0)
    def returning(state: Any, tokens: Any, domain: Any) -> tuple[Any, dict[str, Any]]:
        new, metrics = look(state, tokens, domain)
        return new, {key: metrics[key] for key in reads}

    def walk(state: Any, batch: Any) -> Any:
        state, metrics = returning(state, *batch)
        beside.on_step(metrics)
        return state

    runs = {
        "bare": runner(bare, start),
        "inside": runner(ride, {**start, "audit": inside.init(metrics)}),
        "beside": runner(walk, start),
    }
    return runs, (inside, beside)


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rules", default="nano_moe")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=20, help="steps a turn")
    options = parser.parse_args()
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)  # alerts are not the point here
    with tempfile.TemporaryDirectory() as logdir:
        runs, audits = loops(Config(rules=options.rules), logdir)
        seconds = take_turns(runs, options.rounds, options.steps)
        for audit in audits:
            audit.close()
    print_ratios(f"{options.rules}, {options.rounds} rounds of {options.steps} steps", seconds)


if __name__ == "__main__":
    main()
