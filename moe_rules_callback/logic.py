"""Weighted Lukasiewicz logic on truth intervals (Riegel et al. 2020, "Logical Neural Networks").

A truth interval is the last axis of an array: x[..., 0] is its lower, x[..., 1] its upper bound. Every
connective, with its weights, is one clamped affine map

    clamp(bias + sum_i coefficient_i * (x_i - corner_i), 0, 1)

taken bound by bound: an operand with a positive coefficient gives its own bound, one with a negative
coefficient (it is negated) its opposite bound. That is what makes a hundred rules as cheap as one:
`program` stacks the coefficients of all rules and evaluates them together. The corner, of zeros and ones,
is where the bias alone is the value, so that classical truth is exact whatever the weights.

    a = jnp.array([0.9, 0.95]); b = jnp.array([0.2, 0.3])
    conjunction(a, negation(b))          # [0.6, 0.75]

beta is 1 throughout. 0 <= L <= U <= 1 in gives 0 <= L <= U <= 1 out; a contradictory input (L > U)
propagates bound by bound.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def coefficients(kind: str, weights: Sequence[float]) -> tuple[float, tuple[float, ...], tuple[float, ...]]:
    """Bias, coefficients and corner of "not", "and", "or", "nand", "nor" or "implies".

    With beta = 1, section 3 of Riegel et al.: and is 1 - sum w_i (1 - x_i), or is sum w_i x_i.
    """
    w = tuple(float(weight) for weight in weights)
    zeros, ones = (0.0,) * len(w), (1.0,) * len(w)
    match kind:
        case "not":
            return 1.0, (-1.0,), zeros
        case "and":
            return 1.0, w, ones
        case "or":
            return 0.0, w, zeros
        case "nand":  # 1 - and, with the clamp taken through
            return 0.0, tuple(-x for x in w), ones
        case "nor":
            return 1.0, tuple(-x for x in w), zeros
        case "implies":  # (~a) | b
            return 0.0, (-w[0], w[1]), (1.0, 0.0)
    raise ValueError(f"no connective is called {kind!r}")


def affine(bias: ArrayLike, coefficient: ArrayLike, corner: ArrayLike, x: jax.Array) -> jax.Array:
    """clamp(bias + sum_i coefficient_i (x_i - corner_i)) of intervals x [..., i, 2], bound by bound.

    `bias` [...], `coefficient` and `corner` [..., i] broadcast against x without its last one and two axes.
    """
    own = jnp.maximum(coefficient, 0)[..., None] * (x - jnp.asarray(corner)[..., None])
    opposite = jnp.minimum(coefficient, 0)[..., None] * (x[..., ::-1] - jnp.asarray(corner)[..., None])
    # One term after the other, not a sum over an axis: XLA then adds where it computes them.
    terms = jnp.unstack(own + opposite, axis=-2)
    return jnp.clip(jnp.asarray(bias)[..., None] + functools.reduce(operator.add, terms), 0, 1)


def _connect(kind: str, operands: Sequence[ArrayLike], weights: Sequence[float] | None) -> jax.Array:
    x = jnp.stack(jnp.broadcast_arrays(*map(jnp.asarray, operands)), axis=-2)
    bias, coefficient, corner = coefficients(kind, weights or (1.0,) * len(operands))
    return affine(bias, np.array(coefficient, np.float32), np.array(corner, np.float32), x)


def negation(a: ArrayLike) -> jax.Array:
    """~a, [1 - U, 1 - L]."""
    return _connect("not", (a,), None)


def conjunction(*operands: ArrayLike, weights: Sequence[float] | None = None) -> jax.Array:
    """a & b & ..., clamp(1 - sum w_i (1 - x_i)) on each bound."""
    return _connect("and", operands, weights)


def disjunction(*operands: ArrayLike, weights: Sequence[float] | None = None) -> jax.Array:
    """a | b | ..., clamp(sum w_i x_i) on each bound."""
    return _connect("or", operands, weights)


def negated_conjunction(*operands: ArrayLike, weights: Sequence[float] | None = None) -> jax.Array:
    """a !& b, ~(a & b)."""
    return _connect("nand", operands, weights)


def negated_disjunction(*operands: ArrayLike, weights: Sequence[float] | None = None) -> jax.Array:
    """a !| b, ~(a | b)."""
    return _connect("nor", operands, weights)


def implication(a: ArrayLike, b: ArrayLike, weight: float = 1.0) -> jax.Array:
    """a ->[weight] b, (~a) | weight*b."""
    return _connect("implies", (a, b), (1.0, weight))


def equivalence(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """a <-> b, (a -> b) & (b -> a)."""
    return conjunction(implication(a, b), implication(b, a))


def exclusive_disjunction(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """a ^ b, (a | b) & ~(a & b)."""
    return conjunction(disjunction(a, b), negated_conjunction(a, b))


def classify(truth: jax.Array, threshold: ArrayLike) -> jax.Array:
    """State of intervals [..., 2] under alpha [...]: int8, see `records.State`.

    Decided in this order in float32: CONTRADICTORY (3) when L > U, TRUE (1) when L >= alpha,
    FALSE (0) when 1 - U >= alpha, otherwise UNKNOWN (2).
    """
    lower, upper = truth[..., 0], truth[..., 1]
    alpha = jnp.asarray(threshold, jnp.float32)
    state = jnp.where(lower >= alpha, 1, jnp.where(1 - upper >= alpha, 0, 2))
    return jnp.where(lower > upper, 3, state).astype(jnp.int8)
