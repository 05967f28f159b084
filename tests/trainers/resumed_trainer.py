"""Audits of trainings that are killed and resumed, and how their histories are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xarray as xr

from moe_rules_callback import Predicate, RuleAuditCallback, Rulebook, open_history
from moe_rules_callback.language import parse_rule

# Together they read every part of the state; windows end before and after the checkpoint, and span it.
TEXTS = {
    "idle": "low_dead_expert_fraction & low_router_entropy",
    "jumpy": "high_loss_slope | always[5](high_load_cv)",
    "trend": "rising | ~increasing_loss",
    "held": "low_router_entropy since[7] high_router_entropy",
    "ever": "F(high_router_entropy)",
    "before": "previously(high_router_entropy)",
    "recently": "once[40](high_router_entropy)",
}
PREDICATES = {"rising": Predicate("loss", "increasing", window=8)}


def audited(logdir: Path, **options: Any) -> RuleAuditCallback:
    rules = tuple(parse_rule(text, name) for name, text in TEXTS.items())
    rulebook = Rulebook("resumed", rules, PREDICATES)
    return RuleAuditCallback(rulebook, logdir=logdir, sinks=["zarr"], top_k=2, flush_every=8, **options)


def replaced(logdir: Path) -> list[dict[str, Any]]:
    """What the store says about rows that were replaced."""
    return json.loads(open_history(logdir).attrs.get("replaced", "[]"))


def assert_same_history(logdir: Path, other: Path) -> None:
    """To the bit, but for the times and what two writers of the same rows say differently."""
    found, wanted = (
        open_history(each).load().drop_vars("wall_time").assign_attrs(dict.fromkeys(("writer", "replaced")))
        for each in (logdir, other)
    )
    assert found.step.values.tolist() == wanted.step.values.tolist()
    xr.testing.assert_identical(found, wanted)  # which shows what differs, but not 0 from -0
    for name, array in wanted.variables.items():
        assert found[name].values.tobytes() == array.values.tobytes(), name
