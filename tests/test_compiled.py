"""What the audit adds to a compiled step, in counts that do not depend on the machine's mood.

A training step is compiled with and without the audit. What is counted: floating point operations and bytes
as XLA estimates them, kernels, and calls of the host; then what a loop dispatches and transfers. A change
that makes the audit slower fails here, whatever the machine is doing.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.profiler import ProfileData

from moe_rules_callback import Audit, RuleAuditCallback

LAYERS, EXPERTS, K, WIDTH, TOKENS = 2, 8, 2, 64, 2048
SEEN = (  # over the signals of nano_moe, so that more rules read no more
    "high_routing_confidence", "low_activation_entropy", "high_expert_imbalance", "low_expert_imbalance",
    "increasing_weight_magnitude", "stable_loss", "decreasing_loss",
)  # fmt: skip
HUNDRED = {
    f"r{i}": f"{0.6 + i / 400} :: {SEEN[i % 7]} & ~{SEEN[i // 7 % 7]} | {SEEN[i // 49]}" for i in range(100)
}
RULES: dict[str, Any] = {"6": "nano_moe", "100": HUNDRED, "health": "router_health"}
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
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
    metrics = {"loss": loss, "router_probs": list(probs), "expert_index": list(index), "params": params}
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
        "kernels": kernels(text),
        "shared": len(re.findall(r'"outer_dimension_partitions":\[[^]]*"(?:[2-9]|\d\d+)"', text)),
        "sorts": text.count(" sort("),
        "top_k": text.count('custom_call_target="TopK"'),
    }


def kernels(text: str) -> int:
    """Instructions of a compiled program that are launched one by one."""
    launched = re.findall(r" = \S+ ([a-z][\w-]*)\(", text[text.index("\nENTRY") :])
    return sum(name not in FREE for name in launched)


@pytest.fixture(scope="module")
def counted() -> dict[str, dict[str, float]]:
    found = {"bare": counts(bare, PARAMS, X)}
    for name, rules in RULES.items():
        audit = Audit(rules, rows=8)  # the ring counts as if each step wrote all of it
        both, state = audited(audit)
        assert len(audit.schema.rules) == {"6": 6, "100": 100, "health": 18}[name]
        found[name] = counts(both, PARAMS, X, state)
    return found


def added(counted: dict[str, dict[str, float]], rules: str) -> dict[str, float]:
    return {name: counted[rules][name] - counted["bare"][name] for name in counted["bare"]}


@pytest.mark.parametrize(
    ("rules", "flops", "bytes", "kernels"),
    [("6", 1.05e6, 2.9e6, 100), ("100", 1.07e6, 2.95e6, 100), ("health", 2.05e6, 4.55e6, 240)],
)
def test_what_the_audit_adds(
    rules: str, flops: float, bytes: float, kernels: int, counted: dict[str, dict[str, float]]
) -> None:
    """A tenth more than it was when this was written, on any JAX. The step itself has 695e6 flops and touches
    74e6 bytes; a kernel costs a third of a microsecond on a CPU and some on a GPU."""
    more = added(counted, rules)
    assert 0 < more["flops"] <= flops
    assert 0 < more["bytes"] <= bytes
    assert 0 < more["kernels"] <= kernels


def test_nothing_calls_the_host(counted: dict[str, dict[str, float]]) -> None:
    assert {each["host calls"] for each in counted.values()} == {0}


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="earlier XLA fuses otherwise, and deals out more")
def test_kernels_stay_on_one_core(counted: dict[str, dict[str, float]]) -> None:
    """XLA deals a kernel of many operations a byte out to all cores of a CPU, whose threads then have to be
    woken: some 50 microseconds, where it has 5 to do. Only loads over several indices a token are so."""
    for rules in ("6", "100"):
        assert counted[rules]["shared"] - counted["bare"]["shared"] <= LAYERS


def test_a_hundred_rules_are_no_graph_per_rule(counted: dict[str, dict[str, float]]) -> None:
    six, hundred = added(counted, "6"), added(counted, "100")
    for what in ("flops", "bytes", "kernels"):
        assert hundred[what] <= 1.2 * six[what]


def test_the_top_k_of_the_model_stays_one(counted: dict[str, dict[str, float]]) -> None:
    """XLA makes a full sort of it when its numbers of experts are used elsewhere too."""
    assert counted["bare"]["top_k"] == LAYERS
    for each in counted.values():
        assert (each["top_k"], each["sorts"]) == (LAYERS, 0)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_step_is_exported_for_every_platform(platform: str) -> None:
    both, state = audited(Audit("router_health"))
    exported = export.export(jax.jit(both), platforms=[platform])(PARAMS, X, state)
    assert exported.platforms == (platform,)
    assert not any(call in exported.mlir_module() for call in ("xla_python", *CALLS))


def dispatched(folder: Path) -> Counter[str]:
    """Of a profile: jitted functions, eager operations among them, and how often they were called."""
    (profile,) = folder.rglob("*.xplane.pb")
    events = (
        event.name
        for plane in ProfileData.from_file(str(profile)).planes
        for line in plane.lines
        for event in line.events
    )
    return Counter(m[1] for name in events if (m := re.fullmatch(r"PjitFunction\((\w+)\)", name)))


@pytest.mark.parametrize("inside", [True, False])
def test_a_loop_dispatches_and_transfers_little(inside: bool, tmp_path: Path) -> None:
    """A copy of the ring for each flush and, beside the step, one update a step. Nothing is transferred."""
    steps, flushes = 40, 5
    with RuleAuditCallback("nano_moe", flush_every=steps // flushes) as audit:
        params, x = jax.tree.map(lambda of: jnp.ones(of.shape), (PARAMS, X))
        state = audit.init(jax.eval_shape(step, PARAMS, X)[1])

        @jax.jit
        def train(params: Any, x: jax.Array, state: Any) -> Any:
            params, metrics = step(params, x)
            return params, metrics, audit.update(state, metrics) if inside else state

        def loop(params: Any, state: Any) -> Any:
            for _ in range(steps):
                params, metrics, state = train(params, x, state)
                if inside:
                    audit.drain(state)
                else:
                    audit.on_step(metrics)
            return params, state

        params, state = jax.block_until_ready(loop(params, state))
        audit.flush()
        with jax.profiler.trace(str(tmp_path)), jax.transfer_guard("disallow"):
            jax.block_until_ready(loop(params, state))
    calls = dispatched(tmp_path)
    once = calls["train"] // steps  # an event, or one within another
    wanted = {"train": steps, "_copy": flushes} | ({} if inside else {"row": steps})
    assert calls == {name: once * n for name, n in wanted.items()}
    assert len(audit.history.step) == 2 * steps
