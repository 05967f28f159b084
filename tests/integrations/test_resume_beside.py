"""Beside the step and watched the callback holds the state: `callback.state` goes with the checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
import pytest
from conformance import PLAIN, differentiated
from resuming import (
    FLUSH_EVERY,
    KILLED,
    SAVED,
    STEPS,
    assert_same_bits,
    audited,
    batch,
    history,
    replaced,
)
from tiny_moe import make_weights, mse, plain_model

from moe_rules_callback import RuleAuditCallback

Step = Callable[[Any, jax.Array, jax.Array], tuple[Any, dict[str, Any]]]


def beside(audit: RuleAuditCallback) -> Step:
    compute = differentiated(PLAIN.forward)

    @partial(jax.jit, donate_argnums=0)
    def step(params, x, target):
        metrics, grads = compute(params, x, target)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), metrics

    return step


def watched(audit: RuleAuditCallback) -> Step:
    loss_fn = audit.watch(lambda params, x, target: mse(plain_model(params, x)[0], target))

    @partial(jax.jit, donate_argnums=0)
    def step(params, x, target):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, target)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads), {"loss": loss}

    return step


def go(step: Step, audit: RuleAuditCallback, params: Any, steps: Iterable[int], seed: int = 0) -> Any:
    for i in steps:
        params, metrics = step(params, *batch(i, seed))
        audit.on_step(metrics)
        if i % FLUSH_EVERY == 0:
            audit.flush()  # steps as fast as these outrun the sinks
    return params


def restored(manager: ocp.CheckpointManager, audit: RuleAuditCallback) -> Any:
    """The parameters. The structure of the audit's state is not known before the first step, nor needed."""
    like = {"params": jax.device_put(make_weights(), jax.devices()[0]), "audit": audit.state}
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, like)
    arguments = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
    saved = manager.restore(SAVED, args=ocp.args.Composite(**arguments))
    audit.restore(saved["audit"])
    return saved["params"]


@pytest.mark.parametrize("make", [beside, watched])
def test_a_run_that_is_resumed_and_rolled_back(make: Callable[..., Step], tmp_path: Path) -> None:
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        with audited(tmp_path / "unbroken") as audit:
            step, params = make(audit), jax.device_put(make_weights(), jax.devices()[0])
            assert audit.state is None
            params = go(step, audit, params, range(SAVED))
            arguments = {"params": params, "audit": audit.state}
            arguments = {name: ocp.args.StandardSave(tree) for name, tree in arguments.items()}
            manager.save(SAVED, args=ocp.args.Composite(**arguments))
            params = go(step, audit, params, range(SAVED, KILLED))
            audit.flush()
            shutil.copytree(tmp_path / "unbroken", tmp_path / "killed")
            go(step, audit, params, range(KILLED, STEPS))
        manager.wait_until_finished()
        unbroken = history(tmp_path / "unbroken")
        assert unbroken.step.values.tolist() == list(range(STEPS))

        with audited(tmp_path / "killed", resume=True) as audit:
            step = make(audit)
            go(step, audit, restored(manager, audit), range(SAVED, STEPS))
            audit.flush()
            assert_same_bits(history(tmp_path / "killed"), unbroken)

            before = len(replaced(tmp_path / "killed"))
            go(step, audit, restored(manager, audit), range(SAVED, STEPS - 6), seed=1)
            audit.flush()
            found = history(tmp_path / "killed")
            assert found.step.values.tolist() == list(range(STEPS - 6))
            assert (found.loss != unbroken.loss).sel(step=slice(SAVED, STEPS - 7)).all()
            go(step, audit, restored(manager, audit), range(SAVED, STEPS))
        assert_same_bits(history(tmp_path / "killed"), unbroken)
        assert len(replaced(tmp_path / "killed")) == before + 2
