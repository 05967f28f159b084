"""Rules as one of the hooks that a CLU training loop calls after each step, beside `clu.periodic_actions`.

    step_fn = jax.jit(audit.watch(train_step))                # a whole step, or the loss in it
    hooks += [PeriodicRuleAudit(audit)]

    for step in range(steps):
        state, loss = step_fn(state, batch)
        for hook in hooks:
            hook(step)

CLU's actions take nothing but the step and the time, so these rows are without a loss. Where the loop has it,
call this hook by itself, with metrics by name, as a `PeriodicCallback` takes them:

    audited(step, loss=loss)                                  # watched, or
    audited(step, loss=loss, router_probs=probs)              # from the step's results

With a checkpoint save `audit.state`, and hand it to `audit.restore` when the checkpoint is restored.

`clu` itself is never imported: its actions want TensorFlow, and this one needs nothing of theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moe_rules_callback import RuleAuditCallback


class PeriodicRuleAudit:
    """Called like a `clu.periodic_actions.PeriodicCallback` with `every_steps=1`.

    Args:
        audit: whose `on_step` is called.
    """

    def __init__(self, audit: RuleAuditCallback) -> None:
        self._audit = audit

    def __call__(self, step: int, t: float | None = None, **metrics: Any) -> bool:
        """Take in a step.

        Args:
            step: its number, at least 0.
            t: CLU's time of the call, not used.
            metrics: as for `RuleAuditCallback.on_step`.

        Returns:
            True, since it acts on every step.
        """
        self._audit.on_step(metrics, step)
        return True
