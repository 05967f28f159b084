"""What an audit remembers between steps, as a pytree of arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import HistoryError
from .program import States


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AuditState:
    """To be carried, donated, sharded and checkpointed with the rest of a training state.

    Attributes:
        step: int32 [], number of the last step, -1 before the first.
        row: int32 [], rows so far.
        recent: loads of the last 32 rows, for each (E, k).
        lookback: windows of the signals that others are computed from.
        trends: windows of the signals that predicates look back on.
        program: what the past operators of the rules remember.
        ring: `rows`, under a name made of the rules, their predicates and the layers: a checkpoint of others,
            whose windows may have the same shapes, is none of this audit, and Orbax says so.
    """

    step: jax.Array
    row: jax.Array
    recent: tuple[jax.Array, ...]
    lookback: tuple[jax.Array, ...]
    trends: tuple[jax.Array, ...]
    program: States
    ring: dict[str, jax.Array]

    @property
    def rows(self) -> jax.Array:
        """int32 [R, ..], a ring of finished rows until they are drained; row i, as made by `pack`, stands at
        i % R. One array is one write a step, and one transfer."""
        (rows,) = self.ring.values()
        return rows


def pack(step: jax.Array, state: jax.Array, values: jax.Array) -> jax.Array:
    """A row, int32 [1 + rules + n]: the step, the states of the rules, and n float32 values as their bits."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jnp.concatenate([step[None], state.astype(jnp.int32), bits])


def unpack(rows: np.ndarray, rules: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of packed rows on the host: steps int64 [n], states int8 [n, rules] and values float32 [n, ..]."""
    values = np.ascontiguousarray(rows[:, 1 + rules :]).view(np.float32)
    return rows[:, 0].astype(np.int64), rows[:, 1 : 1 + rules].astype(np.int8), values


def find_state(tree: Any) -> AuditState | None:
    """The first `AuditState` anywhere in a pytree, such as an optimizer's state, with plain arrays."""

    def is_state(node: Any) -> bool:
        return isinstance(node, AuditState)

    found = next(filter(is_state, jax.tree.leaves(tree, is_leaf=is_state)), None)
    if found is None:
        return None
    # nnx.Optimizer wraps each array of its state in a variable, which is a node of one leaf.
    own = jax.tree.structure(found, is_leaf=lambda node: not isinstance(node, AuditState | tuple | dict))
    return jax.tree.unflatten(own, jax.tree.leaves(found))


def restored(given: Any, like: AuditState) -> AuditState:
    """A state that was saved, as NumPy arrays.

    Args:
        given: an `AuditState`, or the mapping with its fields that Orbax gives where it is told no target.
        like: a state of this audit.

    Raises:
        HistoryError: it is not a state of this audit.
    """
    parts, found = _parts(given), {}
    for each in fields(like):
        leaves, tree = jax.tree.flatten(getattr(like, each.name))
        saved = [np.asarray(leaf) for leaf in jax.tree.leaves(parts.get(each.name))]
        shapes, expected = ([(leaf.shape, leaf.dtype) for leaf in some] for some in (saved, leaves))
        if shapes != expected or (each.name == "ring" and [*(parts["ring"] or ())] != [*like.ring]):
            raise HistoryError(
                f"the state to restore is not one of this audit: its `{each.name}` differs. Usual cause: it "
                "was saved with other rules, predicates, signals, layers, top_k or flush_every. Make the "
                "callback as it was then, or windows begin anew."
            )
        found[each.name] = jax.tree.unflatten(tree, saved)
    return AuditState(**found)


def step_of(given: Any) -> int:
    """The last step of a state that was saved, of whatever audit; -1 if it tells none."""
    match jax.tree.leaves(_parts(given).get("step")):
        case [step] if np.shape(step) == () and np.issubdtype(np.asarray(step).dtype, np.integer):
            return int(step)
    return -1


def _parts(given: Any) -> Mapping[str, Any]:
    """The fields of a saved state, of which some may be missing."""
    if isinstance(given, Mapping):
        return given
    return {each.name: getattr(given, each.name, None) for each in fields(AuditState)}
