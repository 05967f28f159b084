"""Rules over the routers of a model that Levanter's `Trainer` trains (`pip install marin-levanter`).

    audit = RuleAuditCallback("router_health", logdir="runs/demo")
    attach(trainer, audit)
    trainer.train(state, loader)

Routers are found in the loss, whatever the model, and named by the path of their weights. Every optimizer
step makes one row, also of several micro-batches; evaluation makes none.

Levanter's checkpoints do not hold what the rules remember: save `audit.state` beside them, and hand it to
`audit.restore` before the next `train`.

Levanter's Mixtral logs its auxiliary losses in the forward pass, in a way that JAX cannot differentiate. To
train it, with or without an audit, let the loss function return what is logged:

    def loss_function(model, example, *, key=None):
        with levanter.tracker.defer_tracker_for_jit() as logged:
            loss = model.compute_next_token_loss(example, key=key)
        return loss, logged
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from levanter.schedule import distinct_values  # pyright: ignore[reportMissingImports]

from moe_rules_callback.errors import MetricsError

if TYPE_CHECKING:
    from levanter.trainer import Trainer, TrainerConfig  # pyright: ignore[reportMissingImports]

    from moe_rules_callback import RuleAuditCallback
    from moe_rules_callback.tracing.routers import Choice


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
    step = trainer.train_step

    @functools.wraps(step)
    def train_step(*args: Any, **kwargs: Any) -> Any:
        info = step(*args, **kwargs)
        audit.on_step({"loss": info.loss}, info.step)  # Levanter has waited for both
        return info

    def at_end(info: Any, force: bool = False) -> None:
        if force:
            audit.flush()

    # Hooks are not run after the steps 0 and 1, and once more after the last, where they are forced.
    trainer.train_step = train_step
    trainer.add_hook(at_end)


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
