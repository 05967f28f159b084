"""How many bytes an audit moves for a model of many layers and experts, and what bounds them.

    python -m benchmarks.telemetry [--layers 61] [--experts 256] [--top-k 8]

Nothing is computed: sizes follow from shapes. The number of devices does not enter: they all reduce the same
arrays, and one of them sends its rows. The columns are

    reduced     what all devices reduce together in a step, in one or a few collectives
    state       what each device holds between steps, replicated
    row         what one device of one process sends to its host for a row, in batches of `flush_every` rows
    a day       of rows on disk before compression, at one step a second
"""

from __future__ import annotations

import argparse
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from moe_rules_callback import Audit
from moe_rules_callback.metrics import collect
from moe_rules_callback.statistics import summarise

FLUSH = 64


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def sizes(rules: str, layers: int, experts: int, k: int, **options: Any) -> tuple[float, int, float]:
    """Bytes reduced in a step, of the state, and of a row; per step where not every step is audited."""
    tokens = (layers, 1, 1)
    metrics = {
        "loss": jax.ShapeDtypeStruct((), jnp.float32),
        "router_probs": jax.ShapeDtypeStruct((*tokens, experts), jnp.float32),
        "expert_index": jax.ShapeDtypeStruct((*tokens, k), jnp.int32),
    }
    audit = Audit(rules, layer_axis=0, rows=2 * FLUSH, **options)
    state = jax.eval_shape(lambda: audit.init(metrics))

    def reduced(metrics: Any) -> list[Any]:
        routers = collect(metrics, None, 0)
        return [summarise(each, audit.statistics(metrics)).values for each in routers]

    row = sum(math.prod(leaf.shape[1:]) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.rows))
    return size(jax.eval_shape(reduced, metrics)) / audit.every_n, size(state), row / audit.every_n


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=8)
    options = parser.parse_args()
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)  # what is left out is not the point here
    layers, experts, k = options.layers, options.experts, options.top_k
    few = -(-layers // 8)
    cases: dict[str, tuple[str, int, dict[str, Any]]] = {
        "router_health": ("router_health", layers, {}),
        "  max_experts=16": ("router_health", layers, {"max_experts": 16}),
        "  every_n=10": ("router_health", layers, {"every_n": 10}),
        "  every 8th layer": ("router_health", few, {}),
        "  all three": ("router_health", few, {"every_n": 10, "max_experts": 16}),
        "nano_moe": ("nano_moe", layers, {}),
    }
    print(f"{layers} layers, {experts} experts, {k} of them used; bytes a step, of the state: in all")
    print(f"{'':20}{'reduced':>10}{'state':>12}{'row':>10}{'rows a day':>12}")
    for name, (rules, n, more) in cases.items():
        reduced, state, row = sizes(rules, n, experts, k, **more)
        print(f"{name:20}{reduced:10,.0f}{state:12,}{row:10,.0f}{row * 86400 / 1e9:9.2f} GB")


if __name__ == "__main__":
    main()
