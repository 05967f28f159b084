"""The audit beside the step: numbers of steps, metrics that are absent, and runs that are resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from collector import RULES, Collector

from moe_rules_callback import (
    Audit,
    MetricsError,
    RuleAuditCallback,
    Signal,
    get_plugin_manager,
    hookimpl,
    open_history,
)
from moe_rules_callback.beside import Beside
from moe_rules_callback.sinks import ZarrSink


@pytest.mark.parametrize("step", [-1, 2**31, 3.5, "3", float("nan")])
def test_a_step_that_is_no_number_of_a_step(step: Any):
    with (
        RuleAuditCallback(RULES) as audit,
        pytest.raises(MetricsError, match=r"it is a whole number, at least 0 and below 2\*\*31\."),
    ):
        audit.on_step({"x": 0.0}, step)


def test_steps_that_do_not_rise_are_reported_once(caplog: pytest.LogCaptureFixture):
    with RuleAuditCallback(RULES) as audit:
        for step in (5, np.int64(6), 6, 2, jnp.int32(3), None):
            audit.on_step({"x": 0.0}, step)
    assert audit.history.step.values.tolist() == [5, 6, 6, 2, 3, 4]
    assert caplog.messages == [
        "step 6 comes after step 6: rows are kept in the order in which they came, but warm-ups and plots go "
        "by the number. Count steps over the whole run, not over an epoch."
    ]


@pytest.mark.parametrize("inside", [False, True])
def test_a_resumed_run_goes_on_counting(tmp_path: Path, inside: bool):
    for _ in range(2):
        with RuleAuditCallback(RULES, logdir=tmp_path, sinks=["zarr"], resume=True) as audit:
            state = audit.init({"x": 0.0}) if inside else None
            for _ in range(3):
                if state is None:
                    audit.on_step({"x": 0.0})
                else:
                    state = audit.update(state, {"x": 0.0})
                    audit.drain(state)
    assert open_history(tmp_path).step.values.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_resumed_run_may_go_back(tmp_path: Path):
    for steps in ((0, 1, 2, 3), (2, None)):
        with RuleAuditCallback(RULES, logdir=tmp_path, sinks=["zarr"], resume=True) as audit:
            for step in steps:
                audit.on_step({"x": 0.0}, step)
    assert open_history(tmp_path).step.values.tolist() == [0, 1, 2, 3]


def test_what_is_no_metric_is_passed_over():
    seen = Collector()
    with RuleAuditCallback(RULES, plugins=[seen]) as audit:
        audit.on_step({"x": 1.0, "phase": "train", "grads": None, "loss": None})
    assert seen.x == [1.0]
    assert audit.history.signal.values.tolist() == ["x"]


def test_routers_that_give_nothing_but_nan_are_reported_once(caplog: pytest.LogCaptureFixture):
    logits = np.random.default_rng(0).normal(size=(16, 4))
    with RuleAuditCallback({"sure": "high_routing_confidence"}, flush_every=2) as audit:
        for _ in range(6):
            audit.on_step({"router_probs": logits})
    assert [message.partition(" Usual")[0] for message in caplog.messages] == [
        "routing_confidence: NaN in each of the first 2 rows, so that rules over them are UNKNOWN."
    ]


def test_a_kind_of_zarr_sink_is_the_store(tmp_path: Path):
    class Mine(ZarrSink):
        pass

    with RuleAuditCallback(RULES, sinks=[Mine(tmp_path / "mine.zarr")]) as audit:
        audit.on_step({"x": 0.0})
        assert audit.path == tmp_path / "mine.zarr"


def test_rows_of_a_block_may_differ_in_what_their_metrics_are(caplog: pytest.LogCaptureFixture):
    """A signal that reads all metrics sees those that come late as well."""

    class Counting:
        @hookimpl
        def provide_signals(self) -> dict[str, Signal]:
            return {"known": Signal(lambda metrics: jnp.float32(len(metrics)), ("*",))}

    audit = Audit({"r": "high_known"}, plugin_manager=get_plugin_manager([Counting()]))
    rows = [({"x": 0.0}, None), ({"x": 1.0, "late": 2.0}, None), ({"x": 2.0}, 7)]
    states: list[Any] = []
    for block in (False, True):
        beside = Beside(audit, rows[0][0])
        if block:
            beside.block(beside.due(rows))
        else:
            for row in rows:
                beside.step(*beside.due([row])[0])
        states.append(beside.state)
    jax.tree.map(np.testing.assert_array_equal, *states)
    assert states[0].rows[:3, 0].tolist() == [0, 1, 7]
    assert caplog.text.count("the first step did not have it: late") == 2


def test_a_mesh_of_one_device_compiles_once():
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    x = jax.device_put(jnp.zeros(8), jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    with RuleAuditCallback(RULES) as audit:
        for _ in range(3):
            audit.on_step({"x": x.sum()})
        update: Any = audit._beside and audit._beside._row
        assert update._cache_size() == 1
