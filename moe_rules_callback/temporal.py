"""The past operators: minimum and maximum of each bound over the rows so far.

Each row gives an operator a pair (a, b), read as the function x -> max(b, min(a, x)) of what came before:

    always(v): (v, 0), result a        once(v): (1, v), result b        since(l, r): (l, r), result b

Composing pairs over rows gives `always` = min, `once` = max and `since` = max_k min(r_k, l_k+1, .., l_t).
The composition is associative, and rows may be counted twice without changing the result, so a window
of n rows is two overlapping blocks of 2^floor(log2 n) rows: log2(n) compositions a row, whatever n.

A row that is skipped (a metric was not finite) contributes the identity (1, 0). Rows before the start
count as [0, 1], so that a bound that is already certain is reported. Without a window the whole run
counts and there are no rows before the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

Operator = Literal["always", "once", "since"]
UNKNOWN = np.array([0.0, 1.0], np.float32)
IDENTITY = np.array([1.0, 0.0], np.float32)  # the pair that changes nothing
SURE: Any = {"mode": "promise_in_bounds"}  # unsigned and below the length: need not be wrapped and checked


def compose(earlier: jax.Array, later: jax.Array) -> jax.Array:
    """The pair of `earlier` rows followed by `later` rows; both [.., 2], last axis (a, b)."""
    a, b = earlier[..., 0], earlier[..., 1]
    c, d = later[..., 0], later[..., 1]
    return jnp.stack([jnp.minimum(a, c), jnp.maximum(d, jnp.minimum(c, b))], axis=-1)


class Windows:
    """m past operators evaluated together; pairs are [m, layers, bound, (a, b)].

    Args:
        operators: for each its name and its window in rows (None: the whole run).
    """

    def __init__(self, operators: Sequence[tuple[Operator, int | None]]) -> None:
        # Longest windows first, whole runs last: whoever needs a level is at the front.
        lengths = [rows for _, rows in operators]
        order = sorted(range(len(operators)), key=lambda i: -(lengths[i] or 0))
        self._order, self._back = np.array(order, int), np.argsort(order)
        self._kinds = np.array([operators[i][0] for i in order])
        bounded = [rows for i in order if (rows := lengths[i]) is not None]
        self._bounded = len(bounded)
        # One flat array holds the rings of all levels: for each member of a level its depth in rows, its lag,
        # its first slot, and the distance of its slots.
        self._sizes: list[int] = []  # members of each level
        depths, lags, first, apart = [], [], [], []
        slots, block = 0, 1
        while members := [rows for rows in bounded if rows > block]:
            for j, rows in enumerate(members):
                depths.append(block)
                lags.append(min(rows - block, block))
                first.append(slots + j)
                apart.append(len(members))
            self._sizes.append(len(members))
            slots += block * len(members)
            block *= 2
        self._lags = np.array(lags, np.int32)
        self._depths, self._first, self._apart = (np.array(x, np.uint32) for x in (depths, first, apart))

    def init(self, layers: int) -> tuple[jax.Array, ...]:
        """State before the first row: the rings, [slots, layers, 2, 2], and the whole-run pairs if any."""
        start = np.empty((len(self._kinds), layers, 2, 2), np.float32)
        start[..., 0] = np.where(self._kinds == "once", 1.0, UNKNOWN[:, None]).T[:, None, :]
        start[..., 1] = np.where(self._kinds == "always", 0.0, UNKNOWN[:, None]).T[:, None, :]
        rings = [np.tile(start[:size], (1 << level, 1, 1, 1)) for level, size in enumerate(self._sizes)]
        state = [jnp.asarray(np.concatenate(rings))] if rings else []
        if self._bounded < len(start):
            state.append(jnp.broadcast_to(IDENTITY, start[self._bounded :].shape))
        return tuple(state)

    def update(
        self,
        state: tuple[jax.Array, ...],
        left: jax.Array,
        right: jax.Array,
        skip: jax.Array,
        row: jax.Array,
    ) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Take in one row.

        Args:
            state: of `init` or the row before.
            left, right: [m, layers, 2]; the operands of `since`; for the others both the operand.
            skip: bool [m, layers]; rows that later windows pass over.
            row: int32, number of rows before this one.

        Returns:
            The new state and the truth [m, layers, 2]; at a skipped row [0, 1].
        """
        kind, dropped = self._kinds[:, None, None], skip[..., None]
        a = jnp.where(kind == "once", 1.0, left[self._order])
        b = jnp.where(kind == "always", 0.0, right[self._order])
        pair = jnp.where(dropped[self._order, ..., None], IDENTITY, jnp.stack([a, b], axis=-1))
        new: list[jax.Array] = []
        if self._sizes:
            rings, blocks = state[0], []
            earlier = jnp.split(rings.at[self._at(row - self._lags)].get(**SURE), np.cumsum(self._sizes)[:-1])
            for size, before in zip(self._sizes, earlier, strict=True):
                blocks.append(pair[:size])
                pair = jnp.concatenate([compose(before, blocks[-1]), pair[size:]])
            new.append(rings.at[self._at(row)].set(jnp.concatenate(blocks), unique_indices=True, **SURE))
        if self._bounded < len(self._kinds):
            new.append(compose(state[-1], pair[self._bounded :]))
            pair = jnp.concatenate([pair[: self._bounded], new[-1]])
        truth = jnp.where(kind == "always", pair[..., 0], pair[..., 1])[self._back]
        return tuple(new), jnp.where(dropped, UNKNOWN, truth)

    def _at(self, rows: jax.Array) -> jax.Array:
        """uint32 slots of these rows, one for each member of each level."""
        return rows.astype(jnp.uint32) % self._depths * self._apart + self._first
