# pyright: reportMissingImports=false
"""Rules over the routers of a model that Levanter's `Trainer` trains (`pip install marin-levanter`).

    audit = RuleAuditCallback("router_health", logdir="runs/demo")
    attach(trainer, audit)
    trainer.train(state, loader)

Routers are found in the loss, whatever the model, and named by the path of their weights. Every optimizer
step makes one row, also of several micro-batches; evaluation makes none.

What the rules remember lies in Levanter's own checkpoints, as `rule_audit.npz`, and comes back with the state
that `initial_state` loads from them, in a new process or for a rollback in the same one:

    audit = RuleAuditCallback("router_health", logdir="runs/demo", resume=True)
    attach(trainer, audit)
    state = trainer.initial_state(key, model_init=model_init)
    trainer.train(state, loader.iter_from_step(int(state.step)))

That is so for the checkpoints of Levanter's default hooks. Where a trainer has others, save `audit.state`
with them, and hand it to `audit.restore`. Rules that have changed begin anew.

Levanter's Mixtral logs its auxiliary losses in the forward pass, in a way that JAX cannot differentiate. To
train it, with or without an audit, let the loss function return what is logged:

    def loss_function(model, example, *, key=None):
        with levanter.tracker.defer_tracker_for_jit() as logged:
            loss = model.compute_next_token_loss(example, key=key)
        return loss, logged
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from levanter.checkpoint import Checkpointer, discover_checkpoint_candidates
from levanter.schedule import distinct_values

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.paths import as_path, is_there, put

from ._remembered import restore, written

if TYPE_CHECKING:
    from levanter.trainer import Trainer, TrainerConfig

    from moe_rules_callback import RuleAuditCallback
    from moe_rules_callback.tracing.routers import Choice

log = logging.getLogger("moe_rules_callback")
REMEMBERED = "rule_audit.npz"  # in the folder of a checkpoint


def attach(trainer: Trainer, audit: RuleAuditCallback, *, routers: Choice = None) -> None:
    """Audit what `trainer` trains from here on; losses and parameters stay what they are, to the bit.

    Rows carry Levanter's own step numbers, from 0 or from where a checkpoint ended, and the loss. They are
    in `audit.history` when `train` returns; a further `train` goes on with them. `audit` stays open.

    Args:
        trainer: before its first step.
        audit: has no other source of router metrics.
        routers: as for `RuleAuditCallback.watch`.

    Raises:
        MetricsError: the audit is in use, or a schedule of batch sizes changes the number of micro-batches.
        TracingError: by the first step: no router is found.
    """
    forwards = _forwards_per_step(trainer.config)
    # Not the function that the trainer was given: optimizers that ask for curvature differentiate that too.
    trainer.loss_fn = audit.watch(trainer.loss_fn, forwards_per_step=forwards, routers=routers)
    step, run_hooks, expected = trainer.train_step, trainer.run_hooks, 0

    @functools.wraps(step)
    def train_step(state: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal expected
        if (number := int(state.step)) != expected:  # a checkpoint was loaded
            _restore(audit, trainer, number - 1)
        info = step(state, *args, **kwargs)
        expected = info.next_step
        return info

    @functools.wraps(run_hooks)
    def hooks(info: Any, force: bool = False) -> None:
        """After every step, and forced once more after the last. One of them saves checkpoints."""
        if not force:
            audit.on_step({"loss": info.loss}, info.step)  # Levanter has waited for both
        run_hooks(info, force)
        if force:
            audit.flush()

    trainer.train_step, trainer.run_hooks = train_step, hooks
    for checkpointer in _checkpointers(trainer):
        checkpointer.save_checkpoint = _saving(audit, checkpointer)


def _checkpointers(trainer: Trainer) -> Iterator[Checkpointer]:
    """Those of Levanter's default hooks, where nothing but a closure holds them."""
    for hook in trainer.hooks.hooks:
        if inspect.isfunction(function := getattr(hook.fn, "fn", None)):
            held = inspect.getclosurevars(function).nonlocals.values()
            yield from (each for each in held if isinstance(each, Checkpointer))


def _saving(audit: RuleAuditCallback, checkpointer: Checkpointer) -> Any:
    """`save_checkpoint`, with what the rules remember in the same folder.

    It is written first: a folder is a checkpoint when Levanter has written all of its own.
    """
    save = checkpointer.save_checkpoint

    @functools.wraps(save)
    def save_checkpoint(
        tree: Any, step: int, destination: str, *args: Any, base_path_override: Any = None, **kwargs: Any
    ) -> None:
        folder = as_path(base_path_override or checkpointer.base_path) / destination
        try:
            if (state := audit.state) is not None:
                put({folder / REMEMBERED: written(state)})
        except Exception:
            log.exception("what the rules remember at step %d was not saved; training goes on", step)
        save(tree, step, destination, *args, base_path_override=base_path_override, **kwargs)

    return save_checkpoint


def _restore(audit: RuleAuditCallback, trainer: Trainer, step: int) -> None:
    """Go on from the checkpoint after a step."""
    found = discover_checkpoint_candidates(*trainer.checkpoint_search_paths)
    files = [as_path(each.path) / REMEMBERED for each in found if each.step == step]
    file = next(filter(is_there, files), None)
    if file is None:
        log.warning("no checkpoint of step %d holds what the rules remember: they begin anew", step)
        return
    restore(audit, file)


def _forwards_per_step(config: TrainerConfig) -> int:
    """Micro-batches of a step."""
    size, batches = config.microbatch_size, distinct_values(config.train_batch_size)
    counts = {1 if size is None else max(1, batch // size) for batch in batches}
    if len(counts) > 1:
        raise MetricsError(
            f"The batch sizes {sorted(batches)} make {sorted(counts)} micro-batches of {size}; one number is "
            "needed, the same in every step. Leave per_device_parallelism at -1, or keep one batch size."
        )
    return counts.pop()
