"""Rules that change between two runs: a new history that names the old one, and what can be restored."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import naive
import numpy as np
import orbax.checkpoint as ocp
import pytest
import resuming
import xarray as xr
from resumable import WAYS
from resuming import audited, begun, go, history, restored

from moe_rules_callback import AuditState, open_history

SAVED, KILLED, STEPS = 9, 13, 17
TEXTS = {name: resuming.TEXTS[name] for name in ("idle", "held", "whole", "before", "late")}


class First(NamedTuple):
    """A run that was killed.

    Attributes:
        logdir: its own.
        checkpoints: of it, after the step before SAVED.
        unbroken: history of the same run to its end.
    """

    make: Callable[..., Any]
    logdir: Path
    checkpoints: Path
    unbroken: xr.Dataset


@pytest.fixture(scope="module", params=["optax", "nnx"])
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> First:
    make, folder = WAYS[request.param], tmp_path_factory.mktemp(request.param)
    with (
        audited(folder / "unbroken", TEXTS) as audit,
        ocp.CheckpointManager(folder / "checkpoints") as manager,
    ):
        training = make(audit)
        carry = go(training, audit, begun(training), range(SAVED))
        manager.save(SAVED, args=ocp.args.StandardSave(training.arrays(carry)))
        carry = go(training, audit, carry, range(SAVED, KILLED))
        audit.flush()
        shutil.copytree(folder / "unbroken", folder / "killed")
        go(training, audit, carry, range(KILLED, STEPS))
    return First(make, folder / "killed", folder / "checkpoints", history(folder / "unbroken"))


@pytest.fixture
def logdir(first: First, tmp_path: Path) -> Path:
    """A copy of what the killed run left."""
    return Path(shutil.copytree(first.logdir, tmp_path / "killed"))


def assert_linked(logdir: Path, log: str, why: str) -> xr.Dataset:
    """The new history."""
    assert f"audit.zarr cannot be continued: {why}" in log
    assert "audit-2.zarr, whose attribute `continues` names it." in log
    assert open_history(logdir / "audit.zarr").step.values.tolist() == list(range(KILLED))
    found = history(logdir)
    assert found.attrs["continues"] == "audit.zarr"
    return found


def in_pytree(manager: ocp.CheckpointManager, carry: Any) -> Any:
    """The checkpoint without what the old rules remembered, as integrations/optax.py has it."""

    def is_audit(node: Any) -> bool:
        return isinstance(node, AuditState)

    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, carry)
    rest = jax.tree.map(lambda x: {"step": x.step} if is_audit(x) else x, abstract, is_leaf=is_audit)
    saved = partly(manager, rest)
    return jax.tree.map(
        lambda new, old: replace(new, step=old["step"]) if is_audit(new) else old,
        carry, saved, is_leaf=is_audit,
    )  # fmt: skip


def in_nnx(manager: ocp.CheckpointManager, carry: Any) -> Any:
    """The same, as integrations/flax_nnx.py has it."""
    from flax import nnx

    rest = jax.tree.map(ocp.tree.to_shape_dtype_struct, nnx.state(carry))
    remembered = rest[1]["opt_state"][0]
    for name in remembered.keys() - {"step"}:
        del remembered[name]
    nnx.update(carry, partly(manager, rest))
    return carry


def partly(manager: ocp.CheckpointManager, rest: Any) -> Any:
    arguments = ocp.checkpoint_utils.construct_restore_args(rest)
    return manager.restore(SAVED, args=ocp.args.PyTreeRestore(rest, arguments, partial_restore=True))


def test_other_rules(first: First, logdir: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {name: text for name, text in TEXTS.items() if name != "held"} | {"added": "previously(~rising)"}
    with audited(logdir, texts, resume=True) as audit:
        training = first.make(audit)
        with (
            ocp.CheckpointManager(first.checkpoints) as manager,
            pytest.raises(ValueError, match="structures do not match"),
        ):
            restored(manager, SAVED, training)
        with ocp.CheckpointManager(first.checkpoints) as manager:
            carry = (in_nnx if first.make is WAYS["nnx"] else in_pytree)(manager, training.carry)
        go(training, audit, carry, range(SAVED, STEPS))
        assert audit.path == logdir / "audit-2.zarr"
    found = assert_linked(logdir, caplog.text, "rule 'held' is gone")
    wanted = first.unbroken.sel(step=slice(SAVED, None))
    assert found.step.values.tolist() == wanted.step.values.tolist()
    for name in ("loss", "expert_share"):  # the model went on from where it was
        np.testing.assert_array_equal(found[name], wanted[name])


def judged(truth: np.ndarray) -> int:
    """A state at a threshold of .9."""
    return naive.classify((float(truth[0]), float(truth[1])), 0.9)


def test_other_thresholds_alone(first: First, logdir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What rules remember is restored as ever, for a threshold is only what the truth is compared with."""
    texts = {name: f"0.9 :: {text}" for name, text in TEXTS.items()}
    with audited(logdir, texts, resume=True) as audit, ocp.CheckpointManager(first.checkpoints) as manager:
        training = first.make(audit)
        go(training, audit, restored(manager, SAVED, training), range(SAVED, STEPS))
    found = assert_linked(logdir, caplog.text, "the text of rule 'idle' was")
    assert found.step[0] < SAVED  # rows that the checkpoint held, which are judged anew as well
    np.testing.assert_array_equal(found.state, [list(map(judged, row)) for row in found.truth.values])
    found, wanted = (each.sel(step=slice(SAVED, None)) for each in (found, first.unbroken))
    assert found.step.values.tolist() == wanted.step.values.tolist()
    assert found.truth_layer.values.tobytes() == wanted.truth_layer.values.tobytes()


def test_other_rules_that_remember_as_much(first: First, logdir: Path) -> None:
    """The shapes are the same, and still nothing of it is restored."""
    texts = TEXTS | {"whole": TEXTS["whole"].replace("high_load_cv", "high_router_entropy")}
    with audited(logdir, texts, resume=True) as audit, ocp.CheckpointManager(first.checkpoints) as manager:
        training = first.make(audit)
        with pytest.raises(ValueError, match=r"structures do not match(.|\n)*ring.of_[0-9a-f]{8}"):
            restored(manager, SAVED, training)
