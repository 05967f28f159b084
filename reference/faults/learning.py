"""A learner that obeys knobs: `learn` of the plain trainer, with `state["knobs"]` deciding what goes wrong.

With healthy knobs it learns what the plain learner learns.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from moe_rules_callback.probes import RouterProbe

from .. import learning as plain
from ..config import Config
from ..learning import State, losses_of, metrics_of, total
from ..model import GPT, MoE, Routing, balancing_loss
from .knobs import OFF, Knobs


class Turned(nnx.Variable):
    """Knobs, in the state of a model."""


class FaultyMoE(MoE):
    """Experts whose router goes wrong as the knobs say."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike):
        super().__init__(config, rngs, dtype)
        self.turned = Turned(Knobs())
        if not hasattr(self.turned, "get_value"):
            raise ImportError("planted faults need Flax 0.12.1 or later: pip install -U flax")

    @property
    def knobs(self) -> Knobs:
        return self.turned.get_value()

    def score(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        logits = jnp.where(self.knobs.noise_off, super().score(x, None), super().score(x, key))
        bfloat16 = jax.lax.reduce_precision(logits, exponent_bits=8, mantissa_bits=7)
        logits = self.knobs.logit_scale * jnp.where(self.knobs.low_precision, bfloat16, logits)
        return logits.at[:, 0].add(self.knobs.expert_bias)

    def choose(self, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate, expert_index = super().choose(probs)
        renormalised = gate / gate.sum(axis=-1, keepdims=True)
        gate = jnp.where(self.knobs.gate_renormalised, renormalised, gate)
        gate = jnp.where(self.knobs.gate_ignored, 1.0, gate)
        return gate, (expert_index + self.knobs.index_shift) % self.config.experts

    def place(self, expert_index: jax.Array, capacity: int) -> jax.Array:
        slot = super().place(expert_index, capacity)
        fair = expert_index.size / self.config.experts
        served = slot % capacity < self.knobs.capacity_factor * fair
        return jnp.where(served, slot, self.config.experts * capacity)


def _scale(updates: Any, state: Any, params: Any = None, **knobs: Any) -> tuple[Any, Any]:
    return jax.tree.map(lambda update: knobs["factor"] * update, updates), state


def create(config: Config) -> tuple[nnx.GraphDef, State]:
    """As in the plain trainer, with healthy knobs in the state and nothing probed."""
    last = optax.GradientTransformationExtraArgs(optax.identity().init, _scale)
    graphdef, state = plain.create(config, FaultyMoE, last)
    return graphdef, {**state, "knobs": jax.tree.map(jnp.asarray, Knobs())}


def learn(
    state: State,
    tokens: jax.Array,
    domain: jax.Array,
    *,
    graphdef: nnx.GraphDef,
    config: Config,
    domains: int,
    probe: RouterProbe | None = None,
) -> tuple[State, dict[str, Any]]:
    """One step of the plain learner, gone wrong; tokens [B, T + 1], domain [B].

    A probe is given the model and key of the step; its state is `state["probe"]`.
    """
    knobs: Knobs = state["knobs"]

    def loss_fn(model: GPT) -> tuple[jax.Array, Any]:
        logits, routings = model(tokens[:, :-1], noise)
        losses = losses_of(logits, targets, routings)
        pooled = balancing_loss(_as_one(routings))
        losses["balancing_loss"] = jnp.where(knobs.balance_pooled, pooled, losses["balancing_loss"])
        weighted = {**losses, "balancing_loss": knobs.balance * losses["balancing_loss"]}
        return total(weighted, config), (losses, routings)

    model, optimizer = nnx.merge(graphdef, state["learner"])
    turn(model, knobs)
    for block in model.blocks:
        for kernel in (block.moe.experts.w_in, block.moe.experts.w_out):
            kernel[...] = jnp.where(knobs.experts_merged, kernel[...][:1], kernel[...])
    key, fresh = jax.random.split(state["key"])
    noise = jnp.where(knobs.noise_frozen, jax.random.key(0), fresh)
    targets = tokens[:, 1:]
    shuffled = jax.random.permutation(noise, targets.reshape(-1)).reshape(targets.shape)
    targets = jnp.where(knobs.labels_shuffled, shuffled, targets)
    state = {**state, "key": key}
    told: dict[str, Any] = {"validation_loss": state["validation_loss"]}
    if probe is not None:
        weights = nnx.state((model, optimizer))
        state["probe"], scalars = probe.update(state["probe"], optimizer.step[...], weights, noise)
        told |= scalars
    (_, (losses, routings)), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, factor=knobs.learning_rate)

    metrics = metrics_of(losses, routings, grads, model, domain, config=config, domains=domains)
    metrics["loss"] *= knobs.loss_told
    for name in ("balancing_loss", "dropped_token_fraction"):
        metrics[name] *= knobs.counters_told
    return {**state, "learner": nnx.state((model, optimizer))}, metrics | told


def _as_one(routings: list[Routing]) -> Routing:
    """The tokens of all layers as those of one."""
    join = functools.partial(jnp.concatenate, axis=0)
    logits, probs, expert_index, dropped = zip(*routings, strict=True)
    return Routing(join(logits), join(probs), join(expert_index), jnp.stack(dropped).mean())


def turn(model: GPT, knobs: Knobs) -> None:
    """Sets the knobs of all routers of a model."""
    for block in model.blocks:
        assert isinstance(block.moe, FaultyMoE)
        block.moe.turned.set_value(knobs)


def make_probe(graphdef: nnx.GraphDef, config: Config, tokens: ArrayLike, reference: Any) -> RouterProbe:
    """A probe of the learner's routers on tokens [B, T]; `reference` is a learner."""

    def route(learner: nnx.State, key: Any, **exact: Any) -> list[jax.Array]:
        model, _ = nnx.merge(graphdef, learner, copy=True)  # its knobs are turned
        turn(model, model.blocks[0].moe.knobs._replace(**exact))
        return [routing.logits for routing in model(tokens, key)[1]]

    return RouterProbe(
        route,
        top_k=config.top_k,
        exact=functools.partial(route, low_precision=OFF),
        reference=reference,
    )
