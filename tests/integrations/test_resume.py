"""A run that is killed and resumed, or rolled back, leaves the history of one that was not, bit by bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import xarray as xr
from collector import Collector, make
from resumable import PRESENT, WAYS
from resuming import (
    FLUSH_EVERY,
    KILLED,
    PROBED,
    SAVED,
    STEPS,
    TEXTS,
    Training,
    assert_same_bits,
    audited,
    batch,
    begun,
    go,
    history,
    replaced,
    restored,
)

from moe_rules_callback import RuleAuditCallback

OPTIONS: dict[str, dict[str, Any]] = {"optax-bfloat16": {"every_n": 2}, "pure": {"texts": TEXTS | PROBED}}


class Resumed(NamedTuple):
    """A training that was killed and resumed, to its end.

    Attributes:
        unbroken: history of the same training that was not.
        logdir: of the resumed one; `training` and `audit` are those of the second process.
        carry: of the checkpoint, brought anew.
    """

    unbroken: xr.Dataset
    logdir: Path
    training: Training
    audit: RuleAuditCallback
    carry: Callable[[], Any]


@pytest.fixture(scope="module", params=PRESENT)
def resumed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Resumed]:
    make, options = WAYS[request.param], OPTIONS.get(request.param, {})
    folder = tmp_path_factory.mktemp(request.param)
    with ocp.CheckpointManager(folder / "checkpoints") as manager:  # saves while training goes on and donates
        with audited(folder / "unbroken", **options) as audit:
            training = make(audit)
            carry = go(training, audit, begun(training), range(SAVED))
            manager.save(SAVED, args=ocp.args.StandardSave(training.arrays(carry)))
            carry = go(training, audit, carry, range(SAVED, KILLED))
            shutil.copytree(folder / "unbroken", folder / "killed")  # what a kill would leave
            go(training, audit, carry, range(KILLED, STEPS))
        manager.wait_until_finished()
        with audited(folder / "killed", **options, resume=True) as audit:
            training = make(audit)
            go(training, audit, restored(manager, SAVED, training), range(SAVED, STEPS))
            audit.flush()
            unbroken, carry = history(folder / "unbroken"), lambda: restored(manager, SAVED, training)
            yield Resumed(unbroken, folder / "killed", training, audit, carry)


def test_a_run_that_was_killed_and_resumed(resumed: Resumed) -> None:
    steps = range(0, STEPS, resumed.audit.audit.every_n)
    assert resumed.unbroken.step.values.tolist() == list(steps)
    assert_same_bits(history(resumed.logdir), resumed.unbroken)


def test_a_run_that_is_rolled_back(resumed: Resumed, caplog: pytest.LogCaptureFixture) -> None:
    """To the checkpoint, on with other batches, to the checkpoint again, and on with those of before."""
    training, audit, unbroken = resumed.training, resumed.audit, resumed.unbroken
    before = len(replaced(resumed.logdir))
    go(training, audit, resumed.carry(), range(SAVED, STEPS - 6), seed=1)
    audit.flush()
    found = history(resumed.logdir)
    assert found.step.values.tolist() == list(range(0, STEPS - 6, audit.audit.every_n))
    assert_same_bits(found.sel(step=slice(0, SAVED - 1)), unbroken.sel(step=slice(0, SAVED - 1)))
    assert (found.loss != unbroken.loss).sel(step=slice(SAVED, STEPS - 7)).all()

    go(training, audit, resumed.carry(), range(SAVED, STEPS))
    audit.flush()
    assert_same_bits(history(resumed.logdir), unbroken)
    for told, end in zip(replaced(resumed.logdir)[before:], (STEPS, STEPS - 6), strict=True):
        first, n = told["from_step"], audit.audit.every_n
        assert SAVED - 2 * FLUSH_EVERY * n <= first <= SAVED + 1  # the state's own rows may come again
        assert told["rows"] == len(range(first, end, n))
        assert f"{told['rows']} rows from step {first} on are replaced, since an older" in caplog.text


@pytest.mark.parametrize("back", [1, 3, 9])
def test_a_rollback_over_fewer_rows_than_come_after_it(back: int, tmp_path: Path) -> None:
    """When rows are looked at next there are more of them than before it."""
    for logdir, steps in ((tmp_path / "straight", 12 - back), (tmp_path / "back", 12)):
        with audited(logdir, {"r": "rising"}) as audit:
            update = jax.jit(audit.update)
            states = [audit.init({"loss": 0.0})]
            for i in range(steps):
                states.append(update(states[-1], {"loss": float(i)}))
                audit.drain(states[-1])
            audit.flush()
            state = states[12 - back]
            for i in range(2 * FLUSH_EVERY):
                state = update(state, {"loss": 0.5 * i})
            audit.drain(state)
    assert_same_bits(history(tmp_path / "back"), history(tmp_path / "straight"))
    assert [each["rows"] for each in replaced(tmp_path / "back")] == [back]


@pytest.mark.parametrize("resumed", ["pure"], indirect=True)
def test_every_part_of_the_state_is_needed(resumed: Resumed) -> None:
    """A restore that forgets any array of it, the audit's or the probe's, gives other rows."""
    step, saved = resumed.training.step, resumed.carry()
    parts, tree = jax.tree.flatten_with_path({name: saved[name] for name in ("audit", "probe")})
    fresh = jax.tree.leaves({name: resumed.training.carry[name] for name in ("audit", "probe")})

    def rows(parts: list[Any]) -> np.ndarray:
        carry = jax.tree.map(jnp.copy, saved | jax.tree.unflatten(tree, parts))
        for i in range(SAVED, SAVED + 2 * FLUSH_EVERY - 1):
            carry = step(carry, *batch(i))
        return np.asarray(carry["audit"].rows)

    arrays = [array for _, array in parts]
    wanted, idle = rows(arrays), []
    for i, (path, _) in enumerate(parts):
        forgotten = jax.device_put(fresh[i], jax.devices()[0])
        if (rows([*arrays[:i], forgotten, *arrays[i + 1 :]]) == wanted).all():
            idle.append(jax.tree_util.keystr(path))
    assert idle == [f"['probe'].reference[{i}]" for i in (0, 1)]  # made anew of the same weights


def resume(logdir: Path, ended: int, saved: int) -> Collector:
    """A run of so many steps goes on in another process, from a checkpoint after `saved` steps; what a plugin
    of the second is told."""
    seen, state = Collector(), None
    for steps in (range(ended), range(saved, ended + 3)):
        seen = Collector()
        options = {"logdir": logdir, "sinks": ["zarr"], "resume": True, "flush_every": FLUSH_EVERY}
        with make(seen, **options) as audit:
            fresh = audit.init({"x": 0.0})
            carry = fresh if state is None else state
            for i in steps:
                carry = audit.update(carry, {"x": -1.0 if i == 3 else float(i)})
                state = carry if i == saved - 1 else state
                audit.drain(carry)
                if i % FLUSH_EVERY == 0:
                    audit.flush()
    assert history(logdir).step.values.tolist() == list(range(ended + 3))
    return seen


@pytest.mark.parametrize(("ended", "saved"), [(9, 9), (30, 2)])
def test_rows_that_the_history_holds_are_neither_told_nor_written_again(
    ended: int, saved: int, tmp_path: Path
) -> None:
    """Those of many flushes: the run was killed long after its checkpoint."""
    seen = resume(tmp_path, ended, saved)
    assert [step for batch in seen.batches for step in batch.step.tolist()] == list(range(ended, ended + 3))
    assert seen.alerts == []  # those of step 3 are over
    assert replaced(tmp_path) == []
