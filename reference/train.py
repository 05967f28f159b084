"""Train a Nano-MoE on one machine or many, with the audit inside the training step.

    python -m reference.train                                     # about two minutes on two CPU cores
    python -m reference.train --steps 200 --no-audit              # the same model, nothing watched
    python -m reference.train --dataset tinyshakespeare --experts 4 --width 256

    result = train(Config(steps=200, logdir="runs/demo"))         # in a program

The loop knows the audit in three places, marked AUDIT: it is made, it rides in the step, it is drained.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from moe_rules_callback import MoeRulesError, RuleAuditCallback
from moe_rules_callback.plots import plot_audit

from . import figures, report
from .config import Config, ConfigError, from_command_line
from .data import DataError, load_corpus
from .model import GPT, Routing, balancing_loss, z_loss

State = dict[str, Any]  # "learner": model and optimizer; "key"; "validation_loss"; "audit", if there is one
SCALARS = ("loss", "validation_loss", "balancing_loss", "z_loss", "dropped_token_fraction",
           "router_gradient_norm", "routing_accuracy", "domain_specialisation")  # fmt: skip
AHEAD = 8  # steps that the host may be ahead of the devices


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
    history: Path | None


def create(config: Config) -> tuple[nnx.GraphDef, State]:
    """A fresh model with its optimizer: the static part, and the arrays."""
    peak, warmup = config.learning_rate, min(config.warmup, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps, end_value=peak / 10)
    matrices = functools.partial(jax.tree.map, lambda a: a.ndim > 1)  # no decay on the scales of the norms
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay, mask=matrices)
    model = GPT(config, nnx.Rngs(config.seed))
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), adamw), wrt=nnx.Param)
    graphdef, learner = nnx.split((model, optimizer))
    key = jax.random.key(config.seed + 1)
    return graphdef, {"learner": learner, "key": key, "validation_loss": jnp.float32(jnp.nan)}


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over [B, T] in nats, from logits [B, T, V]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def learn(
    state: State,
    tokens: jax.Array,
    domain: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    config: Config,
    domains: int,
) -> tuple[State, dict[str, Any]]:
    """One step: the new state, and every metric that an audit may want.

    tokens [B, T + 1], domain [B]. A metric that nobody reads costs nothing: under jit it is never computed.
    """

    def loss_fn(model: GPT) -> tuple[jax.Array, Any]:
        logits, routings = model(tokens[:, :-1], noise)
        loss = cross_entropy(logits, tokens[:, 1:])
        balance = jnp.stack([balancing_loss(r) for r in routings]).mean()
        z = jnp.stack([z_loss(r) for r in routings]).mean()
        total = loss + config.balance_weight * balance + config.z_weight * z
        return total, ({"loss": loss, "balancing_loss": balance, "z_loss": z}, routings)

    model, optimizer = nnx.merge(graphdef, state["learner"])
    key, noise = jax.random.split(state["key"])  # fresh noise at every step
    (_, (losses, routings)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)

    tables = count_choices(routings, domain, config, domains)  # [layers, k, domains, E]
    routers = [block["moe"]["router"]["kernel"][...] for block in grads["blocks"].values()]  # each [D, E]
    metrics = {
        **losses,
        "validation_loss": state["validation_loss"],  # the last one measured
        "dropped_token_fraction": jnp.stack([r.dropped for r in routings]).mean(),
        "router_gradient_norm": jnp.stack([jnp.linalg.norm(g) for g in routers]).min(),
        "routing_accuracy": jax.vmap(figures.routing_accuracy)(tables).mean(),
        "domain_specialisation": jax.vmap(figures.domain_specialisation)(tables).mean(),
        "router_probs": [r.probs for r in routings],
        "router_logits": [r.logits for r in routings],
        "expert_index": [r.expert_index for r in routings],
        "params": nnx.state(model, nnx.Param),
        "grads": grads,
    }
    return {**state, "learner": nnx.state((model, optimizer)), "key": key}, metrics


def make_step(graphdef: nnx.GraphDef, config: Config, domains: int, audit: Any = None) -> Callable:
    """The pure function (state, tokens, domain) -> (state, scalars), with or without an audit in it.

    Not jitted yet; whoever jits it may donate the state.
    """

    def step(state: State, tokens: jax.Array, domain: jax.Array) -> tuple[State, dict[str, jax.Array]]:
        new, metrics = learn(state, tokens, domain, graphdef=graphdef, config=config, domains=domains)
        if audit is not None:
            new["audit"] = audit.update(state["audit"], metrics)  # AUDIT: it rides in the step
        return new, {name: metrics[name] for name in SCALARS}

    return step


def make_evaluation(graphdef: nnx.GraphDef, config: Config, domains: int) -> Callable:
    """The pure function (learner, tokens, domain) -> (loss, `count_choices`), without noise."""

    def evaluation(learner: nnx.State, tokens: jax.Array, domain: jax.Array) -> tuple[jax.Array, jax.Array]:
        model, _ = nnx.merge(graphdef, learner)
        logits, routings = model(tokens[:, :-1])
        return cross_entropy(logits, tokens[:, 1:]), count_choices(routings, domain, config, domains)

    return evaluation


def count_choices(routings: list[Routing], domain: jax.Array, config: Config, domains: int) -> jax.Array:
    """`figures.tally` of every layer, [layers, k, domains, E]; domain [B] is that of each sequence."""
    by_token = jnp.repeat(domain, config.context)  # [N]
    return jnp.stack([figures.tally(r.expert_index, by_token, domains, config.experts) for r in routings])


def train(config: Config, say: Callable[[str], object] = print) -> Result:
    """Train as configured, tell `say` about it, and leave the audit's files in `config.logdir`.

    Raises:
        DataError: the text cannot be had or is too short.
        ConfigError: the batch cannot be shared among the devices.
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

    def draw(held_out: bool = False) -> list[jax.Array]:
        share = corpus.batch(rng, config.batch // jax.process_count(), config.context, held_out=held_out)
        return [jax.make_array_from_process_local_data(shared, array) for array in share]

    held_out = [draw(held_out=True) for _ in range(config.eval_batches)]

    # The model, a copy on every device.
    domains = len(corpus.domains)
    graphdef, state = jax.jit(create, static_argnums=0, out_shardings=everywhere)(config)
    parameters = sum(array.size for array in jax.tree.leaves(nnx.merge(graphdef, state["learner"])[0]))
    say(report.introduction(config, corpus, parameters))

    audit = verdicts = None
    if config.audit:  # AUDIT: it is made, and shown the shapes of the metrics
        verdicts, settings = report.Verdicts(), dataclasses.asdict(config)
        audit = RuleAuditCallback(
            config.rules, logdir=config.logdir, signals=SCALARS, plugins=[verdicts], config=settings
        )
        look = functools.partial(learn, graphdef=graphdef, config=config, domains=domains)
        _, metrics = jax.eval_shape(look, state, *held_out[0])
        state["audit"] = jax.jit(lambda: audit.init(metrics), out_shardings=everywhere)()

    step = jax.jit(make_step(graphdef, config, domains, audit), donate_argnums=0, out_shardings=everywhere)
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
            state, scalars = step(state, *draw())
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
