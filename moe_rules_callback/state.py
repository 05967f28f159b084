"""What an audit remembers between steps, as a pytree of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax

from .program import States


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """A ring of R finished rows: row i stands at i % R.

    `values` holds, one after the other, truth_layer [rules, layers, 2], signal_value [signals, layers],
    signal_pooled [signals] and expert_share [layers, experts]: one array is one write a step.
    """

    step: jax.Array  # int32 [R]
    state: jax.Array  # int8 [R, rules]
    values: jax.Array  # float32 [R, all of the above]


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
        rows: finished rows, until they are drained.
    """

    step: jax.Array
    row: jax.Array
    recent: tuple[jax.Array, ...]
    lookback: tuple[jax.Array, ...]
    trends: tuple[jax.Array, ...]
    program: States
    rows: Rows


def find_state(tree: Any) -> AuditState | None:
    """The first `AuditState` anywhere in a pytree, such as an optimizer's state, with plain arrays."""

    def is_state(node: Any) -> bool:
        return isinstance(node, AuditState)

    found = next(filter(is_state, jax.tree.leaves(tree, is_leaf=is_state)), None)
    if found is None:
        return None
    # nnx.Optimizer wraps each array of its state in a variable, which is a node of one leaf.
    own = jax.tree.structure(found, is_leaf=lambda node: not isinstance(node, AuditState | Rows | tuple))
    return jax.tree.unflatten(own, jax.tree.leaves(found))
