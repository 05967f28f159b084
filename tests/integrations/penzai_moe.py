"""The tiny MoE in Penzai, and the ways in that it is tested with."""

from __future__ import annotations

from typing import Any

import jax
from conformance import Shown, beside, inside_optax
from penzai import pz
from tiny_moe import LAYERS, make_weights, mixture, route, stacked_weights

from moe_rules_callback.integrations import penzai


def parameter(array: jax.Array, label: str, *axes: str) -> pz.Parameter:
    """A parameter whose last axes have names; an axis before them counts layers."""
    named = pz.nx.wrap(array).tag(*("layer",) * (array.ndim - len(axes)), *axes)
    return pz.Parameter(value=named, label=label)


@pz.pytree_dataclass
class Router(pz.nn.Layer):
    kernel: pz.Parameter

    def __call__(self, x: Any, /, **_: Any) -> pz.nx.NamedArray:
        kernel = self.kernel.value.untag("width", "experts")
        return pz.nx.nmap(route)(kernel, x.untag("tokens", "width")).tag("tokens", "experts")


@pz.pytree_dataclass
class Block(pz.nn.Layer):
    router: Router
    experts: pz.Parameter

    @classmethod
    def of(cls, weights: dict[str, Any], name: str) -> Block:
        router = Router(parameter(weights["router"]["kernel"], f"{name}/router.kernel", "width", "experts"))
        return cls(router, parameter(weights["experts"], f"{name}/experts", "experts", "width", "out"))

    def __call__(self, x: Any, /, **_: Any) -> pz.nx.NamedArray:
        probs = self.router(x).untag("tokens", "experts")
        experts = self.experts.value.untag("experts", "width", "out")
        return x + pz.nx.nmap(mixture)(probs, experts, x.untag("tokens", "width")).tag("tokens", "width")


def start() -> Any:
    return pz.freeze_params(
        pz.nn.Sequential([Block.of(weights, f"block_{i}") for i, weights in enumerate(make_weights())])
    )


def start_stacked() -> Any:
    return pz.freeze_params(pz.nn.LayerStack(Block.of(stacked_weights(), "blocks"), "layer", LAYERS))


def captured(model, x):
    run = penzai.capture(pz.select(model).at_instances_of(Router))
    y, probs = run(pz.nx.wrap(x).tag("tokens", "width"))
    return y.unwrap("tokens", "width"), {"router_probs": probs}


def returned(model, x):
    """As `captured`, but NamedArrays with their axes in an order of their own, as a model may return them."""
    y, metrics = captured(model, x)
    probs = [pz.nx.wrap(probs.T).tag("experts", "tokens") for probs in metrics["router_probs"].values()]
    return y, {"intermediates": probs}


MODELS = {
    "penzai-returned": (Shown(start, returned), beside),
    "penzai-captured": (Shown(start, captured), beside, inside_optax),
    "penzai-stack-captured": (Shown(start_stacked, captured, 0), beside, inside_optax),
}
