"""A router array of one step, and what is computed of it token by token.

Every array here is as large as the router's own, so each is computed once, where it is needed, and nothing
is flattened or stacked: `statistics` reduces them to means over tokens.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

# A token's scores must sum to something between: s ln s of larger ones overflows float32, and parts of
# smaller ones are below what float32 holds.
LEAST, MOST = 1e-30, 1e36


@dataclass(frozen=True)
class Routers:
    """n layers that see T tokens, on one or more axes, and choose k of E experts.

    Attributes:
        names: of the layers, n.
        experts, k: E, and the number of experts a token uses (None: not known).
        given: float32 [n, T, E] probabilities or affinities as passed, or None.
        logits: float32 [n, T, E], or None.
        index: int [n, T, k], the experts that were used, or None.
        mask: bool [n, T], False for padding, or None.
    """

    names: tuple[str, ...]
    experts: int
    k: int | None
    given: jax.Array | None
    logits: jax.Array | None
    index: jax.Array | None
    mask: jax.Array | None

    @cached_property
    def scores(self) -> jax.Array:
        """float32 [n, T, E], as passed: probabilities, or affinities that need not sum to 1."""
        if self.given is not None:
            return self.given
        assert self.logits is not None
        return jax.nn.softmax(self.logits, axis=-1)

    @cached_property
    def total(self) -> jax.Array:
        """float32 [n, T], sum of a token's scores; NaN for a token with a negative, infinite or NaN
        entry, without any positive one, or with scores near the ends of float32."""
        total = self.scores.sum(-1)
        sound = (self.scores.min(-1) >= 0) & (total > LEAST) & (total < MOST)
        return jnp.where(sound, total, jnp.nan)

    @cached_property
    def probs(self) -> jax.Array:
        """float32 [n, T, E], scores normalised over experts, NaN where the total is."""
        return self.scores / self.total[..., None]

    @cached_property
    def highest(self) -> jax.Array:
        """float32 [n, T], each token's largest probability."""
        return self._peak / self.total

    @cached_property
    def best(self) -> jax.Array:
        """uint32 [n, T], each token's most probable expert, the first of several; E where a score is NaN.

        By two plain reductions: that of argmax, over pairs, costs several times as much.
        """
        return self._first(self.scores == self._peak[..., None])

    @cached_property
    def _peak(self) -> jax.Array:
        """float32 [n, T], each token's largest score."""
        return self.scores.max(-1)

    @cached_property
    def top1(self) -> jax.Array:
        """float32 [n, T, E], 1 at each token's most probable expert; NaN where the token is."""
        first = self._one(self.best)
        return jnp.where(jnp.isfinite(self.total)[..., None], first, jnp.nan)

    @cached_property
    def selected(self) -> jax.Array:
        """float32 [n, T, E], how often an expert is used: from `index`, else 1 for the k most probable.

        The most probable are found one after the other: `lax.top_k` gathers sharded tokens on CPU.
        An index outside 0..E-1 makes its token NaN.
        """
        if self.index is not None:
            return jnp.where(self.named[..., None], self._named(self.index, jnp.float32), jnp.nan)
        assert self.k is not None
        chosen, left = self.top1, self.scores
        for _ in range(self.k - 1):
            left = jnp.where(chosen > 0, -1.0, left)
            chosen = chosen + self._one(self._first(left == left.max(-1, keepdims=True)))
        return chosen

    @property
    def named(self) -> jax.Array:
        """bool [n, T], whether a token's indices all name an expert."""
        assert self.index is not None
        return (self.index.astype(jnp.uint32) < self.experts).all(-1)

    def _first(self, true: jax.Array) -> jax.Array:
        """uint32 [n, T], the first expert of which it is true; E where there is none."""
        return jnp.where(true, self._numbers, jnp.uint32(self.experts)).min(-1)

    def _one(self, index: jax.Array) -> jax.Array:
        """float32 [n, T, E], 1 at each token's expert."""
        return jax.nn.one_hot(index, self.experts, dtype=jnp.float32)

    def counts(self, index: jax.Array) -> jax.Array:
        """int32 [n, E], how often the tokens that are not masked name each expert; `index` int [n, T, j]."""
        if self.mask is not None:
            index = jnp.where(self.mask[..., None], index.astype(jnp.uint32), jnp.uint32(self.experts))
        return self._named(index, jnp.int32).sum(tuple(range(1, len(self.shape))))

    def _named(self, index: jax.Array, dtype: Any) -> jax.Array:
        """[n, T, E], how often a token names each expert; `index` int [n, T, j]."""
        # A sum of j terms, not over an axis: XLA then counts inside of what reads this, without writing it.
        index = index.astype(jnp.uint32)  # what is below 0 becomes large
        named = [(index[..., i, None] == self._numbers).astype(dtype) for i in range(index.shape[-1])]
        return functools.reduce(operator.add, named)

    @property
    def _numbers(self) -> jax.Array:
        """uint32 [E], 0..E-1. As int32, XLA would share them with the `top_k` of the model, which it then no
        longer recognises and makes a full sort on CPU."""
        return jnp.arange(self.experts, dtype=jnp.uint32)

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, *T)"""
        array = self.given if self.given is not None else self.logits
        assert array is not None
        return array.shape[:-1]

    @property
    def tokens(self) -> jax.Array:
        """float32 [n], tokens that are not masked."""
        if self.mask is None:
            return jnp.full(self.shape[0], math.prod(self.shape[1:]), jnp.float32)
        # Counted in integers: a sum of ones in float32 may stop at 2**24.
        return self.mask.sum(tuple(range(1, self.mask.ndim)), dtype=jnp.int32).astype(jnp.float32)

    def unmasked(self, per_token: jax.Array) -> jax.Array:
        """[n, T, ...] with 0 at the tokens that are masked."""
        if self.mask is None:
            return per_token
        mask = jnp.expand_dims(self.mask, tuple(range(self.mask.ndim, per_token.ndim)))
        return jnp.where(mask, per_token, 0)

    def mean(self, per_token: jax.Array) -> jax.Array:
        """Mean of [n, T, ...] over the tokens that are not masked: [n, ...]; NaN if none is left."""
        total = self.unmasked(per_token).sum(tuple(range(1, len(self.shape))))
        return total / jnp.expand_dims(self.tokens, tuple(range(1, total.ndim)))
