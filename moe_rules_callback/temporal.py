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
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Operator = Literal["always", "once", "since"]
UNKNOWN = np.array([0.0, 1.0], np.float32)


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
        self._kinds = np.array([kind for kind, _ in operators])
        bounded = [(i, rows) for i, (_, rows) in enumerate(operators) if rows is not None]
        self._unbounded = np.array([i for i, (_, rows) in enumerate(operators) if rows is None], int)
        self._levels: list[tuple[np.ndarray, np.ndarray]] = []  # per level: operators, lags in rows
        level = 0
        while True:
            block = 1 << level
            lags = [(i, min(rows - block, block)) for i, rows in bounded if rows > block]
            if not lags:
                break
            self._levels.append((np.array([i for i, _ in lags]), np.array([lag for _, lag in lags])))
            level += 1

    def init(self, layers: int) -> tuple[jax.Array, ...]:
        """State before the first row: one ring of 2^level rows a level, then the whole-run pairs."""
        start = np.empty((len(self._kinds), layers, 2, 2), np.float32)
        start[..., 0] = np.where(self._kinds == "once", 1.0, UNKNOWN[:, None]).T[:, None, :]
        start[..., 1] = np.where(self._kinds == "always", 0.0, UNKNOWN[:, None]).T[:, None, :]
        rings = [
            jnp.asarray(np.broadcast_to(start[members], (1 << level, *start[members].shape)))
            for level, (members, _) in enumerate(self._levels)
        ]
        nothing = jnp.broadcast_to(np.array([1.0, 0.0], np.float32), start[self._unbounded].shape)
        return (*rings, nothing)

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
        kind = self._kinds[:, None, None]
        a = jnp.where(kind == "once", 1.0, left)
        b = jnp.where(kind == "always", 0.0, right)
        dropped = skip[..., None]
        pair = jnp.stack([jnp.where(dropped, 1.0, a), jnp.where(dropped, 0.0, b)], axis=-1)
        *rings, whole = state
        new: list[jax.Array] = []
        for level, (ring, (members, lags)) in enumerate(zip(rings, self._levels, strict=True)):
            depth, current = 1 << level, pair[members]
            earlier = ring[(row - lags) % depth, np.arange(len(members))]
            new.append(ring.at[row % depth].set(current))
            pair = pair.at[members].set(compose(earlier, current))
        whole = compose(whole, pair[self._unbounded])
        pair = pair.at[self._unbounded].set(whole)
        truth = jnp.where(kind == "always", pair[..., 0], pair[..., 1])
        return (*new, whole), jnp.where(dropped, UNKNOWN, truth)
