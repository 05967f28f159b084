"""The audit among the hooks of a CLU training loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_rules_callback.integrations.clu import PeriodicRuleAudit

from moe_rules_callback import RuleAuditCallback

STEPS, EXPERTS = 4, 3
ROUTER = jax.random.normal(jax.random.key(0), (8, EXPERTS))
BATCHES = jax.random.normal(jax.random.key(1), (STEPS, 16, 8))


def loss_fn(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    gate, index = jax.lax.top_k(jax.nn.softmax(x @ params["router"]), 1)
    return jnp.square(gate * params["experts"][index[:, 0]]).mean()


def train_step(params: dict[str, jax.Array], x: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    loss, grads = jax.value_and_grad(loss_fn)(params, x)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss


def run(audit: RuleAuditCallback, hooks: list[Callable[[int], Any]]) -> None:
    """A loop as in CLU's examples."""
    step_fn = jax.jit(audit.watch(train_step))
    params = {"router": ROUTER, "experts": jnp.ones((EXPERTS, 8))}
    hooks += [PeriodicRuleAudit(audit)]
    for step, x in enumerate(BATCHES, start=1):
        params, _ = step_fn(params, x)
        for hook in hooks:
            hook(step)


def test_a_hook_of_the_loop() -> None:
    with RuleAuditCallback({"r": "high_routing_confidence"}) as audit:
        run(audit, [])
        rows = audit.history
    assert rows.step.values.tolist() == [1, 2, 3, 4]
    scores = np.exp(np.asarray(BATCHES[0] @ ROUTER))
    confidence = (scores.max(-1) / scores.sum(-1)).mean()
    np.testing.assert_allclose(rows.signal_pooled.sel(signal="routing_confidence")[0], confidence, rtol=1e-5)


def test_metrics_by_name() -> None:
    with RuleAuditCallback({"r": "high_routing_confidence"}, signals=["loss"]) as audit:
        audited = PeriodicRuleAudit(audit)
        probs = np.full((4, EXPERTS), 1 / EXPERTS)
        assert audited(7, 0.5, loss=2.0, router_probs=probs)
        assert audited(step=8, loss=1.0, router_probs=probs)
        rows = audit.history
    assert rows.step.values.tolist() == [7, 8]
    assert rows.signal_pooled.sel(signal="loss").values.tolist() == [2.0, 1.0]


def test_among_clu_s_own_actions() -> None:
    pytest.importorskip("tensorflow")
    from clu.periodic_actions import PeriodicCallback, ReportProgress

    triggered: list[int] = []
    other = PeriodicCallback(every_steps=2, callback_fn=lambda step, t: triggered.append(step))
    with RuleAuditCallback({"r": "high_routing_confidence"}) as audit:
        run(audit, [other, ReportProgress(num_train_steps=STEPS)])
        assert len(audit.history.step) == STEPS
    assert triggered == [2, 4]
    theirs, ours = (
        [(p.name, p.default) for p in inspect.signature(kind.__call__).parameters.values()]
        for kind in (PeriodicCallback, PeriodicRuleAudit)
    )
    assert theirs[:-1] == ours[:-1]  # the last one takes what is left
