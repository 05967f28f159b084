"""What routers choose on the same tokens, and how two such choices differ; for `probes`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from .routers import Routers


def scores_of(routers: Routers) -> jax.Array:
    """float32 [n, T, E], the scores as `route` gave them."""
    assert routers.given is not None
    return routers.given


def rounded(x: jax.Array) -> jax.Array:
    """The same; what XLA would otherwise leave out of a conversion to bfloat16 and back is done."""
    precision = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, precision.nexp, precision.nmant)


def shapes_of(routers: list[Routers]) -> dict[str, tuple[int, ...]]:
    """Layer -> shape [*T, E]."""
    return {name: scores_of(each).shape[1:] for each in routers for name in each.names}


def choose(scores: jax.Array, k: int) -> jax.Array:
    """int32 [.., k], the k largest of [.., E], the first of equals first; -1 for a token with NaN or inf.

    One after the other, as in `Routers.selected`, but of the scores themselves: a softmax makes new ties.
    """
    left = jnp.maximum(scores, jnp.finfo(jnp.float32).min)  # a masked expert comes before one that is taken
    chosen: list[jax.Array] = []
    for _ in range(k):
        best = jnp.argmax(left, axis=-1)
        left = jnp.where(jax.nn.one_hot(best, scores.shape[-1], dtype=bool), -jnp.inf, left)
        chosen.append(best.astype(jnp.int32))
    sound = (scores < jnp.inf).all(-1, keepdims=True)
    return jnp.where(sound, jnp.stack(chosen, axis=-1), -1)


def disagreement(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> jax.Array:
    """float32 [layers], the share of the experts in a that b lacks; NaN where one of them is not known."""

    def of_layers(a: jax.Array, b: jax.Array) -> jax.Array:
        lacking = (a[..., :, None] != b[..., None, :]).all(-1)
        known = (a >= 0) & (b >= 0)
        return jnp.where(known, lacking, jnp.nan).mean(tuple(range(1, a.ndim)))

    return jnp.concatenate([of_layers(*layers) for layers in zip(a, b, strict=True)])


def noise_of(noisy: jax.Array, clean: jax.Array) -> jax.Array:
    """float32 [T, E], what noise adds to log-probabilities, centred per token.

    Centring takes away the normalisation, so that logits need no softmax. Masked experts have no noise.
    """
    probabilities = jnp.minimum(noisy.min(), clean.min()) >= 0
    noisy, clean = (jnp.where(probabilities, jnp.log(x), x) for x in (noisy, clean))
    added = jnp.where((noisy == -jnp.inf) | (clean == -jnp.inf), 0.0, noisy - clean)
    return added - added.mean(-1, keepdims=True)


def correlation(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 [], of two arrays whose mean is 0; NaN where one of them is 0 throughout."""
    return (a * b).sum() / (jnp.sqrt(jnp.square(a).sum()) * jnp.sqrt(jnp.square(b).sum()))
