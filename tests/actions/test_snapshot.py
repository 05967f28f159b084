"""The routing around an alert, as it was handed over, in a file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from collector import make

from moe_rules_callback.actions import SnapshotRouting

FIRES = {5, 6, 7, 8}


def x_of(step: int) -> float:
    return -1.0 if step in FIRES else 0.0


def probs_of(step: int) -> np.ndarray:
    return np.random.default_rng(step).dirichlet(np.ones(3), 4).astype(np.float32)


def metrics_of(step: int) -> dict[str, Any]:
    return {
        "x": x_of(step),
        "loss": jnp.float32(step),
        "router_probs": {"block_0": jnp.array(probs_of(step))},
    }


def audited(folder: Path, action: SnapshotRouting, **options: Any) -> Any:
    return make(actions=[action], dry_run=False, logdir=folder, sinks=[], flush_every=1, **options)


def take(audit: Any, steps: range, **override: Any) -> None:
    for step in steps:
        audit.on_step(metrics_of(step) | override)
        audit.flush()


def test_the_steps_before_and_after(tmp_path, caplog):
    caplog.set_level(logging.INFO, "moe_rules_callback")
    with audited(tmp_path, SnapshotRouting(rows=3)) as audit:
        take(audit, range(20))
    path = tmp_path / "snapshots" / "step-5.npz"
    assert list(path.parent.iterdir()) == [path]
    with np.load(path) as file:
        steps = file["step"].tolist()
        assert (file["rule"], file["alert_step"], steps) == ("hot", 5, list(range(3, 9)))
        names = {f"{step}/{name}" for step in steps for name in ("loss", "router_probs/block_0")}
        assert set(file.files) == {"rule", "alert_step", "step", *names}
        for step in steps:
            assert file[f"{step}/loss"] == step
            np.testing.assert_array_equal(file[f"{step}/router_probs/block_0"], probs_of(step))
    assert f"routing of steps 3 to 8 is in {path}, at step 5: rule 'hot' fires" in caplog.messages
    told = [message for message in caplog.messages if message.startswith("SnapshotRouting keeps")]
    assert told == [
        "SnapshotRouting keeps the routing of 3 steps: 0.0 MiB, and up to 0.0 MiB around an alert"
    ]


def test_the_memory_that_it_holds_is_told(tmp_path, caplog):
    caplog.set_level(logging.INFO, "moe_rules_callback")
    with audited(tmp_path, SnapshotRouting(rows=4)) as audit:
        take(audit, range(1), router_probs=jnp.ones((2**16, 8)))
    assert "keeps the routing of 4 steps: 8.0 MiB, and up to 24.0 MiB around an alert" in caplog.text


def test_no_more_is_held_than_told(tmp_path):
    def held() -> int:
        return sum(array.shape == (7, 5) for array in jax.live_arrays())

    with audited(tmp_path, SnapshotRouting(rows=3)) as audit:
        take(audit, range(1), router_probs=np.ones((6, 5), np.float32))
        counts = []
        for step in range(1, 30):
            take(audit, range(step, step + 1), router_probs=jnp.array(np.ones((7, 5), np.float32)))
            counts.append(held())
    assert max(counts[:4]) == 3  # before the alert
    assert 3 < max(counts) <= 9
    assert counts[-1] == 3
    assert held() == 0


def test_the_end_of_the_run_writes_what_there_is(tmp_path):
    with audited(tmp_path, SnapshotRouting(rows=3)) as audit:
        take(audit, range(6))
    with np.load(tmp_path / "snapshots" / "step-5.npz") as file:
        assert file["step"].tolist() == [3, 4, 5]


def test_steps_that_the_trainer_numbers(tmp_path):
    with audited(tmp_path, SnapshotRouting(rows=2)) as audit:
        for step in range(12):
            number = jnp.int32(100 + step) if step % 2 else 100 + step
            audit.on_step(metrics_of(step), number)
            audit.flush()
    with np.load(tmp_path / "snapshots" / "step-105.npz") as file:
        assert file["step"].tolist() == [104, 105, 106, 107]
        np.testing.assert_array_equal(file["107/router_probs/block_0"], probs_of(7))


def test_steps_of_a_run_that_is_resumed_and_files_that_are_there(tmp_path):
    for resume in (False, True):
        action = SnapshotRouting(rows=2)
        with make(
            actions=[action], dry_run=False, logdir=tmp_path, sinks=["zarr"], flush_every=1, resume=resume
        ) as a:
            take(a, range(9))
    folder = tmp_path / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == ["step-14.npz", "step-5.npz"]
    with np.load(folder / "step-14.npz") as file:
        assert file["step"].tolist() == [13, 14, 15, 16]
    with audited(tmp_path, SnapshotRouting(rows=2)) as audit:
        take(audit, range(9))
    assert sorted(path.name for path in folder.iterdir()) == ["step-14.npz", "step-5-2.npz", "step-5.npz"]


def test_arrays_that_were_donated_are_left_out_with_one_warning(tmp_path, caplog):
    with audited(tmp_path, SnapshotRouting(rows=2, cooldown=0)) as audit:
        for step in [*range(9), *range(9)]:
            metrics = metrics_of(step)
            audit.on_step(metrics)
            audit.flush()
            if step in (5, 6):
                metrics["router_probs"]["block_0"].delete()
    folder = tmp_path / "snapshots"
    assert sorted(path.name for path in folder.iterdir()) == ["step-14.npz", "step-5.npz"]
    with np.load(folder / "step-5.npz") as file:
        assert file["step"].tolist() == [4, 5, 6, 7]
        assert {name for name in file.files if "probs" in name} == {
            "4/router_probs/block_0", "7/router_probs/block_0",
        }  # fmt: skip
    told = [message for message in caplog.messages if "missing" in message]
    assert told == [
        "2 arrays are missing in it, such as 5/router_probs/block_0: they were donated to a later step. Hand "
        "over arrays that the step returns and does not take in again."
    ]


def inside(folder: Path, action: SnapshotRouting, extra: dict[str, Any]) -> dict[str, np.ndarray]:
    """The snapshot of a run whose audit is inside the step."""
    with audited(folder, action) as audit:
        state, update = audit.init({"x": 0.0}), jax.jit(audit.update)
        for step in range(12):
            state = update(state, {"x": jnp.float32(x_of(step))})
            action.keep(metrics_of(step) | extra, step)
            audit.drain(state)
            audit.flush()
    with np.load(folder / "snapshots" / "step-5.npz") as file:
        return dict(file)


def test_inside_the_step(tmp_path):
    written = inside(tmp_path, SnapshotRouting(rows=2), {})
    assert written["step"].tolist() == [4, 5, 6, 7]
    np.testing.assert_array_equal(written["7/router_probs/block_0"], probs_of(7))


def test_what_numpy_cannot_store_and_what_is_no_array_of_numbers(tmp_path):
    sown = {"key": jax.random.key(0), "low": jnp.array([0.5], jnp.bfloat16)}
    written = inside(tmp_path, SnapshotRouting(rows=1), {"intermediates": sown, "expert_load": [1, 2]})
    low = written["6/intermediates/low"]
    assert (low.dtype, low.tolist(), written["6/expert_load/1"]) == (np.float32, [0.5], 2)
    assert not any("key" in name for name in written)


def test_without_router_arrays_it_says_so(tmp_path, caplog):
    with audited(tmp_path, SnapshotRouting(rows=1)) as audit:
        take(audit, range(9), router_probs=None)
    assert not (tmp_path / "snapshots").exists()
    assert (
        "no snapshot of the routing at step 5: rule 'hot' fires: on_step was given no router arrays. A "
        "watched function gives none away; inside the step hand them to SnapshotRouting.keep(metrics, step)."
    ) in caplog.messages
