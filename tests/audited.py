"""An audit driven over the steps of a run, and its records on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from moe_rules_callback import Audit, AuditState, Records


def drive(audit: Audit, steps: Sequence[Mapping[str, Any]]) -> AuditState:
    """One jitted update for each step."""
    state, update = audit.init(steps[0]), jax.jit(audit.update)
    for metrics in steps:
        state = update(state, metrics)
    return state


def unpack(audit: Audit, state: AuditState) -> Records:
    """All rows that a state holds."""
    rows = np.asarray(state.rows)
    count = int(state.row)
    assert count <= len(rows)
    return audit.records(rows, np.arange(count), np.zeros(count))


def records(audit: Audit, steps: Sequence[Mapping[str, Any]]) -> Records:
    return unpack(audit, drive(audit, steps))


def signal(rows: Records, name: str) -> np.ndarray:
    """[n, layers]"""
    return rows.signal_value[:, rows.schema.signal_names.index(name)]


def truth(rows: Records, rule: str) -> np.ndarray:
    """[n, layers, 2]"""
    return rows.truth_layer[:, rows.schema.rule_names.index(rule)]


def state(rows: Records, rule: str) -> np.ndarray:
    """[n]"""
    return rows.state[:, rows.schema.rule_names.index(rule)]
