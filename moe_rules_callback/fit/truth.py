"""A formula over all rows at once, differentiable in the weights of its operands.

The evaluator of a run goes row by row, with its weights compiled in. Here they are arguments, and the past
operators compose their pairs (see `temporal`) along the axis of rows. `fitting` checks one against the other.

Clamps and sigmoids have no slope where a rule is far from turning, so that a fit would not leave the spot.
With a leak they keep a small one, as tailored activations do in Logical Neural Networks; the last stage of a
fit has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..formula import After, Always, Connective, Formula, Not, Once, Previously, Since, Var, variables
from ..logic import coefficients
from ..temporal import UNKNOWN, compose

Place = tuple[tuple[int, ...], int]  # path to a connective from the root, and which of its operands
Weights = Mapping[Place, jax.Array | float]


class Table(NamedTuple):
    """n rows of C columns, each column a layer of a run.

    Attributes:
        atoms: float [n, C, 2] by predicate.
        bad: bool [n, C] by predicate, whether the signal below is not finite.
        steps: int [n, C].
    """

    atoms: Mapping[str, jax.Array]
    bad: Mapping[str, jax.Array]
    steps: jax.Array


def sigmoid(x: jax.Array, leak: jax.Array | float) -> jax.Array:
    """With a leak it goes on rising, ever more slowly."""
    return jax.nn.sigmoid(x) + leak * jnp.arcsinh(x / 4)


def clamp(x: jax.Array, leak: jax.Array | float) -> jax.Array:
    inner = jnp.clip(x, 0, 1)
    return inner + leak * (x - inner)


def evaluate(root: Formula, table: Table, weights: Weights, leak: jax.Array | float = 0.0) -> jax.Array:
    """Truth intervals [n, C, 2]; [0, 1] in rows in which a signal below is not finite.

    Args:
        weights: of operands; those not named have that of the formula.
        leak: slope of clamps and sigmoids outside of their range.
    """

    def of(node: Formula, path: tuple[int, ...]) -> jax.Array:
        match node:
            case Var(name):
                return table.atoms[name]
            case Not(operand):
                return 1 - of(operand, (*path, 0))[..., ::-1]
            case Connective(kind, operands, own):
                x = [of(operand, (*path, i)) for i, operand in enumerate(operands)]
                w = [weights.get((path, i), weight) for i, weight in enumerate(own)]
                return _connect(kind, x, w, leak)
            case After(step, operand):
                return jnp.where((table.steps < step)[..., None], UNKNOWN, of(operand, (*path, 0)))
            case Previously(operand):
                return _previous(of(operand, (*path, 0)), _bad(node, table))
            case Always(rows, operand):
                v = of(operand, (*path, 0))
                return _past(v, jnp.zeros_like(v), rows, _bad(node, table))[..., 0]
            case Once(rows, operand):
                v = of(operand, (*path, 0))
                return _past(jnp.ones_like(v), v, rows, _bad(node, table))[..., 1]
            case Since(rows, left, right):
                a, b = of(left, (*path, 0)), of(right, (*path, 1))
                return _past(a, b, rows, _bad(node, table))[..., 1]

    return jnp.where(_bad(root, table)[..., None], UNKNOWN, of(root, ()))


def _connect(
    kind: str, x: list[jax.Array], weights: list[jax.Array | float], leak: jax.Array | float
) -> jax.Array:
    if kind == "iff":
        both = [_connect("implies", pair, weights, leak) for pair in (x, x[::-1])]
        return _connect("and", both, [1.0, 1.0], leak)
    if kind == "xor":
        either, both = _connect("or", x, weights, leak), _connect("nand", x, weights, leak)
        return _connect("and", [either, both], [1.0, 1.0], leak)
    bias, signs, corners = coefficients(kind, (1.0,) * len(x))
    total = bias + sum(
        sign * w * ((each if sign > 0 else each[..., ::-1]) - corner)
        for each, w, sign, corner in zip(x, weights, signs, corners, strict=True)
    )
    return clamp(jnp.asarray(total), leak)


def _bad(node: Formula, table: Table) -> jax.Array:
    return jnp.stack([table.bad[name] for name in variables(node)]).any(0)


def _previous(x: jax.Array, bad: jax.Array) -> jax.Array:
    """The row before, skipping bad ones; [0, 1] at the start and in bad rows."""
    last = jax.lax.cummax(jnp.where(bad, -1, np.arange(len(bad))[:, None]))
    before = jnp.concatenate([jnp.full_like(last[:1], -1), last[:-1]])
    found = jnp.take_along_axis(x, jnp.maximum(before, 0)[..., None], axis=0)
    return jnp.where((bad | (before < 0))[..., None], UNKNOWN, found)


def _past(a: jax.Array, b: jax.Array, rows: int | None, bad: jax.Array) -> jax.Array:
    """Pairs (a, b) [n, C, 2] composed over the last rows: [n, C, 2, (a, b)], see `temporal`."""
    nothing = np.stack([UNKNOWN, UNKNOWN], axis=-1)
    dropped = bad[..., None]
    pair = jnp.stack([jnp.where(dropped, 1.0, a), jnp.where(dropped, 0.0, b)], axis=-1)
    if rows is None:
        pair = jax.lax.associative_scan(compose, pair)
    block = 1
    while rows is not None and block < rows:
        lag = min(rows - block, block)
        # Rows before the first are [0, 1]. More of them than there are rows change nothing.
        start = jnp.broadcast_to(nothing, (min(lag, len(pair)), *pair.shape[1:]))
        pair = compose(jnp.concatenate([start, pair])[: len(pair)], pair)
        block *= 2
    return jnp.where(dropped[..., None], nothing, pair)
