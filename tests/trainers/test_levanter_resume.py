# pyright: reportMissingImports=false
"""Levanter's Trainer goes on from its own checkpoints: the history is that of a run that was not killed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resumed_trainer import assert_same_history, audited, replaced

pytest.importorskip("levanter", reason="marin-levanter is not installed")

import equinox as eqx
import haliax as hax
import levanter
import optax
from levanter.checkpoint import CheckpointerConfig
from levanter.data.dataset import ListAsyncDataset
from levanter.trainer import Trainer, TrainerConfig
from moe_rules_callback.integrations.levanter import attach

from moe_rules_callback import open_history

EXPERTS, BATCH, WIDTH = 4, 4, 6
STEPS, SAVED, EVERY, KILLED = 40, 24, 12, 30


class MoE(eqx.Module):
    router: jax.Array
    experts: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, index = jax.lax.top_k(jax.nn.softmax(x @ self.router), 2)
        mask = (jax.nn.one_hot(index, EXPERTS) * gate[..., None]).sum(-2)
        return jnp.einsum("te,ti,eio->to", mask, x, self.experts)


def model() -> MoE:
    rng = np.random.default_rng(0)
    shapes = (WIDTH, EXPERTS), (EXPERTS, WIDTH, WIDTH)
    return MoE(*(jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32) for shape in shapes))


def loss(model: MoE, example: Any, *, key: Any = None) -> Any:
    """With noise, whose keys Levanter saves."""
    x = example.array + 0.1 * jax.random.normal(key, example.array.shape)
    return jnp.square(model(x) - example.array).mean()


def examples(seed: int = 0) -> ListAsyncDataset:
    rows = np.random.default_rng(seed).normal(size=(STEPS * BATCH, WIDTH)).astype(np.float32)
    return ListAsyncDataset([hax.named(row, "width") for row in rows])


def make(folder: Path) -> Trainer:
    checkpoints = CheckpointerConfig(str(folder / "checkpoints"), save_interval=None, keep=[{"every": EVERY}])
    config = TrainerConfig(
        id="tiny", num_train_steps=STEPS, tracker=levanter.tracker.NoopConfig(), log_dir=folder,
        log_jaxprs=False, log_xla_hlo=False, train_batch_size=BATCH, checkpointer=checkpoints,
    )  # fmt: skip
    return Trainer(config, optax.adam(0.02), loss)


class Killed(Exception):
    pass


def kill(info: Any) -> None:
    if info.step == KILLED:
        raise Killed


def train(trainer: Trainer, seed: int = 0) -> int:
    """On from the last checkpoint, if there is one; the first step that is taken."""
    with trainer:
        state = trainer.initial_state(jax.random.PRNGKey(0), model=model())
        first = int(state.step)
        trainer.train(state, trainer.data_loader(examples(seed)).iter_from_step(first))
    return first


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    with audited(folder) as audit:
        trainer = make(folder)
        attach(trainer, audit)
        train(trainer)
    return folder


def test_a_run_that_is_killed_resumed_and_rolled_back(unbroken: Path, tmp_path: Path) -> None:
    trainer = make(tmp_path)
    with audited(tmp_path) as audit:
        attach(trainer, audit)
        trainer.add_hook(kill)
        with pytest.raises(Killed):
            train(trainer)

    with audited(tmp_path, resume=True) as audit:
        trainer = make(tmp_path)
        attach(trainer, audit)
        assert train(trainer) == SAVED + 1
        assert_same_history(tmp_path, unbroken)
        checkpoint = str(tmp_path / "checkpoints" / "tiny" / f"step-{SAVED}")
        config = dataclasses.replace(trainer.config, load_checkpoint_path=checkpoint)
        trainer.config = dataclasses.replace(config, num_train_steps=STEPS - 6)
        assert train(trainer, seed=1) == SAVED + 1
        found, wanted = audit.history, open_history(unbroken)
        assert found.step.values.tolist() == list(range(STEPS - 6))
        assert (found.loss != wanted.loss).sel(step=slice(SAVED + 1, None)).all()
        trainer.config = config
        assert train(trainer) == SAVED + 1
    assert_same_history(tmp_path, unbroken)
    rows = [(each["from_step"], each["rows"]) for each in replaced(tmp_path)]
    assert rows == [(SAVED + 1, STEPS - SAVED - 1), (SAVED + 1, STEPS - SAVED - 7)]


def test_a_checkpoint_without_an_audit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(tmp_path)
    trainer.add_hook(kill)
    with pytest.raises(Killed):
        train(trainer)
    with audited(tmp_path) as audit:
        trainer = make(tmp_path)
        attach(trainer, audit)
        assert train(trainer) == SAVED + 1
        assert audit.history.step.values.tolist() == list(range(SAVED + 1, STEPS))
    assert f"no checkpoint of step {SAVED} holds what the rules remember" in caplog.text
