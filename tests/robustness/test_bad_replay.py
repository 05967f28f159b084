"""Tables with bad rows are judged as the run was, and tables that hold no numbers are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moe_rules_callback import MetricsError, RuleAuditCallback, State
from moe_rules_callback.replay import replay, replay_history

RULES = {
    "sure": "high_routing_confidence",
    "uneven": "always[3](high_load_cv)",
    "falling": "decreasing_loss | previously(stable_loss)",
}
ROWS, T, E = 40, 6, 4
BAD_PROBS = {3: np.nan, 7: -0.5, 8: np.inf, 20: 3e37, 39: 0.0}  # row -> all scores of a token


def table() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    probs = random.dirichlet(np.full(E, 0.5), (ROWS, T)).astype(np.float32)
    for row, value in BAD_PROBS.items():
        probs[row, 2] = value
    index = np.argsort(-random.random((ROWS, T, E)), axis=-1)[..., :2].astype(np.int32)
    index[[5, 30], 0, 0] = -1, E
    mask = np.ones((ROWS, T), bool)
    mask[11] = False
    loss = np.linspace(3, 1, ROWS, dtype=np.float32)
    loss[[2, 9, 10]] = np.nan, np.inf, -np.inf
    return {"router_probs": probs, "expert_index": index, "token_mask": mask, "loss": loss}


def test_bad_rows_are_judged_as_in_the_run() -> None:
    given = table()
    with RuleAuditCallback(RULES, flush_every=8) as audit:
        for i in range(ROWS):
            audit.on_step({key: array[i] for key, array in given.items()})
        history = audit.history
    got = replay(given, RULES)
    for name in ("state", "truth_layer", "signal_value", "signal_pooled", "expert_share"):
        np.testing.assert_array_equal(getattr(got, name), history[name].values, err_msg=name)
    unknown = {name: set(np.flatnonzero(got.state[:, i] == State.UNKNOWN)) for i, name in enumerate(RULES)}
    finite = np.isfinite(got.signal_pooled)
    for name, rows in (
        ("routing_confidence", {*BAD_PROBS, 11}),
        ("load_cv", {5, 11, 30}),
        ("loss", {2, 9, 10}),
    ):
        assert set(np.flatnonzero(~finite[:, got.schema.signal_names.index(name)])) == rows, name
    assert {*BAD_PROBS, 11} <= unknown["sure"]
    assert {5, 11, 30} <= unknown["uneven"]
    assert {2, 9, 10} <= unknown["falling"]
    again = replay_history(history)
    np.testing.assert_array_equal(again.state, got.state)


def test_a_table_of_what_is_no_number() -> None:
    words: dict[str, Any] = {"router_probs": np.full((3, T, E), "0.5x")}
    with pytest.raises(ValueError, match="could not convert string to float"):
        replay(words, ["high_routing_confidence"])
    with pytest.raises(MetricsError, match="expert_index has dtype float32; expected integers"):
        replay(
            {"router_probs": np.ones((3, T, E)), "expert_index": np.ones((3, T, 2), np.float32)},
            ["low_load_cv"],
        )
