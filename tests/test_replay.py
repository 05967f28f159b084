"""Rules over past steps: the same bits as during the run."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import pytest
import xarray as xr
from fake_records import make_records

from moe_rules_callback import RuleAuditCallback, hookimpl
from moe_rules_callback.errors import HistoryError, MetricsError, MissingSignalError
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.plugins import get_plugin_manager
from moe_rules_callback.replay import Replay, replay, replay_history
from moe_rules_callback.signals import Signal

RULES = {
    "sharp": "0.85 :: high_routing_confidence & low_activation_entropy",
    "even": "always[8](low_load_cv) | increasing_loss",
    "spike": "high_loss_spike_score -> once(stable_loss)",
    "dead": "previously(high_dead_expert_fraction)",
    "own": "low_activation_entropy & high_noise",
}
ROWS = 150


def steps(rows: int = ROWS, experts: int = 6) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {
            "loss": np.float32(np.nan if i % 17 == 3 else 3 * np.exp(-i / 50) + random.normal(0, 0.1)),
            "noise": np.float32(random.random()),
            "router_probs": random.dirichlet(np.full(experts, 0.5), (3, 16)).astype(np.float32),
        }
        for i in range(rows)
    ]


def history_of(run: list[dict[str, Any]], rules: Any = RULES, **options: Any) -> xr.Dataset:
    with RuleAuditCallback(rules, **options) as audit:
        for i, metrics in enumerate(run):
            audit.on_step(metrics, step=3 * i)
        return audit.history


def assert_same_bits(got: xr.Dataset, expected: xr.Dataset) -> None:
    assert got.sizes == expected.sizes
    for name in set(expected.variables) - {"wall_time"}:
        same = got[name].sel(signal=expected.signal) if "signal" in got[name].dims else got[name]
        if jax.__version_info__ < (0, 10) and same.dtype.kind == "f":  # 0.7.1: XLA sums otherwise in a scan
            np.testing.assert_allclose(same.values, expected[name].values, 1e-6, 1e-6, err_msg=str(name))
        else:
            np.testing.assert_array_equal(same.values, expected[name].values, err_msg=str(name))
    assert got.attrs["rules"] == expected.attrs["rules"]
    assert got.attrs["routers"] == expected.attrs["routers"]


@pytest.fixture(scope="module")
def run() -> list[dict[str, Any]]:
    return steps()


@pytest.fixture(scope="module")
def history(run: list[dict[str, Any]]) -> xr.Dataset:
    return history_of(run, top_k=2, layer_axis=0)


def stacked(run: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {key: np.stack([metrics[key] for metrics in run]) for key in run[0]}


def test_metrics_give_the_records_of_the_run(run: list[dict[str, Any]], history: xr.Dataset) -> None:
    records = replay(stacked(run), RULES, steps=3 * np.arange(ROWS), top_k=2, layer_axis=0)
    assert_same_bits(records_to_dataset(records), history)


def test_lists_of_numbers_are_arrays() -> None:
    table = {"loss": [2.9, 2.7, 2.6], "expert_load": [[2, 1, 1], [3, 1, 0], [4, 0, 0]]}
    records = replay(table, ["high_load_cv_normalised"], top_k=1)
    expected = replay(
        {key: np.asarray(value) for key, value in table.items()}, ["high_load_cv_normalised"], top_k=1
    )
    np.testing.assert_array_equal(records.truth, expected.truth)
    assert records.state[:, 0].tolist() == [0, 1, 1]


def test_indices_of_experts(run: list[dict[str, Any]]) -> None:
    """As they come from a file: 64 bits wide."""
    index = np.argsort(-stacked(run)["router_probs"], axis=-1)[..., :2]
    assert index.dtype == np.int64
    table = {**stacked(run), "expert_index": index}
    records = replay(table, ["low_load_cv"], layer_axis=0)
    expected = replay(stacked(run), ["low_load_cv"], top_k=2, layer_axis=0)
    np.testing.assert_array_equal(records.truth, expected.truth)


def test_blocks_are_one_run(
    run: list[dict[str, Any]], history: xr.Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block is a part of one: 150 = 64 + 64 + 22."""
    monkeypatch.setattr("moe_rules_callback.replay.BLOCK", 64)
    replayed = Replay(stacked(run), RULES, steps=3 * np.arange(ROWS), top_k=2, layer_axis=0)
    batches = list(replayed)
    assert [len(batch) for batch in batches] == [64, 64, 22]
    assert_same_bits(records_to_dataset(batches), history)


def test_a_history_gives_itself(history: xr.Dataset) -> None:
    again = records_to_dataset(replay_history(history))
    assert_same_bits(again, history)
    np.testing.assert_array_equal(again.wall_time, history.wall_time)


def test_a_history_gives_what_other_rules_would_have_said(
    run: list[dict[str, Any]], history: xr.Dataset
) -> None:
    rules = {"r": "high_load_gini | decreasing_noise"}
    expected = history_of(run, rules, top_k=2, layer_axis=0)
    got = records_to_dataset(replay_history(history, rules))
    np.testing.assert_allclose(got.truth_layer, expected.truth_layer, atol=1e-6)
    np.testing.assert_array_equal(got.state, expected.state)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_layers_of_different_size(top_k: int | None) -> None:
    random = np.random.default_rng(1)
    shapes = {"block_10": 8, "block_2": 4, "block_3": 8}
    run = [
        {
            "router_probs": {
                name: random.dirichlet(np.ones(e), 16).astype(np.float32) for name, e in shapes.items()
            }
        }
        for _ in range(40)
    ]
    rules = {"r": "low_router_entropy & ~high_expert_imbalance"}
    history = history_of(run, rules, top_k=top_k)
    assert_same_bits(records_to_dataset(replay_history(history)), history)


def test_predicates_of_a_rule_file_are_kept(tmp_path: Any, run: list[dict[str, Any]]) -> None:
    book = tmp_path / "book.toml"
    book.write_text(
        '[predicates.calm]\nsignal = "noise"\nis = "low"\noffset = 0.3\nslope = 5.0\n'
        '[rules.quiet]\nrule = "0.6 :: calm"\nkind = "health"\nwarmup = 7\n'
    )
    history = history_of(run, book)
    assert_same_bits(records_to_dataset(replay_history(history)), history)


class Plugin:
    @hookimpl
    def provide_signals(self) -> dict[str, Signal]:
        ramps = {"high": (0.3, 0.5), "low": (0.2, 0.5)}
        return {
            "spread": Signal(lambda m: m["router_probs"].std(), ("router_probs",), ramps=lambda e, k: ramps)
        }

    @hookimpl
    def provide_rules(self) -> dict[str, str]:
        return {"spread_out": "high_spread | low_spread"}


def test_a_plugin_need_not_be_there_again(run: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """And may be: its rules are not added a second time."""
    history = history_of(run[:40], {"r": "high_spread"}, plugins=[Plugin()])
    assert history.rule.values.tolist() == ["r", "spread_out"]
    assert_same_bits(records_to_dataset(replay_history(history)), history)
    manager = get_plugin_manager([Plugin()])
    monkeypatch.setattr("moe_rules_callback.plugins.get_plugin_manager", lambda: manager)
    assert_same_bits(records_to_dataset(replay_history(history)), history)


def test_a_signal_that_was_not_recorded_is_missing(history: xr.Dataset) -> None:
    with pytest.raises(MissingSignalError, match="rule 'r' needs the signal 'router_z_loss'"):
        replay_history(history, {"r": "high_router_z_loss"})


def test_loads_pass_for_probabilities(run: list[dict[str, Any]]) -> None:
    """In any unit: shares, per cent, counts."""
    probs = run[0]["router_probs"]
    chosen = np.argsort(-probs, axis=-1)[..., :2]
    counts = np.stack([np.bincount(layer.ravel(), minlength=6) for layer in chosen])
    signals = ("load_cv", "load_gini", "max_violation", "effective_experts", "dead_expert_fraction")
    only = [{"router_probs": probs}]
    expected = history_of(only, {"r": "low_load_cv_normalised"}, top_k=2, layer_axis=0, signals=signals)
    for load in (counts, counts / counts.sum(1, keepdims=True), 7.0 * counts):
        with RuleAuditCallback(
            {"r": "low_load_cv_normalised"}, top_k=2, layer_axis=0, signals=signals
        ) as audit:
            audit.on_step({"expert_load": load})
            got = audit.history
        for name in ("signal_value", "expert_share", "truth_layer"):
            np.testing.assert_allclose(got[name], expected[name], atol=1e-6, err_msg=name)


def test_loads_that_are_none() -> None:
    with pytest.raises(
        MetricsError, match=re.escape("expert_load of router has shape (2, 4); expected [experts]")
    ):
        replay({"expert_load": np.ones((5, 2, 4))}, ["low_load_cv"], top_k=1)
    with pytest.raises(MetricsError, match="top_k is None for the 4 experts of router"):
        replay({"expert_load": np.ones((5, 4))}, ["low_load_cv"])
    bad = np.array([[1, 1, 2.0], [-1, 1, 1], [0, 0, 0], [np.nan, 1, 1]])
    records = replay({"expert_load": bad}, ["low_load_cv"], top_k=1)
    assert np.isfinite(records.signal_pooled[:, 0]).tolist() == [True, False, False, False]
    with pytest.raises(MissingSignalError, match="needs the signal 'expert_imbalance'"):
        replay({"expert_load": np.ones((5, 4))}, ["high_expert_imbalance"], top_k=2)


def test_tables_that_do_not_fit() -> None:
    for table in ({}, {"loss": np.zeros(0)}, {"loss": np.zeros(3), "x": np.zeros(4)}, {"loss": 1.0}):
        with pytest.raises(
            MetricsError, match="nothing to replay, or the metrics have different numbers of rows"
        ):
            replay(table, ["stable_loss"])
    with pytest.raises(
        MetricsError, match=re.escape("steps has shape (2,); expected one for each of 3 rows")
    ):
        replay({"loss": np.zeros(3)}, ["stable_loss"], steps=[1, 2])
    old = records_to_dataset(make_records(5))
    old.attrs["routers"] = "[]"
    with pytest.raises(
        HistoryError, match="this history has 2 layers and does not say how many experts each has"
    ):
        replay_history(old, ["stable_loss"])
    with pytest.raises(HistoryError, match="the history has no rows"):
        replay_history(xr.Dataset(coords={"step": np.zeros(0)}))
