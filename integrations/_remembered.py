"""What rules remember, in files beside or within a trainer's checkpoints.

    put({file: written(audit.state)})            # an npz file
    restore(audit, file)

An array's name says where it stands in the state, `recent.0`; their order counts, as that of the state.
"""

from __future__ import annotations

import io
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from moe_rules_callback.paths import AnyPath

if TYPE_CHECKING:
    from moe_rules_callback import AuditState, RuleAuditCallback

log = logging.getLogger("moe_rules_callback")


def named(state: AuditState | Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Each array of a state, or of what `nested` made of one, by name and in order."""
    leaves = jax.tree.leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(array) for path, array in leaves
    }


def nested(arrays: Iterable[tuple[str, Any]]) -> dict[str, OrderedDict[str, np.ndarray]]:
    """What `RuleAuditCallback.restore` is given, of pairs of `named` in their order."""
    state: dict[str, OrderedDict[str, np.ndarray]] = {}
    for name, array in arrays:
        field, _, rest = name.partition(".")
        state.setdefault(field, OrderedDict())[rest] = array
    return state


def written(state: AuditState) -> bytes:
    """An npz file."""
    file = io.BytesIO()
    np.savez(file, **named(state))  # pyright: ignore[reportArgumentType]
    return file.getvalue()


def restore(audit: RuleAuditCallback, file: AnyPath) -> None:
    """Let an audit go on from such a file; without it where it is damaged."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            state = nested((name, arrays[name]) for name in arrays.files)
    except Exception:
        log.exception("%s cannot be read: what the rules remember begins anew", file)
        return
    audit.restore(state)
