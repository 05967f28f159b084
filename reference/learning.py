"""One step of learning: the pure functions that the trainer jits.

    graphdef, state = create(config)                       # a fresh model with its optimizer
    state, metrics = learn(state, tokens, domain, graphdef=graphdef, config=config, domains=3)

`make_step` makes the function of a trainer of it, with the audit inside if there is one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from . import figures
from .config import Config
from .model import GPT, MoE, Routing, balancing_loss, z_loss

State = dict[str, Any]  # "learner": model and optimizer; "key"; "validation_loss"; "audit", if there is one
SCALARS = ("loss", "validation_loss", "balancing_loss", "z_loss", "dropped_token_fraction",
           "router_gradient_norm", "routing_accuracy", "domain_specialisation")  # fmt: skip


def create(
    config: Config, moe: type[MoE] = MoE, last: optax.GradientTransformation | None = None
) -> tuple[nnx.GraphDef, State]:
    """A fresh model with its optimizer: the static part, and the arrays.

    `moe` is what its feed-forward layers are made of; `last` is applied to the optimizer's updates.
    """
    peak, warmup = config.learning_rate, min(config.warmup, config.steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, config.steps, end_value=peak / 10)
    matrices = functools.partial(jax.tree.map, lambda a: a.ndim > 1)  # no decay on the scales of the norms
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=config.weight_decay, mask=matrices)
    model = GPT(config, nnx.Rngs(config.seed), moe=moe)
    chain = optax.chain(optax.clip_by_global_norm(1.0), adamw, last or optax.identity())
    optimizer = nnx.Optimizer(model, chain, wrt=nnx.Param)
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
        losses = losses_of(logits, tokens[:, 1:], routings)
        return total(losses, config), (losses, routings)

    model, optimizer = nnx.merge(graphdef, state["learner"])
    key, noise = jax.random.split(state["key"])  # fresh noise at every step
    (_, (losses, routings)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)

    metrics = metrics_of(losses, routings, grads, model, domain, config=config, domains=domains)
    metrics["validation_loss"] = state["validation_loss"]  # the last one measured
    return {**state, "learner": nnx.state((model, optimizer)), "key": key}, metrics


def losses_of(logits: jax.Array, targets: jax.Array, routings: list[Routing]) -> dict[str, jax.Array]:
    """The task's loss, and the auxiliary losses as means over layers; logits [B, T, V], targets [B, T]."""
    return {
        "loss": cross_entropy(logits, targets),
        "balancing_loss": jnp.stack([balancing_loss(r) for r in routings]).mean(),
        "z_loss": jnp.stack([z_loss(r) for r in routings]).mean(),
    }


def total(losses: dict[str, jax.Array], config: Config) -> jax.Array:
    """What is minimised."""
    auxiliary = config.balance_weight * losses["balancing_loss"] + config.z_weight * losses["z_loss"]
    return losses["loss"] + auxiliary


def metrics_of(
    losses: dict[str, jax.Array],
    routings: list[Routing],
    grads: Any,
    model: GPT,
    domain: jax.Array,
    *,
    config: Config,
    domains: int,
) -> dict[str, Any]:
    """Every metric of a step; domain [B] is that of each sequence."""
    tables = count_choices(routings, domain, config, domains)  # [layers, k, domains, E]
    routers = [block["moe"]["router"]["kernel"][...] for block in grads["blocks"].values()]  # each [D, E]
    return {
        **losses,
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


def make_step(
    graphdef: nnx.GraphDef, config: Config, domains: int, audit: Any = None, learn: Callable = learn
) -> Callable:
    """The pure function (state, tokens, domain) -> (state, scalars), with or without an audit in it.

    Not jitted yet; whoever jits it may donate the state. `learn` takes the place of the function `learn`.
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
