# pyright: reportMissingImports=false
"""The audit beside a trainer of google-tunix: `PeftTrainer`, and those of DPO, distillation and RL above it.

    audit = RuleAuditCallback("router_health", logdir="runs/qwen3")
    attach(trainer, audit)
    trainer.train(batches)

Routers are found in the loss, whatever the model, with adapters of LoRA or without, and named by the path of
their weights. Every optimizer step makes one row, also of several micro-batches; evaluation makes none.

Rows carry the trainer's step numbers, from 1 or from where a checkpoint ended, and what it logs of the step:
loss, perplexity, grad_norm, rewards; its learning_rate is that of the step after. The trainer logs a step
while the next one runs, and the last one when it is closed. `train` closes it, so that all rows are in
`audit.history` when it returns; where a learner of `tunix.rl` calls `train`, the cluster does.

What the rules remember is saved in `rule_audit` beside the trainer's checkpoints, a step after each of them,
when its row is there. A trainer that is made anew goes on from its last checkpoint, and the rules with it:

    audit = RuleAuditCallback("router_health", logdir="runs/qwen3", resume=True)
    attach(trainer, audit)
    trainer.train(batches)  # the same as before: it passes over those that it has seen

Rules that have changed begin anew.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from orbax.checkpoint.utils import checkpoint_steps
from tunix.sft.hooks import TrainingHooks

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.paths import AnyPath, as_path, is_there, names_in, put

from ._remembered import restore, written

if TYPE_CHECKING:
    from tunix.sft.peft_trainer import PeftTrainer

    from moe_rules_callback import RuleAuditCallback
    from moe_rules_callback.tracing.routers import Choice

log = logging.getLogger("moe_rules_callback")


def attach(trainer: PeftTrainer, audit: RuleAuditCallback, *, routers: Choice = None) -> None:
    """Audit what `trainer` trains from here on; losses and parameters stay what they are, to the bit.

    Call it when the trainer has its loss, in RL after the learner is made. Training hooks may be set with
    `with_training_hooks` before or after. `audit` stays open, for a further `train`.

    Args:
        trainer: before its first step.
        audit: has no other source of router metrics.
        routers: as for `RuleAuditCallback.watch`.

    Raises:
        MetricsError: the audit is in use; by `train`: the trainer was given another loss after this.
        TracingError: by the first step: no router is found.
    """
    accumulated = trainer.config.get_with_default("gradient_accumulation_steps", 1)
    trainer.loss_fn = audit.watch(trainer.loss_fn, forwards_per_step=accumulated, routers=routers)
    trainer.clear_jit_cache()
    hooks = _Hooks(trainer, audit)
    trainer.training_hooks = hooks
    trainer.with_training_hooks = hooks.with_others  # would take the one place there is
    trainer.metrics_logger.log = hooks.log
    if (root := trainer.config.checkpoint_root_directory) is not None:
        hooks.remembered = remembered = _Remembered(audit, root)
        if trainer.train_steps:
            remembered.restore(trainer.train_steps)
        trainer.checkpoint_manager.save = remembered.noting(trainer.checkpoint_manager.save)


class _Remembered:
    """What the rules remember at the steps that the trainer saves, in files beside its checkpoints."""

    def __init__(self, audit: RuleAuditCallback, root: str) -> None:
        self._audit, self._root = audit, as_path(root)
        self._saved = self._ended = 0  # steps of the trainer's last checkpoint and of the last row

    def noting(self, save: Callable[..., bool]) -> Callable[..., bool]:
        """`save` of the trainer's checkpoint manager. The row of the step comes later, but for the last."""

        @functools.wraps(save)
        def noted(step: int, *args: Any, **kwargs: Any) -> bool:
            saved = save(step, *args, **kwargs)
            if saved:
                self._saved = step
                self.save(self._ended)
            return saved

        return noted

    def save(self, ended: int) -> None:
        """Write a file if the last row is that of the last checkpoint, and remove those of checkpoints that
        Orbax has removed."""
        self._ended = ended
        if ended == self._saved:
            try:
                self._write(ended)
            except Exception:
                log.exception("what the rules remember at step %d was not saved; training goes on", ended)

    def _write(self, step: int) -> None:
        if (state := self._audit.state) is None:
            return
        put({(file := self._file(step)): written(state)})
        kept = {self._file(each).name for each in (*checkpoint_steps(str(self._root)), step)}
        for name in set(names_in(file.parent)) - kept:
            (file.parent / name).unlink()

    def restore(self, step: int) -> None:
        """Go on from the checkpoint of a step."""
        if is_there(file := self._file(step)):
            restore(self._audit, file)
        else:
            log.warning("no checkpoint of step %d holds what the rules remember: they begin anew", step)

    def _file(self, step: int) -> AnyPath:
        return self._root / "rule_audit" / f"{step}.npz"


class _Hooks(TrainingHooks):
    """Calls `on_step`, and the hooks that the user has set.

    The trainer logs and ends a step while the next one runs, with numbers that it has on the host by then.
    """

    def __init__(self, trainer: PeftTrainer, audit: RuleAuditCallback) -> None:
        self._audit, self._watched, self._others = audit, trainer.loss_fn, trainer.training_hooks
        self._log, self._prefix = trainer.metrics_logger.log, trainer.metrics_prefix
        self._scalars: dict[str, Any] = {}
        self._trained = False
        self.remembered: _Remembered | None = None  # where the trainer saves checkpoints

    def with_others(self, training_hooks: TrainingHooks | None) -> None:
        self._others = training_hooks

    def log(self, metrics_prefix: str, metric_name: str, scalar_value: Any, mode: str, step: int) -> None:
        """`log` of the trainer's logger, noting what belongs to the step that is about to end."""
        if (metrics_prefix, mode) == (self._prefix, "train") and np.ndim(scalar_value) == 0:
            self._scalars[metric_name] = scalar_value
        self._log(metrics_prefix, metric_name, scalar_value, mode, step)

    def on_train_start(self, train_ctx: PeftTrainer) -> None:
        if train_ctx.loss_fn is not self._watched:
            raise MetricsError(
                "the trainer has another loss than the one that is watched. Usual cause: with_loss_fn, or a "
                "learner of tunix.rl, was called after attach. Call attach(trainer, audit) after them."
            )
        self._trained = False
        if self._others:
            self._others.on_train_start(train_ctx)

    def on_train_step_start(self, train_ctx: PeftTrainer) -> None:
        if self._others:
            self._others.on_train_step_start(train_ctx)

    def on_train_step_end(self, train_ctx: PeftTrainer, train_step: int, train_loss: Any) -> None:
        self._audit.on_step(self._scalars | {"loss": train_loss}, train_step)
        self._scalars = {}
        if self.remembered is not None:
            self.remembered.save(train_step)
        if self._others:
            self._others.on_train_step_end(train_ctx, train_step, train_loss)
        if self._trained:  # the last step, which ends when the trainer is closed
            self._audit.flush()

    def on_train_end(self, train_ctx: PeftTrainer) -> None:
        self._trained = True
        if self._others:
            self._others.on_train_end(train_ctx)

    def on_eval_step_start(self, train_ctx: PeftTrainer) -> None:
        if self._others:
            self._others.on_eval_step_start(train_ctx)

    def on_eval_step_end(self, train_ctx: PeftTrainer, eval_loss: Any) -> None:
        if self._others:
            self._others.on_eval_step_end(train_ctx, eval_loss)
