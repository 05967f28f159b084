"""Every n-th step is audited: the rows are those of a run that had no other steps."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr

from moe_rules_callback import Audit, RuleAuditCallback, delivery
from moe_rules_callback.beside import Beside

RULES = {"r": "once[3](low_router_entropy) & ~increasing_loss", "s": "after[8](high_load_cv)"}
STEPS, N = 23, 5
DUE = list(range(0, STEPS, N))
ROUTER = jax.random.normal(jax.random.key(0), (8, 4))
TOKENS = [jax.random.normal(jax.random.key(i), (16, 8)) for i in range(1, STEPS + 1)]
METRICS = [
    {"loss": jnp.float32(1 / (i + 1)), "router_probs": jax.nn.softmax(x @ ROUTER)}
    for i, x in enumerate(TOKENS)
]


def audited(every_n: int, steps: list[int], number: Any = int) -> xr.Dataset:
    """The history of an audit beside these steps."""
    with RuleAuditCallback(RULES, top_k=2, every_n=every_n) as audit:
        for i in steps:
            audit.on_step(METRICS[i], number(i))
    return audit.history


@pytest.fixture(scope="module")
def wanted() -> xr.Dataset:
    return audited(1, DUE)


def same(history: xr.Dataset, wanted: xr.Dataset, atol: float = 0.0) -> None:
    assert history.step.values.tolist() == DUE == wanted.step.values.tolist()
    for name in ("truth_layer", "signal_value"):
        np.testing.assert_allclose(history[name], wanted[name], rtol=0, atol=atol)


@pytest.mark.parametrize(
    "number", [int, lambda i: None, jnp.int32], ids=["given", "counted", "on the device"]
)
def test_beside_the_step(number: Any, wanted: xr.Dataset) -> None:
    same(audited(N, list(range(STEPS)), number), wanted)


def test_steps_between_are_not_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    step = Beside.step
    monkeypatch.setattr(Beside, "step", lambda self, *of: calls.append(1) or step(self, *of))
    audited(N, list(range(STEPS)))
    assert len(calls) == len(DUE)


def test_inside_the_step(wanted: xr.Dataset) -> None:
    with RuleAuditCallback(RULES, top_k=2, every_n=N) as audit:
        update = jax.jit(audit.update, donate_argnums=0)
        state = audit.init(METRICS[0])
        for metrics in METRICS:
            state = update(state, metrics)
            audit.drain(state)
    assert int(state.step) == STEPS - 1
    assert int(state.row) == len(DUE)
    same(audit.history, wanted, atol=1e-6)


def test_a_router_that_is_watched(wanted: xr.Dataset) -> None:
    with RuleAuditCallback(RULES, top_k=2, every_n=N) as audit:

        def loss(router: jax.Array, x: jax.Array) -> jax.Array:
            gate, index = jax.lax.top_k(jax.nn.softmax(x @ router), 2)
            return ((jax.nn.one_hot(index, 4) * gate[..., None]).sum(1) @ jnp.ones((4, 3))).mean()

        step = jax.jit(jax.grad(audit.watch(loss)))
        for x, metrics in zip(TOKENS, METRICS, strict=True):
            step(ROUTER, x)
            audit.on_step({"loss": metrics["loss"]})
    same(audit.history, wanted, atol=1e-5)


def test_snapshots_are_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    copy = delivery._copy
    monkeypatch.setattr(delivery, "_copy", lambda *of: sent.append(1) or copy(*of))
    with RuleAuditCallback(RULES, top_k=2, every_n=N, flush_every=2) as audit:
        for metrics in METRICS:
            audit.on_step(metrics)
    assert len(sent) == 3  # 5 rows


def test_less_than_every_step_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n is 0; it counts steps: 1 audits all, 10 every tenth"):
        Audit(RULES, every_n=0)
