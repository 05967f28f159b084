"""A plugin of somebody else's: how long tokens wait, when that is a jam, and somebody who is told.

Installing it is all: its entry point in the group `moe_rules_callback` names this module.
"""

from __future__ import annotations

import jax.numpy as jnp

from moe_rules_callback import Predicate, Signal, hookimpl


@hookimpl
def provide_signals():
    return {
        "mean_queue": Signal(lambda metrics: jnp.mean(jnp.array(metrics["queue"])), ("queue",), units="token")
    }


@hookimpl
def provide_predicates():
    return {"jammed": Predicate("mean_queue", "high", offset=5.0)}


@hookimpl
def provide_rules():
    return {"jam": "0.9 :: jammed"}


@hookimpl
def on_records(records):
    print(f"sample got {len(records)} rows of {', '.join(records.schema.rule_names)}")
