"""A Nano-MoE: a GPT whose feed-forward layers are Mixtures of Experts.

    model = GPT(config, nnx.Rngs(0))
    logits, routings = model(tokens)               # [B, T, 256], one Routing a layer
    logits, routings = model(tokens, key)          # in training: `key` adds noise to the router

Shapes: B sequences, T tokens each, N = B T, D width, H heads, E experts, k experts a token, F hidden
units of an expert, C places of an expert, G groups.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from .config import Config
from .data import VOCABULARY

Linear = functools.partial(nnx.Linear, use_bias=False, kernel_init=nnx.initializers.normal(0.02))
Norm = functools.partial(nnx.LayerNorm, use_bias=False)


class Routing(NamedTuple):
    """What the router of one layer did with N tokens."""

    logits: jax.Array  # float32 [N, E]
    probs: jax.Array  # float32 [N, E]
    expert_index: jax.Array  # int32 [N, k], best first
    dropped: jax.Array  # float32 [], share of the N k assignments that found their expert full


class Attention(nnx.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike):
        out_init = nnx.initializers.normal(0.02 / math.sqrt(2 * config.layers))
        self.heads = config.heads
        self.qkv = Linear(config.width, 3 * config.width, dtype=dtype, rngs=rngs)
        self.out = Linear(config.width, config.width, kernel_init=out_init, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        B, T, D = x.shape
        q, k, v = jnp.split(self.qkv(x).reshape(B, T, 3 * self.heads, -1), 3, axis=2)  # each [B, T, H, D/H]
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # [B, T, H, D/H]
        return self.out(y.reshape(B, T, D))


class MoE(nnx.Module):
    """Every token goes through its k best experts, each weighted by its routing probability."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike):
        self.config, self.dtype = config, dtype
        E, D = config.experts, config.width
        self.router = Linear(D, E, dtype=jnp.float32, rngs=rngs)
        self.experts = Experts(config, rngs, dtype)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        B, T, D = x.shape
        N, E, k, G = B * T, self.config.experts, self.config.top_k, self.config.groups or 1

        logits = self.score(x.reshape(N, D), key)  # [N, E]
        probs = probabilities(logits, self.config.gate)  # [N, E]
        gate, expert_index = self.choose(probs)  # [N, k] each

        # Each group of n tokens fills places of its own, so that no device waits for another's tokens.
        n = N // G
        capacity = min(n, math.ceil(self.config.capacity_factor * n * k / E))
        x, choice = x.reshape(G, n, D).astype(self.dtype), expert_index.reshape(G, n, k)
        slot = jax.vmap(functools.partial(self.place, capacity=capacity))(choice)  # [G, n, k]
        inbox = jax.vmap(functools.partial(scatter, places=E * capacity))(x, slot)  # [G, E C, D]
        outbox = self.experts(inbox.reshape(G, E, capacity, D)).reshape(G, E * capacity, D)
        y = jax.vmap(gather)(outbox, slot, gate.reshape(G, n, k)).reshape(B, T, D)
        dropped = jnp.mean(slot == E * capacity, dtype=jnp.float32)
        return y, Routing(logits, probs, expert_index, dropped)

    def score(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """Logits [N, E] of tokens x [N, D]."""
        # The router is small and decides everything: float32, whatever the rest computes in.
        logits = self.router(x.astype(jnp.float32))
        if key is not None:
            logits += self.config.router_noise * jax.random.normal(key, logits.shape)
        return logits

    def choose(self, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The k best experts of each token, best first: their weights and their indices, [N, k] each."""
        # The probabilities are not renormalised over the k chosen: with k = 1 that would make every
        # gate 1 and leave the router without a gradient.
        gate, expert_index = jax.lax.top_k(probs, self.config.top_k)
        return gate, expert_index

    def place(self, expert_index: jax.Array, capacity: int) -> jax.Array:
        """The place of each assignment of a group, see `assign`: int32 [n, k]."""
        return assign(expert_index, self.config.experts, capacity)


class Experts(nnx.Module):
    """E two-layer perceptrons, stacked."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike):
        E, D, F = config.experts, config.width, config.expert_width
        self.dtype = dtype
        self.w_in = nnx.Param(nnx.initializers.normal(D**-0.5)(rngs.params(), (E, D, F)))
        self.w_out = nnx.Param(nnx.initializers.normal(F**-0.5)(rngs.params(), (E, F, D)))

    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = jax.nn.gelu(jnp.einsum("gecd,edf->gecf", x, self.w_in[...].astype(self.dtype)))
        return jnp.einsum("gecf,efd->gecd", hidden, self.w_out[...].astype(self.dtype))  # [G, E, C, D]


def probabilities(logits: jax.Array, gate: str) -> jax.Array:
    """Softmax, or sigmoids divided by their sum over the experts: [N, E]."""
    return jax.nn.softmax(jax.nn.log_sigmoid(logits) if gate == "sigmoid" else logits)


def assign(expert_index: jax.Array, experts: int, capacity: int) -> jax.Array:
    """The place of each assignment among the E * capacity places: int32 [n, k] from expert_index [n, k].

    First come, first served: earlier tokens before later ones, so that no token can push out one before
    it and the model stays causal. Who finds the expert full is dropped: slot E * capacity, which is nowhere.
    """
    choice = expert_index.reshape(-1)  # [n k]
    queue = jnp.cumsum(jax.nn.one_hot(choice, experts, dtype=jnp.int32), axis=0)  # [n k, E]
    place = jnp.take_along_axis(queue, choice[:, None], axis=1)[:, 0] - 1  # [n k], in the expert's queue
    slot = jnp.where(place < capacity, choice * capacity + place, experts * capacity)
    return slot.reshape(expert_index.shape)


def scatter(x: jax.Array, slot: jax.Array, places: int) -> jax.Array:
    """Tokens x [n, D], each copied to its k slots [n, k]: [places, D], zero where nobody came."""
    n, k = slot.shape
    copies = jnp.broadcast_to(x[:, None], (n, k, x.shape[1]))  # [n, k, D]
    return jnp.zeros((places, x.shape[1]), x.dtype).at[slot].set(copies, mode="drop")


def gather(outbox: jax.Array, slot: jax.Array, gate: jax.Array) -> jax.Array:
    """The gated sum [n, D] of what the experts left in a token's slots; a dropped assignment adds nothing."""
    y = outbox.at[slot].get(mode="fill", fill_value=0)  # [n, k, D]
    return jnp.einsum("nkd,nk->nd", y, gate.astype(y.dtype))


def balancing_loss(routing: Routing) -> jax.Array:
    """E * sum_e share_e * probability_e, 1 at uniform routing (Fedus et al. 2021, equation 4)."""
    E = routing.probs.shape[-1]
    share = jax.nn.one_hot(routing.expert_index, E).mean(axis=(0, 1))  # [E], of the assignments
    return E * jnp.sum(share * routing.probs.mean(axis=0))


def z_loss(routing: Routing) -> jax.Array:
    """Mean of logsumexp(logits)^2: keeps router logits small (Zoph et al. 2022, equation 5)."""
    return jnp.mean(jax.nn.logsumexp(routing.logits, axis=-1) ** 2)


class Block(nnx.Module):
    """Attention, then experts, each on a normalised copy of the residual stream."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike, moe: type[MoE]):
        self.norm1 = Norm(config.width, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, rngs, dtype)
        self.norm2 = Norm(config.width, dtype=dtype, rngs=rngs)
        self.moe = moe(config, rngs, dtype)

    def __call__(self, x: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, Routing]:
        x = x + self.attention(self.norm1(x))
        y, routing = self.moe(self.norm2(x), key)
        return x + y, routing


class GPT(nnx.Module):
    """Bytes in, logits of the next byte out.

    `dtype` is what the matrix products compute in, by default bfloat16 on an accelerator and float32
    on a CPU; parameters, the residual stream, routers and logits are float32 always. `moe` is what the
    feed-forward layers are made of.
    """

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: DTypeLike | None = None, moe: type[MoE] = MoE):
        compute = dtype or (jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
        init = nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(VOCABULARY, config.width, embedding_init=init, rngs=rngs)
        self.positions = nnx.Embed(config.context, config.width, embedding_init=init, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs, compute, moe) for _ in range(config.layers)])
        self.norm = Norm(config.width, dtype=compute, rngs=rngs)
        self.head = Linear(config.width, VOCABULARY, dtype=compute, rngs=rngs)

    def __call__(self, tokens: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, list[Routing]]:
        _, T = tokens.shape
        x = self.tokens(tokens) + self.positions(jnp.arange(T))  # [B, T, D]
        routings = []
        for i, block in enumerate(self.blocks):
            x, routing = block(x, None if key is None else jax.random.fold_in(key, i))
            routings.append(routing)
        return self.head(self.norm(x)).astype(jnp.float32), routings  # [B, T, 256]
