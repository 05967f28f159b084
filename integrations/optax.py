"""The audit as a gradient transformation: it sees parameters and gradients and changes nothing.

    from moe_rules_callback.integrations.optax import audit_transform

    example = {"loss": jnp.zeros(()), "router_probs": jnp.zeros((tokens, experts))}
    tx = optax.chain(audit_transform(audit, example), optax.clip_by_global_norm(1.0), optax.adamw(3e-4))
    opt_state = tx.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        (loss, probs), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
        metrics = {"loss": loss, "router_probs": probs}
        updates, opt_state = tx.update(grads, opt_state, params, metrics=metrics)
        return optax.apply_updates(params, updates), opt_state

    for batch in batches:
        params, opt_state = step(params, opt_state, batch)
        audit.drain(opt_state)

The audit's state is part of the optimizer's state: donated, sharded and saved with it. Place matters:
first in the chain the audit sees the gradients as computed, after clipping the clipped ones, at the
end the updates themselves.

Orbax restores it with the rest, in a new process into a callback with `resume=True`, or in the middle of a
run. The rows that follow are those of an unbroken run, and replace what came after the checkpoint:

    state = {"params": params, "opt_state": opt_state}
    manager.save(step, args=ocp.args.StandardSave(state))
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, state)
    state = manager.restore(step, args=ocp.args.StandardRestore(abstract))

Other rules remember other things: Orbax says that trees or shapes differ, and the history goes on in a new
store. Restore all but the audit's state then, and of that the number of the step, with a new manager (one
that has saved, or tried to restore, takes no other kind of arguments):

    def is_audit(node):
        return isinstance(node, AuditState)

    rest = jax.tree.map(lambda x: {"step": x.step} if is_audit(x) else x, abstract, is_leaf=is_audit)
    args = ocp.checkpoint_utils.construct_restore_args(rest)
    saved = manager.restore(step, args=ocp.args.PyTreeRestore(rest, args, partial_restore=True))
    state = jax.tree.map(
        lambda new, old: replace(new, step=old["step"]) if is_audit(new) else old,
        state, saved, is_leaf=is_audit,
    )

Inside other wrappers: `optax.inject_hyperparams`, `optax.masked` and `optax.partition` hand metrics on (the
last two show the audit their share of the gradients only). Inside `optax.MultiSteps` there is one row for
each emitted update, with the mean gradients and the last micro-batch's metrics; for a row of every
micro-batch put the audit before `MultiSteps(..).gradient_transformation()` in a chain. Inside
`optax.apply_if_finite` the rows of rejected steps, the interesting ones, are rejected too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import optax

from moe_rules_callback.errors import MetricsError

if TYPE_CHECKING:
    from moe_rules_callback import Audit, RuleAuditCallback


def audit_transform(
    audit: Audit | RuleAuditCallback, metrics: Mapping[str, Any]
) -> optax.GradientTransformationExtraArgs:
    """A transformation that evaluates `audit` at every update and returns the updates as they came.

    Its `update` takes the step's metrics as the keyword `metrics` and adds `params` and `grads` to them.

    Args:
        audit: rules to evaluate. A `RuleAuditCallback` also drains and stores what they say.
        metrics: an example of what `update` will get: arrays or `jax.ShapeDtypeStruct`, of which only
            structure, shapes and dtypes count.

    Returns:
        A transformation whose state is an `AuditState`.

    Raises:
        MetricsError: by `update`, when called without `metrics` or without `params`.
    """

    def init(params: optax.Params) -> Any:
        return audit.init({**metrics, "params": params, "grads": params})

    def update(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del extra_args
        if metrics is None or params is None:
            raise MetricsError(
                f"The audit in this optimizer got no `{'metrics' if metrics is None else 'params'}`. Call "
                "tx.update(grads, opt_state, params, metrics={...}). In Flax: optimizer.update(model, "
                "grads, metrics={...}) of nnx.Optimizer, or flax_linen.AuditTrainState in place of "
                "TrainState. A wrapper made by `gradient_transformation()` drops keywords: wrap less."
            )
        return updates, audit.update(state, {**metrics, "params": params, "grads": updates})

    return optax.GradientTransformationExtraArgs(init, update)
