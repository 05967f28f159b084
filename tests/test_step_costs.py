"""What Python does in a step of the trainer, counted: it must be next to nothing, and not grow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from counting import instructions

from moe_rules_callback import RuleAuditCallback

X = jnp.ones((16, 4))


def loss_fn(params: Any, x: jax.Array) -> jax.Array:
    router = params["router"]["kernel"]
    gate, index = jax.lax.top_k(jax.nn.softmax(x @ router), 2)
    return ((jax.nn.one_hot(index, 8) * gate[..., None]).sum(1) @ router.T).sum()


@jax.jit
def step(params: Any, x: jax.Array) -> tuple[Any, jax.Array]:
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def count(use: Callable[[], Any]) -> int:
    """Of a call; the most of some, for Python begins late to tell of the first."""
    return max(instructions(use) for _ in range(3))


def of_watched(arrays: int) -> int:
    """Instructions of a call of the watched step with so many arrays more."""
    with RuleAuditCallback("nano_moe") as audit:
        watched = audit.watch(step)
        params = {"router": {"kernel": jnp.ones((4, 8))}, "other": {f"layer_{i}": X for i in range(arrays)}}
        for _ in range(2):
            params, _ = watched(params, X)
        figure = count(lambda: watched(params, X))
        for _ in range(5):
            audit.on_step({})
    return figure


def test_a_watched_step_takes_few_instructions_an_array() -> None:
    few, many = of_watched(10), of_watched(110)
    assert 0 < many - few <= 200 * 100  # with the name of each, 490
    assert many <= 200 * 110 + 4000


@pytest.mark.parametrize(("way", "most"), [("drain", 75), ("on_step", 1000)])
def test_a_step_takes_few_instructions(way: str, most: int) -> None:
    probs, index = jnp.full((16, 8), 1 / 8), jnp.zeros((16, 2), jnp.int32)
    metrics = {"loss": jnp.float32(1), "router_probs": probs, "expert_index": index}
    with RuleAuditCallback("nano_moe") as audit:
        state = audit.init(metrics)
        update = jax.jit(audit.update)

        def use() -> None:
            audit.drain(state) if way == "drain" else audit.on_step(metrics)

        for _ in range(5):
            state = update(state, metrics)
            use()
            audit.flush()  # so that the next ones send nothing
        assert 0 < count(use) <= most
