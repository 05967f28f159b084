"""Rows of a watched function are audited in blocks, and are to the bit what they would be one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import Collector
from routed import parameters, soft_top_k, tokens

from moe_rules_callback import MetricsError, RuleAuditCallback, watched
from moe_rules_callback.beside import Beside, Step
from moe_rules_callback.tracing.watch import Reduced
from moe_rules_callback.watched import Watched

ROWS, BLOCK, E = 11, 4, 4  # the first row, two blocks, and two rows
RULES = {"r": "once[3](low_router_entropy) & ~high_loss_spike_score", "s": "after[4](high_learning_rate)"}
ROUTER = Reduced("router_probs", ("router",), E, 2, 0, (("entropy", ()), ("load", (E,))))


def array_of(row: int) -> np.ndarray:
    """What the forward of a row delivers: 8 tokens, their entropy and the load."""
    load = np.random.default_rng(row).dirichlet(np.ones(E))
    return np.array([[[8, 0.1 * row, *load]]], np.float32)


def audited(block: int, steps: Sequence[Any]) -> RuleAuditCallback:
    """A closed audit of so many rows. The learning rate is not known at each of them."""
    with RuleAuditCallback(RULES, signals=["router_entropy"]) as audit:
        rows = Watched(1, audit._take, block)
        for i, step in enumerate(steps):
            rate = {} if i % 3 else {"learning_rate": 0.1 * i}
            rows.deliver([ROUTER], [array_of(i)])
            rows.hook({"loss": jnp.float32(1 / (i + 1)), **rate}, step)
        assert rows.settle(lambda: None, time.monotonic() + 60, ending=True)
        rows.check()
    return audit


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the blocks that are dispatched."""
    lengths: list[int] = []
    dispatch = Beside.block

    def counted(self: Beside, rows: Sequence[Step]) -> Any:
        lengths.append(len(rows))
        return dispatch(self, rows)

    monkeypatch.setattr(Beside, "block", counted)
    return lengths


STEPS: dict[str, Callable[[int], Any]] = {
    "not given": lambda i: None,
    "given": lambda i: 10 * i,
    "arrays": lambda i: jnp.int32(10 * i),
    "mixed": lambda i: None if i % 2 else 10 * i,
}


@pytest.mark.parametrize("number", STEPS.values(), ids=STEPS.keys())
def test_rows_are_to_the_bit_those_of_one_by_one(number: Callable[[int], Any], blocks: list[int]) -> None:
    steps = [number(i) for i in range(ROWS)]
    single = audited(1, steps)
    assert blocks == []
    together = audited(BLOCK, steps)
    assert blocks == [BLOCK, BLOCK]
    assert len(single.history.step) == ROWS
    assert single._outgoing is not None
    assert together._outgoing is not None
    states = single._outgoing.latest, together._outgoing.latest
    jax.tree.map(np.testing.assert_array_equal, *states)
    for name in ("step", "truth_layer", "signal_value", "signal_pooled", "expert_share", "state"):
        np.testing.assert_array_equal(together.history[name], single.history[name], err_msg=name)


def test_a_block_is_no_longer_than_what_is_flushed_together(
    blocks: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """So the ring is never overrun, and each row is delivered once and in order."""
    seen, params = Collector(), parameters()
    with RuleAuditCallback({"r": "low_load_cv"}, flush_every=3, plugins=[seen]) as audit:
        loss = audit.watch(lambda params, x: jnp.square(soft_top_k(params, x)).mean())
        step = jax.jit(jax.value_and_grad(loss))
        for x in tokens(ROWS):
            audit.on_step({"loss": step(params, x)[0]})
    assert blocks == [3, 3, 3]
    assert np.concatenate([batch.step for batch in seen.batches]).tolist() == list(range(ROWS))
    assert caplog.messages == []


class Fed:
    """Takes the place of the callback: notes how many rows come at a time, and fails when it is told to."""

    def __init__(self, fails: Callable[[int], bool] = lambda _: False) -> None:
        self.lengths: list[int] = []
        self._fails = fails

    def __call__(self, rows: Sequence[Step]) -> None:
        self.lengths.append(len(rows))
        if self._fails(len(rows)):
            raise MetricsError(f"row {sum(self.lengths)}")


def deliver(rows: Watched, n: int) -> None:
    for i in range(n):
        rows.deliver([ROUTER], [array_of(i)])
        rows.hook({}, None)


def test_the_first_row_and_those_that_are_left_go_alone() -> None:
    fed = Fed()
    rows = Watched(1, fed, BLOCK)
    assert rows.settle(lambda: None, time.monotonic() + 60)
    deliver(rows, 1 + BLOCK + 3)
    assert rows.settle(lambda: None, time.monotonic() + 60)
    assert fed.lengths == [1, BLOCK, 1, 1, 1]
    deliver(rows, BLOCK)
    assert rows.settle(lambda: None, time.monotonic() + 60, ending=True)
    assert fed.lengths[5:] == [BLOCK]


def test_a_row_does_not_wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watched, "LONGEST", 0.1)
    fed = Fed()
    rows = Watched(1, fed, BLOCK)
    deliver(rows, 3)
    deadline = time.monotonic() + 60
    while sum(fed.lengths) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert fed.lengths == [1, 1, 1]
    assert rows.settle(lambda: None, time.monotonic() + 60, ending=True)
    assert fed.lengths == [1, 1, 1]


def test_what_goes_wrong_in_a_block_is_raised_once_and_later_rows_go_on() -> None:
    fed = Fed(fails=lambda n: n == BLOCK)
    rows = Watched(1, fed, BLOCK)
    deliver(rows, 1 + BLOCK + 1)
    assert rows.settle(lambda: None, time.monotonic() + 60)
    with pytest.raises(MetricsError, match=f"row {1 + BLOCK}"):
        rows.hook({}, None)
    rows.check()
    assert fed.lengths == [1, BLOCK, 1]


def test_a_row_that_fails_alone_does_not_keep_back_the_others() -> None:
    fed = Fed(fails=lambda _: len(fed.lengths) == 2)
    rows = Watched(1, fed, BLOCK)
    deliver(rows, 3)  # the second and third wait for a block until they are settled
    assert rows.settle(lambda: None, time.monotonic() + 60, ending=True)
    assert fed.lengths == [1, 1, 1]
    with pytest.raises(MetricsError, match="row 2"):
        rows.check()


def test_a_number_that_is_none_is_refused_by_the_call() -> None:
    rows = Watched(1, Fed())
    with pytest.raises(MetricsError, match=r"step is -1; it is a whole number, at least 0 and below 2\*\*31"):
        rows.hook({}, -1)
    assert rows.settle(lambda: None, time.monotonic() + 60, ending=True)
