"""A training in pieces, as a script holds it, that is saved with Orbax, killed, and resumed.

Training, checkpoint and restore are then:

    training = WAYS["optax"](audit)
    carry = go(training, audit, training.carry, range(40))
    manager.save(40, args=ocp.args.StandardSave(training.arrays(carry)))
    carry = restored(manager, 40, training)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import xarray as xr
from tiny_moe import TOKENS, TOP_K, WIDTH, make_weights

from moe_rules_callback import Predicate, RuleAuditCallback, Rulebook, open_history
from moe_rules_callback.language import parse_rule

STEPS, SAVED, KILLED = 72, 41, 50  # of the whole run, before the checkpoint, and when the process is killed
FLUSH_EVERY = 8

# Together they read every part of the state; windows end before and after the checkpoint, and span it.
TEXTS = {
    "idle": "low_dead_expert_fraction & low_router_entropy",
    "jumpy": "high_loss_slope | always[5](high_load_cv)",
    "trend": "rising | ~increasing_loss",
    "held": "low_router_entropy since[7] high_router_entropy",
    "ever": "F(high_router_entropy)",
    "whole": "G(high_load_cv)",
    "before": "previously(high_router_entropy)",
    "recently": "once[40](high_router_entropy)",
    "late": "after[45](high_load_cv)",
}
PROBED = {"probed": "low_routing_flip_rate & high_router_saturation"}
PREDICATES = {"rising": Predicate("loss", "increasing", window=8)}


def rulebook(texts: dict[str, str]) -> Rulebook:
    return Rulebook("resumed", tuple(parse_rule(text, name) for name, text in texts.items()), PREDICATES)


def audited(logdir: Path, texts: dict[str, str] = TEXTS, **options: Any) -> RuleAuditCallback:
    options = {"sinks": ["zarr"], "top_k": TOP_K, "flush_every": FLUSH_EVERY} | options
    return RuleAuditCallback(rulebook(texts), logdir=logdir, **options)


def batch(step: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """Inputs and targets [TOKENS, WIDTH]; a resumed run draws what an unbroken one does.

    Right after the checkpoint expert 0 is not wanted: it is not dead, which only the rows before tell.
    """
    x, target = np.random.default_rng([seed, step]).normal(size=(2, TOKENS, WIDTH)).astype(np.float32)
    if step in (SAVED, SAVED + 1):
        x -= 4 * np.sign(make_weights()[0]["router"]["kernel"][:, 0])
    return jnp.asarray(x), jnp.asarray(target)


class Training(NamedTuple):
    """A model that is trained with the audit in its step.

    Attributes:
        carry: what goes from step to step, before the first.
        step: (carry, inputs, targets) -> carry; donates.
        arrays: of a carry, the pytree that Orbax is given.
        put: (carry, arrays that were restored) -> carry.
        drained: of a carry, what `drain` is given.
    """

    carry: Any
    step: Callable[[Any, jax.Array, jax.Array], Any]
    arrays: Callable[[Any], Any] = lambda carry: carry
    put: Callable[[Any, Any], Any] = lambda carry, arrays: arrays
    drained: Callable[[Any], Any] = lambda carry: carry


def begun(training: Training) -> Any:
    """The carry before the first step, on its device as one that Orbax brings: the step is compiled once."""
    arrays = training.arrays(training.carry)
    return training.put(training.carry, jax.device_put(arrays, jax.devices()[0]))


def go(training: Training, audit: RuleAuditCallback, carry: Any, steps: Iterable[int], seed: int = 0) -> Any:
    """Train on; the carry after these steps."""
    for i in steps:
        carry = training.step(carry, *batch(i, seed))
        audit.drain(training.drained(carry))
        if i % FLUSH_EVERY == 0:
            audit.flush()  # steps as fast as these outrun the sinks
    return carry


def restored(manager: ocp.CheckpointManager, step: int, training: Training) -> Any:
    """The carry of a checkpoint, by way of a carry that was made anew."""
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, training.arrays(training.carry))
    return training.put(training.carry, manager.restore(step, args=ocp.args.StandardRestore(abstract)))


def history(logdir: Path) -> xr.Dataset:
    """All but what two writers of the same rows may say differently."""
    found = open_history(logdir).load().drop_vars("wall_time")
    return found.assign_attrs(dict.fromkeys(("writer", "replaced")))


def replaced(logdir: Path) -> list[dict[str, Any]]:
    """What the store says about rows that were replaced."""
    return json.loads(open_history(logdir).attrs.get("replaced", "[]"))


def assert_same_bits(found: xr.Dataset, wanted: xr.Dataset) -> None:
    assert found.step.values.tolist() == wanted.step.values.tolist()
    xr.testing.assert_identical(found, wanted)  # which shows what differs, but not 0 from -0
    for name, array in wanted.variables.items():
        assert found[name].values.tobytes() == array.values.tobytes(), name
