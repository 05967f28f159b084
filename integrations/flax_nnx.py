"""Router probabilities from Flax NNX, and the audit inside an `nnx.Optimizer`.

What the model returns needs no adapter. Otherwise record the probabilities as `router_probs`, in one of
these ways, and hand over the state of intermediates as it is:

    self.router_probs = nnx.Intermediate(probs)              # in the router; then, after the call:
    intermediates = nnx.pop(model, nnx.Intermediate)

    self.sow(nnx.Intermediate, "router_probs", probs)        # in the router, with flax >= 0.12.6:
    y, intermediates = nnx.capture(model, nnx.Intermediate)(x)

    audit.on_step({"loss": loss, "intermediates": intermediates})

Without touching the model, `nnx.capture` records what methods return; name the router's:

    run = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
    y, intermediates = run(x)
    audit.on_step({"loss": loss, "router_probs": router_probs(intermediates, "router/__call__")})

Pop after every call: what stays in the model grows with each `sow`. (`sow` outside `nnx.capture` warns
since 0.12.8.) A module that several parents share is one layer; blocks stacked for a scan give arrays
with a leading layer axis: `RuleAuditCallback(rules, layer_axis=0)`.

Inside the step, `nnx.Optimizer` (flax >= 0.11) hands keywords on to `audit_transform`:

    tx = optax.chain(audit_transform(audit, example_metrics), optax.adamw(3e-4))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, grads, metrics={"loss": loss, "intermediates": intermediates})  # in nnx.jit
    audit.drain(optimizer)                                                                   # in the loop

In the functional form, `graphdef, state = nnx.split((model, optimizer))` and `jax.jit`, put them together
first, every few steps at least:

    audit.drain(nnx.merge(graphdef, state))

With Orbax the audit is saved and restored with the optimizer, see `optax`:

    state = nnx.state((model, optimizer))
    manager.save(step, args=ocp.args.StandardSave(state))
    abstract = jax.tree.map(ocp.tree.to_shape_dtype_struct, state)
    nnx.update((model, optimizer), manager.restore(step, args=ocp.args.StandardRestore(abstract)))

What rules that have changed since remembered is left out of a partial restore so:

    remembered = abstract[1]["opt_state"][0]                  # where audit_transform stands in the chain
    for name in remembered.keys() - {"step"}:
        del remembered[name]
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx, traverse_util

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.hookspecs import hookimpl

from ._sown import probs_by_layer


def router_probs(intermediates: nnx.State, name: str = "router_probs") -> dict[str, jax.Array]:
    """Router probabilities by layer, from `nnx.pop` or `nnx.capture`.

    Args:
        intermediates: state of `nnx.Intermediate` values, or of their bare values.
        name: the attribute, sown name or method under which the probabilities are; preceded by the names
            of enclosing modules where it takes more to tell: `"router/__call__"`.

    Returns:
        Path of the module, such as `blocks/0/moe` -> array [.., tokens, experts].

    Raises:
        MetricsError: there is nothing, nothing of that name, or something else than arrays.
    """
    recorded = traverse_util.flatten_dict(nnx.to_pure_dict(intermediates))
    if not recorded:
        raise MetricsError(
            "The state of intermediates is empty: the model has recorded nothing, or it was popped before. "
            f"Set self.{name} = nnx.Intermediate(probs) in the router and pop after each call, or wrap the "
            "call in nnx.capture(model, nnx.Intermediate)."
        )
    return probs_by_layer(recorded.items(), name)


@hookimpl
def find_router_probs(source: Any) -> dict[str, jax.Array] | None:
    """Take part in `find_router_probs` for any `nnx.State`."""
    return router_probs(source) if isinstance(source, nnx.State) else None
