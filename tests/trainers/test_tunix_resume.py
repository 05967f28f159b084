# pyright: reportMissingImports=false
"""PeftTrainer goes on from its own checkpoints: the history is that of a run that was not killed."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from resumed_trainer import assert_same_history, audited, replaced

pytest.importorskip("tunix", reason="google-tunix is not installed")
import optax
import orbax.checkpoint as ocp
from flax import nnx
from moe_rules_callback.integrations.tunix import attach
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from moe_rules_callback import open_history

EXPERTS, ACCUMULATED = 4, 2
STEPS, SAVED, EVERY, KILLED = 40, 24, 12, 30


class MoE(nnx.Module):
    """With noise, whose key and count the trainer saves with the model."""

    def __init__(self) -> None:
        self.router = nnx.Param(jax.random.normal(jax.random.key(0), (4, EXPERTS)))
        self.experts = nnx.Param(jax.random.normal(jax.random.key(1), (EXPERTS, 4, 4)))
        self.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, index = jax.lax.top_k(jax.nn.softmax(self.dropout(x) @ self.router[...]), 2)
        mask = (jax.nn.one_hot(index, EXPERTS) * gate[..., None]).sum(-2)
        return jnp.einsum("te,ti,eio->to", mask, x, self.experts[...])


def loss_fn(model: MoE, x: jax.Array) -> jax.Array:
    return jnp.square(model(x) - x).mean()


def batches(seed: int = 0) -> list[dict[str, np.ndarray]]:
    x = np.random.default_rng(seed).normal(size=(STEPS * ACCUMULATED, 5, 4)).astype(np.float32)
    return [{"x": each} for each in x]


class Killed(Exception):
    pass


class Kill(TrainingHooks):
    """After so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_start(self, train_ctx: PeftTrainer) -> None:
        pass

    def on_train_end(self, train_ctx: PeftTrainer) -> None:
        pass

    def on_train_step_start(self, train_ctx: PeftTrainer) -> None:
        if train_ctx.train_steps == self.steps:
            raise Killed

    def on_train_step_end(self, train_ctx: PeftTrainer, train_step: int, train_loss: float) -> None:
        pass

    def on_eval_step_start(self, train_ctx: PeftTrainer) -> None:
        pass

    def on_eval_step_end(self, train_ctx: PeftTrainer, eval_loss: float) -> None:
        pass


def make(folder: Path) -> PeftTrainer:
    """From the last checkpoint, if there is one."""
    saving = ocp.CheckpointManagerOptions(save_interval_steps=EVERY, max_to_keep=2)
    config = TrainingConfig(
        eval_every_n_steps=100, max_steps=STEPS, gradient_accumulation_steps=ACCUMULATED,
        checkpoint_root_directory=str(folder / "checkpoints"), checkpointing_options=saving,
        pbar_description=None,
    )  # fmt: skip
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=lambda step: 0.1 / (1 + step))
    return PeftTrainer(MoE(), optimizer, config).with_loss_fn(loss_fn)


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints" / "rule_audit").iterdir()}


def train(folder: Path, seed: int = 0, resume: bool = False, until: int | None = None) -> int:
    """On from the last checkpoint, if there is one; how many steps were taken before."""
    trainer = make(folder)
    first = trainer.train_steps
    with audited(folder, resume=resume, signals=["learning_rate", "grad_norm"]) as audit:
        attach(trainer, audit)
        if until is None:
            trainer.train(batches(seed))
        else:
            trainer.with_training_hooks(Kill(until))
            with pytest.raises(Killed):
                trainer.train(batches(seed))
            trainer.checkpoint_manager.close()  # until what it saves is there
    return first


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(folder) == 0
    return folder


def test_a_run_that_is_killed_and_resumed_twice(unbroken: Path, tmp_path: Path) -> None:
    """The first time it goes on with other batches, which are not what is left."""
    assert train(tmp_path, until=KILLED) == 0
    assert train(tmp_path, seed=1, resume=True, until=KILLED + 4) == SAVED
    found, wanted = open_history(tmp_path), open_history(unbroken)
    assert (found.loss != wanted.loss).sel(step=slice(SAVED + 1, KILLED)).all()
    assert train(tmp_path, resume=True) == SAVED
    assert_same_history(tmp_path, unbroken)
    assert [each["from_step"] for each in replaced(tmp_path)] == 2 * [SAVED + 1]


def test_files_go_with_the_checkpoints(unbroken: Path) -> None:
    """The trainer keeps two, and a moment longer the third."""
    assert files(unbroken) - {"24.npz"} == {"36.npz", "40.npz"}


def test_a_checkpoint_without_an_audit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(tmp_path)
    trainer.with_training_hooks(Kill(KILLED))
    with pytest.raises(Killed):
        trainer.train(batches())
    trainer.checkpoint_manager.close()
    assert train(tmp_path) == SAVED
    assert open_history(tmp_path).step.values.tolist() == list(range(SAVED + 1, STEPS + 1))
    assert f"no checkpoint of step {SAVED} holds what the rules remember" in caplog.text
