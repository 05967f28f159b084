"""What the audit adds to a compiled step, in counts that do not depend on the machine's mood.

A training step is compiled with and without the audit. What is counted: floating point operations and bytes
as XLA estimates them, instructions, and calls of the host.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export

from moe_rules_callback import Audit

LAYERS, EXPERTS, K, WIDTH, TOKENS = 2, 8, 2, 64, 2048
HUNDRED = {
    f"r{i}": f"{0.6 + i / 400} :: high_load_cv & ~low_router_entropy | high_routing_margin"
    for i in range(100)
}
CALLS = ("xla_python_cpu_callback", "xla_ffi_python", "outfeed", "infeed")


def step(params: Any, x: jax.Array) -> tuple[Any, dict[str, Any]]:
    """A step of gradient descent of a small mixture of experts, and its metrics."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        y, found = x, []
        for router, experts in params:
            probs = jax.nn.softmax(y @ router)
            gate, index = jax.lax.top_k(probs, K)
            weight = (jax.nn.one_hot(index, EXPERTS) * gate[..., None]).sum(1)
            y = y + jnp.einsum("te,tef->tf", weight, jnp.einsum("td,edf->tef", y, experts))
            found.append((probs, index))
        return jnp.square(y).mean(), found

    (loss, found), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
    probs, index = zip(*found, strict=True)
    metrics = {"loss": loss, "router_probs": list(probs), "expert_index": list(index)}
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), metrics


ROUTER = jax.ShapeDtypeStruct((WIDTH, EXPERTS), jnp.float32)
PARAMS = [(ROUTER, jax.ShapeDtypeStruct((EXPERTS, WIDTH, WIDTH), jnp.float32))] * LAYERS
X = jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.float32)


def bare(params: Any, x: jax.Array) -> Any:
    params, metrics = step(params, x)
    return params, metrics["loss"]


def audited(audit: Audit) -> tuple[Any, Any]:
    """The step with the audit in it, and the audit's abstract state."""
    state = audit.init(jax.eval_shape(step, PARAMS, X)[1])

    def both(params: Any, x: jax.Array, state: Any) -> Any:
        params, metrics = step(params, x)
        return params, metrics["loss"], audit.update(state, metrics)

    return both, jax.eval_shape(lambda: state)


def counts(function: Any, *args: Any) -> dict[str, float]:
    compiled = jax.jit(function).lower(*args).compile()
    cost = compiled.cost_analysis()
    assert cost is not None
    text = compiled.as_text() or ""
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "host calls": sum(call in text for call in CALLS),
        "instructions": text.count("\n"),
    }


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, float]]:
    found = {"bare": counts(bare, PARAMS, X)}
    for name, rules in {"6": "nano_moe", "100": HUNDRED}.items():
        both, state = audited(Audit(rules))
        found[name] = counts(both, PARAMS, X, state)
    return found


def test_six_rules_add_little(counted: dict[str, dict[str, float]]) -> None:
    without, with_six = counted["bare"], counted["6"]
    assert with_six["flops"] / without["flops"] < 1.01
    assert with_six["bytes"] / without["bytes"] < 1.05


def test_nothing_calls_the_host(counted: dict[str, dict[str, float]]) -> None:
    assert {name: each["host calls"] for name, each in counted.items()} == {"bare": 0, "6": 0, "100": 0}


def test_a_hundred_rules_are_no_graph_per_rule(counted: dict[str, dict[str, float]]) -> None:
    added = {name: counted[name]["instructions"] - counted["bare"]["instructions"] for name in ("6", "100")}
    assert added["100"] < 1.5 * added["6"]
    assert counted["100"]["flops"] / counted["6"]["flops"] < 1.01


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_step_is_exported_for_every_platform(platform: str) -> None:
    both, state = audited(Audit("router_health"))
    exported = export.export(jax.jit(both), platforms=[platform])(PARAMS, X, state)
    assert exported.platforms == (platform,)
    assert not any(call in exported.mlir_module() for call in ("xla_python", *CALLS))
