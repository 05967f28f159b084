"""Router probabilities from Penzai.

What the model returns needs no adapter but for its named axes: hand NamedArrays over as `intermediates`, and
the axis `experts` becomes the last one. Without touching the model, select its routers:

    def loss_fn(model, x, y):                                   # of NamedArrays
        run = capture(pz.select(model).at_instances_of(Router))
        predicted, probs = run(x)                               # called as you would call `model`
        loss = pz.nx.nmap(jnp.square)(predicted - y).unwrap("batch", "tokens", "width").mean()
        return loss, probs

    model = pz.freeze_params(model)
    (loss, probs), grads = jax.value_and_grad(loss_fn, has_aux=True)(model, x, y)
    audit.on_step({"loss": loss, "router_probs": probs, "params": model, "grads": grads})

A loss is unwrapped, so that it is a scalar array. Routers inside a `pz.nn.LayerStack` give arrays with a
leading layer axis: `RuleAuditCallback(rules, layer_axis=0)`.

A model that keeps its probabilities in StateVariables hands these over, labelled by layer:

    _, variables = pz.unbind_state_vars(model, freeze=True)
    audit.on_step({"loss": loss, "intermediates": variables})

Rules about routers and experts know parameters by their attributes, as in the frozen model above. The tuple
that `pz.unbind_params` makes has none: put gradients into the model, `pz.bind_variables(unbound, grads)`.
`audit_transform` works with either; `toolshed.basic_training` hands no metrics on, so there the loss function
returns them as `aux_outputs`, and `audit.on_step(trainer.step(...))` takes them.

Orbax saves and restores the frozen model and the optimizer's state as they are, and in it the audit's, see
`optax`; beside the step save `audit.state` with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from penzai import pz
from penzai.nn.layer_stack import LayerStackVarBehavior, layerstack_axes_from_keypath
from penzai.toolshed.save_intermediates import SaveIntermediate

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.hookspecs import hookimpl

from ._sown import layer_name


def capture(
    routers: pz.Selection, experts: str = "experts"
) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """A function that calls the model and also returns what the selected routers returned.

    Args:
        routers: layers of the model that return probabilities, as a NamedArray. The model is not changed.
        experts: name of the axis that counts the experts.

    Returns:
        `run(argument, **side_inputs) -> (output, {path: array [.., tokens, experts]})`; a path reads
        `sublayers/0/router`. Of a router that is called several times the last call counts.

    Raises:
        MetricsError: by `run`: a router was not called, or returned no NamedArray with the axis `experts`.
    """

    def run(argument: Any, /, **side_inputs: Any) -> tuple[Any, dict[str, jax.Array]]:
        saved: dict[str, pz.StateVariable] = {}

        def recording(path: Any, router: Any) -> pz.nn.Layer:
            per_layer = dict.fromkeys(layerstack_axes_from_keypath(path), LayerStackVarBehavior.PER_LAYER)
            variable = pz.StateVariable(value=None, metadata={"layerstack_axes": per_layer})
            saved[layer_name(path)] = variable
            return pz.nn.Sequential([router, SaveIntermediate(variable)])

        y = routers.apply(recording, with_keypath=True)(argument, **side_inputs)
        return y, {layer: _positional(layer, variable.value, experts) for layer, variable in saved.items()}

    return run


def router_probs(source: Any, experts: str = "experts") -> dict[str, jax.Array]:
    """Router probabilities by layer, from NamedArrays.

    Args:
        source: a NamedArray, or a pytree of NamedArrays or of frozen StateVariables that hold them.
        experts: name of the axis that counts the experts.

    Returns:
        Path of the array, or label of the variable -> array [.., tokens, experts]: other axes in their order.

    Raises:
        MetricsError: something else than a NamedArray with that axis.
    """

    def is_leaf(node: Any) -> bool:
        return pz.nx.is_namedarray(node) or isinstance(node, pz.StateVariableValue)

    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(source, is_leaf=is_leaf):
        labelled = isinstance(leaf, pz.StateVariableValue)
        layer = str(leaf.label) if labelled else layer_name(path) or "router"
        found[layer] = _positional(layer, leaf.value if labelled else leaf, experts)
    return found


@hookimpl
def find_router_probs(source: Any) -> dict[str, jax.Array] | None:
    """Take part in `find_router_probs` for NamedArrays and for pytrees of nothing else."""
    leaves = jax.tree.leaves(source, is_leaf=pz.nx.is_namedarray)
    return router_probs(source) if leaves and all(map(pz.nx.is_namedarray, leaves)) else None


def _positional(layer: str, value: Any, experts: str) -> jax.Array:
    if value is None:
        raise MetricsError(f"The router {layer!r} was not called. Select layers that the model runs.")
    axes = value.named_shape if pz.nx.is_namedarray(value) else {}
    if experts not in axes:
        raise MetricsError(
            f"The router probabilities of {layer!r} are a {type(value).__name__} with the axes "
            f"{list(axes)}; expected a NamedArray with the axis {experts!r}. Name the one that counts the "
            "experts: capture(selection, experts=...) or router_probs(arrays, experts=...)."
        )
    return value.unwrap(*(axis for axis in axes if axis != experts), experts)
