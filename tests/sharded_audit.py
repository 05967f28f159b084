"""Run by test_devices.py with 8 devices: an audit of the same steps on one device and laid out over all.

python sharded_audit.py OUT.npz      # prints the collectives of the programs as JSON

A run is "LAYOUT/INDEXED/AXES", an array in the file "RUN/ARRAY/DEVICES".
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from audited import unpack
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_rules_callback import Audit
from moe_rules_callback.signals import ROUTER_SIGNALS

RULES = {
    "specialised": "0.85 :: high_routing_confidence & low_activation_entropy",
    "uneven": "always[2](high_load_cv) | decreasing_loss",
}
OF_TREES = ("weight_norm", "gradient_norm", "router_gradient_share", "expert_gradient_min_share",
            "expert_weight_cosine")  # fmt: skip
L, B, T, E, K = 4, 16, 64, 8, 2
STEPS = 4
SIZES = {"pred": 1, "s8": 1, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}
COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    r"|collective-broadcast|ragged-all-to-all)(-start)?\("
)


class Layout(NamedTuple):
    """How the arrays of a step lie on a mesh.

    Attributes:
        mesh: axis -> devices.
        tokens: axes of batch and time.
        experts: axis of the experts.
        layers: axis of layers, which are stacked in front; None: there is one layer.
        indexed: whether steps come with the experts that were used, one run for each.
        trees: whether steps come with parameters and gradients.
        apart: whether signals are left out for which the tokens of experts must come together.
    """

    mesh: dict[str, int]
    tokens: tuple[str | None, ...]
    experts: str | None = None
    layers: str | None = None
    indexed: tuple[bool, ...] = (True, False)
    trees: bool = False
    apart: bool = False

    @property
    def signals(self) -> tuple[str, ...]:
        together = {"expert_coactivation"} if self.apart else set()
        return (*(name for name in ROUTER_SIGNALS if name not in together), *(OF_TREES if self.trees else ()))

    def spec(self, key: str) -> P:
        if key in ("params", "grads"):  # experts and their inputs
            return P(*self.tokens)
        layers = () if key == "token_mask" or self.layers is None else (self.layers,)
        experts = (self.experts,) if key == "router_logits" else ()
        return P() if key == "loss" else P(*layers, *self.tokens, *experts)


LAYOUTS = {
    "tokens": Layout({"data": 8}, ("data", None), indexed=(False,)),
    "batch and time": Layout({"data": 4, "seq": 2}, ("data", "seq"), indexed=(True,), trees=True),
    # Expert-parallel: the devices along "expert" have the same router and the same tokens ..
    "replicated": Layout({"data": 2, "expert": 4}, ("data", None), indexed=(True,)),
    # .. or each the probabilities of its own experts.
    "experts": Layout({"data": 2, "expert": 4}, ("data", None), experts="expert", apart=True),
    "layers": Layout({"stage": 4, "data": 2}, ("data", None), layers="stage", indexed=(False,)),
}
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}  # of which `jax.make_mesh` makes the latter


def steps(layout: Layout, indexed: bool) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    lead = (B, T) if layout.layers is None else (L, B, T)
    found = []
    for _ in range(STEPS):
        logits = 2 * rng.normal(size=(*lead, E)).astype(np.float32)
        metrics = {
            "loss": np.float32(rng.random()),
            "router_logits": logits,
            "token_mask": rng.random((B, T)) < 0.9,
        }
        if indexed:
            metrics["expert_index"] = np.argsort(-logits, axis=-1)[..., :K].astype(np.int32)
        if layout.trees:
            weights = rng.normal(size=(E, 16, 32)).astype(np.float32)
            tree = {"router": weights[0], "experts": {"up": weights, "down": weights.swapaxes(1, 2)}}
            metrics |= {"params": tree, "grads": tree}
        found.append(metrics)
    return found


def collectives(text: str) -> list[tuple[str, list[int]]]:
    """(kind, bytes of each array) of the collective operations of a compiled program, on one device."""
    return [
        (found["kind"], [SIZES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
                         for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", found["result"])])
        for found in COLLECTIVE.finditer(text)
    ]  # fmt: skip


def run(layout: Layout, indexed: bool, mesh: Any = None) -> tuple[dict[str, np.ndarray], list[Any]]:
    """The records, and the collectives of the program; without a mesh on one device."""
    audit = Audit(RULES, top_k=K, layer_axis=None if layout.layers is None else 0, signals=layout.signals)
    given, whole = steps(layout, indexed), None
    if mesh is not None:
        whole = NamedSharding(mesh, P())
        given = [
            {key: jax.device_put(value, NamedSharding(mesh, layout.spec(key))) for key, value in each.items()}
            for each in given
        ]
    state = audit.init(given[0])
    if whole is not None:
        state = jax.device_put(state, whole)
    update = jax.jit(audit.update, out_shardings=whole).lower(state, given[0]).compile()
    for metrics in given:
        state = update(state, metrics)
    rows = unpack(audit, state)
    names = ("truth_layer", "signal_value", "signal_pooled", "expert_share", "state", "step")
    return {name: getattr(rows, name) for name in names}, collectives(update.as_text() or "")


def main(out: str) -> None:
    assert jax.device_count() == 8
    records, programs = {}, {}
    for name, layout in LAYOUTS.items():
        for indexed in layout.indexed:
            one, none = run(layout, indexed)
            assert not none
            for axes, kind in AXES.items():
                named = f"{name}/{indexed}/{axes}"
                kinds = (kind,) * len(layout.mesh)
                mesh = jax.make_mesh(tuple(layout.mesh.values()), tuple(layout.mesh), axis_types=kinds)
                try:
                    with jax.set_mesh(mesh):
                        eight, programs[named] = run(layout, indexed, mesh)
                except Exception as error:  # the other layouts have tests of their own
                    programs[named] = repr(error)
                    continue
                for devices, rows in ((1, one), (8, eight)):
                    records |= {f"{named}/{array}/{devices}": value for array, value in rows.items()}
    np.savez(out, **records)
    print(json.dumps(programs))


if __name__ == "__main__":
    main(*sys.argv[1:])
