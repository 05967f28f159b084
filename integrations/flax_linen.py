"""Router probabilities from Flax Linen, and a `TrainState` that carries the audit.

What the model returns needs no adapter. Otherwise let the router record its probabilities and hand over
the collection as it is:

    self.sow("intermediates", "router_probs", probs)                        # in the router
    y, updated = model.apply(variables, x, mutable=["intermediates"])
    audit.on_step({"loss": loss, "intermediates": updated})

Without touching the model, `capture_intermediates=True` records what `__call__` methods return; name the
router's: `router_probs(updated, "router/__call__")`. Keep `intermediates` out of the `variables` that
go in, or each call adds to the last. Blocks under `nn.scan` give arrays with a leading layer axis:
`RuleAuditCallback(rules, layer_axis=0)`.

Inside the step:

    tx = optax.chain(audit_transform(audit, example_metrics), optax.adamw(3e-4))
    state = AuditTrainState.create(apply_fn=model.apply, params=params, tx=tx)
    state = state.apply_gradients(grads=grads, metrics={"loss": loss, "intermediates": updated})
    audit.drain(state)                                                      # in the loop

Orbax saves and restores the state, `StandardSave(state)`, and with it the audit's, see `optax`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import traverse_util
from flax.core import FrozenDict
from flax.training.train_state import TrainState

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.hookspecs import hookimpl

from ._sown import probs_by_layer


class AuditTrainState(TrainState):
    """A `TrainState` that hands the metrics of a step on to `tx.update`, where `audit_transform` waits."""

    def apply_gradients(self, *, grads: Any, metrics: Mapping[str, Any], **kwargs: Any) -> AuditTrainState:
        """`TrainState.apply_gradients` with the step's metrics.

        Args:
            grads: gradients, in the structure of `params`.
            metrics: what the audit evaluates; `params` and `grads` are added to it.
            **kwargs: further fields to replace.
        """

        tx = optax.with_extra_args_support(self.tx)

        def update(updates: Any, state: Any, params: Any = None) -> Any:
            return tx.update(updates, state, params, metrics=metrics)

        handing_on = self.replace(tx=optax.GradientTransformation(tx.init, update))
        return super(AuditTrainState, handing_on).apply_gradients(grads=grads, **kwargs).replace(tx=self.tx)


def router_probs(intermediates: Mapping[str, Any], name: str = "router_probs") -> dict[str, jax.Array]:
    """Router probabilities by layer, from the collection that `sow` fills.

    Args:
        intermediates: the collection, or all updated collections that `apply` returned.
        name: the name given to `sow`, or `__call__` where `apply` captured them; preceded by the names of
            enclosing modules where it takes more to tell: `"router/__call__"`.

    Returns:
        Path of the module, such as `blocks_0/moe` -> array [.., tokens, experts].

    Raises:
        MetricsError: there is nothing, nothing of that name, or something else than arrays.
    """
    recorded = _flat(intermediates)
    if not recorded:
        raise MetricsError(
            "Linen's `intermediates` are empty. Usual causes: apply was called without "
            'mutable=["intermediates"]; nothing was sown; or the sowing module sits under nn.scan, which '
            'drops what is sown unless it says variable_axes={"params": 0, "intermediates": 0}.'
        )
    return probs_by_layer(recorded.items(), name)


@hookimpl
def find_router_probs(source: Any) -> dict[str, jax.Array] | None:
    """Take part in `find_router_probs` for nested dicts whose every entry is a tuple, as `sow` makes them."""
    if not isinstance(source, dict | FrozenDict):
        return None
    sown = all(isinstance(entry, tuple) for entry in _flat(source).values())
    return router_probs(source) if sown else None


def _flat(collections: Any) -> dict[tuple[str, ...], Any]:
    """Path -> entry, of the collection `intermediates` where there are several."""
    return traverse_util.flatten_dict(collections.get("intermediates", collections))
