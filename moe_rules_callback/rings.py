"""Rings: the last R rows of something, row i at slot i % R, as an array [R, ..].

Slots that are known to lie in 0..R-1 are written as such: `ring.at[slot].set(row)` would wrap and check
them, which costs several small operations of the device where one is enough.
"""

from __future__ import annotations

import jax


def put(ring: jax.Array, row: jax.Array, slot: jax.Array) -> jax.Array:
    """The ring with `row` [..] in a slot; written in place where the ring is donated."""
    return jax.lax.dynamic_update_index_in_dim(ring, row.astype(ring.dtype), slot, 0)
