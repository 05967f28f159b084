"""Parameters and gradients that hold nothing, or nothing that a norm could be of."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audited import records, signal, state

from moe_rules_callback import Audit, MissingSignalError, RuleAuditCallback, State

RULES = {
    "growing": "increasing_weight_magnitude",
    "starved": "low_router_gradient_share",
    "dead": "low_expert_gradient_min_share",
    "alike": "high_expert_weight_cosine",
}
OF_GRADS = {"gradient_norm", "router_gradient_share", "expert_gradient_min_share"}
OF_PARAMS = {"weight_norm", "expert_weight_cosine"}
ROUTER = {"router_probs": np.full((3, 2), 0.5, np.float32)}


def tree(value: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    kernels = rng.normal(size=(2, 3, 3))
    leaves = {"router": rng.normal(size=(3, 2)), "experts": {"w": kernels}, "embed": rng.normal(size=3)}
    return jax.tree.map(lambda leaf: (value * leaf).astype(np.float32), leaves)


@pytest.fixture(scope="module")
def run() -> Any:
    audit = Audit(RULES, signals=["gradient_norm"])
    start, update = audit.init({"params": tree(), "grads": tree(), **ROUTER}), jax.jit(audit.update)

    def rows(*steps: Any) -> Any:
        state = start
        for params, grads in steps:
            state = update(state, {"params": params, "grads": grads, **ROUTER})
        return audit.records(np.asarray(state.rows), np.arange(len(steps)), np.zeros(len(steps)))

    return rows


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_not_finite_or_overflows_is_unknown(bad: float, run: Any) -> None:
    """1e30: the square overflows, so that the norm is inf and marked, although the gradient is not."""
    rows = run((tree(), tree()), (tree(), tree(bad)), (tree(bad), tree()), (tree(), tree()))
    for names, row in ((OF_GRADS, 1), (OF_PARAMS, 2)):
        for name in OF_GRADS | OF_PARAMS:
            assert np.isfinite(signal(rows, name)[row, 0]) == (name not in names), name
    assert state(rows, "starved").tolist()[1] == state(rows, "dead").tolist()[1] == State.UNKNOWN
    assert state(rows, "alike").tolist()[2] == State.UNKNOWN
    np.testing.assert_array_equal(rows.signal_value[[2, 3]][:, 1:3], rows.signal_value[[0, 0]][:, 1:3])


@pytest.mark.parametrize("scale", [0.0, 1e-45, 1e-39, 1e-25])
def test_routers_have_no_share_of_gradients_that_vanish_when_squared(scale: float, run: Any) -> None:
    """Zeros come from a step that a loss scale or an accumulation left out: no router is starved."""
    rows = run((tree(), tree(scale)), (tree(), tree()))
    share = signal(rows, "router_gradient_share")[:, 0]
    assert np.isnan(share[0])
    assert state(rows, "starved").tolist() == [State.UNKNOWN, State.FALSE]
    squares = {name: np.square(np.float64(leaf)).sum() for name, leaf in _parts(tree()).items()}
    assert share[1] == pytest.approx(np.sqrt(squares["router"] / sum(squares.values())), rel=1e-6)


def _parts(given: Any) -> dict[str, Any]:
    return {"router": given["router"], "experts": given["experts"]["w"], "embed": given["embed"]}


def test_a_router_without_gradients_is_starved(run: Any) -> None:
    grads = tree() | {"router": np.zeros((3, 2), np.float32)}
    assert state(run((tree(), grads)), "starved").tolist() == [State.TRUE]


def test_leaves_that_are_no_floats_are_passed_over() -> None:
    params: dict[str, Any] = {
        "w": np.full(4, 2.0, np.float32), "steps": np.int32(7), "key": jax.random.key(0), "none": None,
        "mask": np.ones(3, bool), "phase": jnp.complex64(3), "half": jnp.full(9, 1.0, jnp.bfloat16),
    }  # fmt: skip
    rows = records(Audit([], signals=["weight_norm"]), [{"params": params}])
    assert signal(rows, "weight_norm")[0, 0] == 5


@pytest.mark.parametrize("empty", [{}, [], {"steps": np.arange(3)}, {"a": {"b": None}}], ids=str)
def test_trees_that_hold_nothing(empty: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A norm of 0 would be judged. A rule of one's own is refused, one of a book left out."""
    with RuleAuditCallback(["stable_weight_norm"]) as audit, pytest.raises(MissingSignalError) as error:
        audit.on_step({"params": empty, "loss": 1.0})
    assert str(error.value) == "'params' holds no floating-point array, which a norm could be of."
    with RuleAuditCallback("nano_moe") as audit:
        audit.on_step({"params": empty, "loss": 1.0})
        assert "weight_norm" not in audit.history.signal
    assert "rules without their signals are left out" in caplog.text
