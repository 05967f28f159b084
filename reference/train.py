"""Train a Nano-MoE on one machine or many, with the audit inside the training step.

    python -m reference.train                                     # about two minutes on two CPU cores
    python -m reference.train --steps 200 --no-audit              # the same model, nothing watched
    python -m reference.train --dataset tinyshakespeare --experts 4 --width 256
    python -m reference.train --fault dead_expert --fault-step 300

    result = train(Config(steps=200, logdir="runs/demo"))         # in a program

The loop knows the audit in three places, marked AUDIT: it is made, it rides in the step (see `learning`), it
is drained.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from moe_rules_callback import MoeRulesError, RuleAuditCallback
from moe_rules_callback.paths import AnyPath
from moe_rules_callback.plots import plot_audit

from . import figures, report
from .config import Config, ConfigError, from_command_line
from .data import DataError, load_corpus
from .faults import learning as faulty
from .faults.injection import Injection
from .learning import SCALARS, create, learn, make_evaluation, make_step

AHEAD = 8  # steps that the host may be ahead of the devices
FLUSH_EVERY = 16  # steps after which alerts are told


@dataclass(frozen=True)
class Result:
    """What a run leaves behind.

    Attributes:
        losses: cross-entropy of every step in nats a byte, float32 [steps].
        validation: loss on held-out text, by the number of steps taken before.
        figures: the numbers printed at the end, by name.
        history: the zarr store that the audit wrote; None without an audit.
    """

    losses: np.ndarray
    validation: dict[int, float]
    figures: dict[str, float]
    history: AnyPath | None


def train(config: Config, say: Callable[[str], object] = print) -> Result:
    """Train as configured, tell `say` about it, and leave the audit's files in `config.logdir`.

    Raises:
        DataError: the text cannot be had or is too short.
        ConfigError: the batch cannot be shared among the devices, or there is no such fault.
    """
    if config.distributed:
        jax.distributed.initialize()
    if jax.process_index() > 0:
        say = str  # one process speaks for all
    devices = jax.device_count()
    config = dataclasses.replace(config, groups=config.groups or devices)
    if config.batch % devices or config.batch % config.groups:
        raise ConfigError(
            f"A batch of {config.batch} sequences cannot be shared evenly among {devices} devices and "
            f"{config.groups} groups. Choose a --batch that is a multiple of both."
        )
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))
    everywhere, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    # The text. Every process draws its own share of a batch; the held-out batches stay the same.
    corpus = load_corpus(config.dataset, config.text)
    rng = np.random.default_rng([config.seed, jax.process_index()])
    injection = Injection(config, corpus) if config.fault else None
    config = injection.config if injection else config

    def draw(source: Callable = corpus.batch, **which: Any) -> list[jax.Array]:
        share = source(rng, config.batch // jax.process_count(), config.context, **which)
        return [jax.make_array_from_process_local_data(shared, array) for array in share]

    held_out = [draw(held_out=True) for _ in range(config.eval_batches)]

    # The model, a copy on every device.
    domains = len(corpus.domains)
    begin, advance = (faulty.create, faulty.learn) if injection else (create, learn)
    graphdef, state = jax.jit(begin, static_argnums=0, out_shardings=everywhere)(config)
    parameters = sum(array.size for array in jax.tree.leaves(nnx.merge(graphdef, state["learner"])[0]))
    say(report.introduction(config, corpus, parameters))

    audit = verdicts = None
    if config.audit:  # AUDIT: it is made, and shown the shapes of the metrics
        verdicts, settings = report.Verdicts(), dataclasses.asdict(config)
        audit = RuleAuditCallback(
            config.rules,
            logdir=config.logdir,
            signals=SCALARS,
            plugins=[verdicts],
            flush_every=FLUSH_EVERY,
            config=settings,
        )
        look = functools.partial(advance, graphdef=graphdef, config=config, domains=domains)
        _, metrics = jax.eval_shape(look, state, *held_out[0])
        state["audit"] = jax.jit(lambda: audit.init(metrics), out_shardings=everywhere)()

    pure = make_step(graphdef, config, domains, audit, advance)
    step = jax.jit(pure, donate_argnums=0, out_shardings=everywhere)
    evaluation = jax.jit(make_evaluation(graphdef, config, domains), out_shardings=everywhere)

    def validate() -> tuple[jax.Array, jax.Array]:
        measured = [evaluation(state["learner"], *batch) for batch in held_out]
        losses, tables = zip(*measured, strict=True)
        return jnp.stack(losses).mean(), jnp.stack(tables).sum(axis=0)

    started = time.perf_counter()
    state["validation_loss"], tables = validate()
    losses, scalars, validation = [], {}, {0: float(state["validation_loss"])}
    with audit or nullcontext():
        for i in (bar := tqdm(range(config.steps), unit="step", disable=None)):
            if injection:
                state, batch = {**state, "knobs": injection.knobs(i)}, draw(injection.batch, step=i)
            else:
                batch = draw()
            state, scalars = step(state, *batch)
            if audit:
                audit.drain(state)  # AUDIT: finished rows go to the host, which waits for nothing
            losses.append(scalars["loss"])
            if i >= AHEAD:
                losses[i - AHEAD] = float(losses[i - AHEAD])  # the host runs ahead, but not far
            if (i + 1) % config.eval_every == 0 or i + 1 == config.steps:
                state["validation_loss"], tables = validate()
                validation[i + 1] = float(state["validation_loss"])
            if (i + 1) % config.log_every == 0:
                if audit:
                    audit.flush()  # so that what is printed about the rules belongs to this step
                with bar.external_write_mode():
                    say(report.progress(i + 1, scalars["loss"], state["validation_loss"], verdicts))
    seconds = time.perf_counter() - started

    unigram, bigram = figures.text_entropy(corpus.validation)
    numbers = {
        "seconds": seconds,
        "validation_loss": validation[config.steps],
        "unigram_entropy": unigram,
        "bigram_entropy": bigram,
        **{name: float(scalars[name]) for name in ("router_gradient_norm", "dropped_token_fraction")},
        **figures.of_routing(tables),
    }
    say(report.conclusion(numbers, config, domains))
    history = None
    if audit and (history := audit.path):
        picture = history.with_suffix(".png")
        plot_audit(audit.history, picture)
        figures.write_affinity(history.with_name("router_affinity_matrix.csv"), tables, corpus.domains)
        say(f"wrote {history} and {picture}")
        say(f"to see more: moe-rules report {config.logdir}, or tensorboard --logdir {config.logdir}")
    return Result(np.array(losses, np.float32), validation, numbers, history)


def main() -> None:
    """The command line."""
    try:
        train(from_command_line())
    except (ConfigError, DataError, MoeRulesError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
