"""One way to open a run, whatever wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import fake_records as fake
import numpy as np
import pytest
import xarray as xr

from moe_rules_callback.errors import LogError, MissingSignalError
from moe_rules_callback.history import open_history, records_to_dataset
from moe_rules_callback.replay import replay
from moe_rules_callback.runs import is_history, open_run
from moe_rules_callback.sinks.zarr import ZarrSink
from moe_rules_callback.verdicts import verdicts

RULES = {"decided": "0.75 :: low_router_entropy", "uneven": "0.75 :: high_load_cv"}
ROWS = 40


def log_rows() -> list[dict]:
    random = np.random.default_rng(0)
    loads = random.dirichlet(np.full(6, 5.0), ROWS).round(4)
    entropy = np.linspace(1.75, 0.1, ROWS).round(4)
    return [
        {"epoch": i, "entropy": entropy[i], "utilization": loads[i].tolist(), "metrics": {"loss": 3 - i / 20}}
        for i in range(ROWS)
    ]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "training_log.txt"
    path.write_text("\n".join(map(json.dumps, log_rows())))
    return path


def test_a_log_gives_bit_by_bit_what_its_metrics_give(log: Path):
    rows = log_rows()
    metrics = {
        "loss": np.array([row["metrics"]["loss"] for row in rows]),
        "router_entropy": np.array([row["entropy"] for row in rows]) / np.log(6),
        "expert_load": np.array([row["utilization"] for row in rows]),
    }
    expected = records_to_dataset(replay(metrics, RULES, top_k=2))
    run = open_run(log, RULES, top_k=2)
    for name in ("truth", "truth_layer", "state", "loss", "expert_share", "step"):
        np.testing.assert_array_equal(run[name].values, expected[name].values)
    assert run["state"].sel(rule="decided").values[[0, -1]].tolist() == [0, 1]


def test_a_log_without_rules_is_judged_by_the_shipped_book(log: Path):
    assert "dead_expert" in open_run(log).rule.values


def test_it_keeps_how_the_log_was_read(log: Path):
    config = json.loads(open_run(log, RULES, map=["metrics.loss=-"]).attrs["config"])
    assert config["step_column"] == "epoch"
    assert config["columns"] == {
        "entropy": "router_entropy",
        "utilization": "expert_load",
        "metrics.loss": "-",
    }
    assert config["notes"] == [
        "experts per token are not known: 1 is assumed; say --top-k K if it is more",
        "rows are epochs: warm-ups of rules, which count steps, are left out",
    ]


def test_warm_ups_do_not_apply_to_epochs(log: Path):
    run = open_run(log)
    assert run.step.values[-1] < 100
    assert {verdict.rows for verdict in verdicts(run)} == {run.sizes["step"]}


def test_a_rule_of_ones_own_over_a_signal_that_the_log_lacks(log: Path):
    with pytest.raises(MissingSignalError, match="rule 'sure' needs the signal 'routing_confidence'"):
        open_run(log, {"sure": "high_routing_confidence"})


def test_a_history_opens_as_it_stands(tmp_path: Path):
    records = fake.make_records(50)
    fake.feed(ZarrSink(), records, fake.make_run(tmp_path))
    for path in (tmp_path, tmp_path / "audit.zarr"):
        assert is_history(path)
        xr.testing.assert_identical(open_run(path).load(), open_history(path).load())


def test_a_history_of_a_log_can_be_judged_again(log: Path, tmp_path: Path):
    first = open_run(log, RULES, top_k=2)
    sink = ZarrSink(tmp_path / "audit.zarr")
    records = replay(
        {
            "router_entropy": np.array([row["entropy"] for row in log_rows()]) / np.log(6),
            "expert_load": np.array([row["utilization"] for row in log_rows()]),
        },
        RULES,
        top_k=2,
    )
    fake.feed(sink, records, fake.make_run(tmp_path, records.schema))
    again = open_run(tmp_path, {"calm": "0.75 :: ~high_load_cv"})
    assert again.rule.values.tolist() == ["calm"]
    uneven = first.moe_rules["uneven"].values
    calm = again.moe_rules["calm"].values
    np.testing.assert_allclose(calm, 1 - uneven[:, ::-1], rtol=0, atol=1e-6)  # another program


def test_what_is_no_history(log: Path, tmp_path: Path):
    assert not is_history(log)
    assert not is_history(tmp_path)
    xr.Dataset({"loss": ("step", [1.0])}).to_zarr(tmp_path / "other.zarr", zarr_format=3, consolidated=False)
    assert not is_history(tmp_path / "other.zarr")
    (tmp_path / "other.zarr" / "zarr.json").write_text("[]")
    assert not is_history(tmp_path / "other.zarr")
    with pytest.raises(LogError, match="the directory holds no event files"):
        open_run(tmp_path)
