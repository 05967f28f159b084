"""The table of runs keeps its promises; recording writes each run once, whole, and fit for replay."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from moe_rules_callback.replay import replay_history
from moe_rules_callback.signals import WINDOW_SIGNALS
from reference.faults import record as recorder
from reference.faults.catalogue import FAULTS
from reference.faults.record import is_recorded, open_run, path_of, record, record_run, select
from reference.faults.runs import RUNS, Run
from reference.train import train

TUNING, HELD_OUT = select("tuning"), select("held_out")
TINY = Run("tuning", "no_balancing", 0, 4, 1, "softmax", "prose", steps=24)


def test_names_are_unique():
    assert len({(run.split, run.name) for run in RUNS}) == len(RUNS) == len(TUNING) + len(HELD_OUT)


def test_the_sets_share_neither_seed_nor_text():
    assert not {run.seed for run in TUNING} & {run.seed for run in HELD_OUT}
    assert {run.dataset for run in HELD_OUT} == {"tinyshakespeare"}
    assert {run.dataset for run in TUNING} == {"python", "prose", "code"}


@pytest.mark.parametrize("split", ["tuning", "held_out"])
def test_every_fault_in_every_shape(split):
    shapes = defaultdict(set)
    for run in select(split):
        if run.illness:
            shapes[run.fault].add((run.experts, run.top_k))
    expected = {"tuning": {(8, 2), (4, 1), (8, 1)}, "held_out": {(16, 2), (8, 2), (4, 2)}}[split]
    top1 = {"tuning": {(4, 1), (8, 1)}, "held_out": {(8, 1)}}[split]
    ill = [name for name, fault in FAULTS.items() if fault.illness]
    assert shapes == {name: top1 if name == "top1_renormalised" else expected for name in ill}


def test_there_are_enough_healthy_rows_of_many_kinds():
    assert sum(run.healthy_rows for run in TUNING) >= 12_000
    assert sum(run.healthy_rows for run in HELD_OUT) >= 31_000
    healthy = [run for run in RUNS if not run.illness]
    kinds = {(run.experts, run.top_k, run.gate) for run in healthy}
    assert kinds >= {(e, k, gate) for e in (4, 8) for k in (1, 2) for gate in ("softmax", "sigmoid")}
    assert {run.fault for run in healthy} == {"", "gentle_restart", "strong_balancing"}


def test_faults_set_in_before_the_end():
    assert all(FAULTS[run.fault].onset < run.steps - 100 for run in RUNS if run.illness)


@pytest.mark.slow
def test_a_recorded_run_replays(tmp_path):
    record([TINY], tmp_path)
    history = open_run(tmp_path, TINY)
    np.testing.assert_array_equal(history.step, np.arange(24))
    told = json.loads(history.attrs["config"])
    assert (told["fault"], told["fault_step"]) == ("no_balancing", 0)
    names = set(history.signal.values.tolist())
    assert names >= {"loss", "load_cv", "router_gradient_share", "expert_weight_cosine", "routing_flip_rate",
                     "router_noise_repetition", "router_precision_disagreement", "router_saturation",
                     "router_logit_rms", "routing_accuracy", "dropped_token_fraction"}  # fmt: skip
    # These look further back.
    later = {"router_saturation", "dead_expert_fraction", *WINDOW_SIGNALS}
    measured = history.signal_pooled.sel(signal=sorted(names - later)).isel(step=-1)
    assert np.isfinite(measured).all()
    records = replay_history(history, {"dropping": "0.9 :: high_dropped_token_fraction"})
    assert len(records) == 24


@pytest.mark.slow
def test_batches_and_losses_are_those_of_the_trainer(tmp_path):
    config = replace(TINY.config, audit=False, logdir=str(tmp_path), fault="")
    expected = train(config, str).losses
    got = record_run(replace(TINY, fault="")).loss
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def recorded(run: Run) -> xr.Dataset:
    return xr.Dataset(attrs={"config": json.dumps(recorder._told(run))})


def test_recording_resumes(tmp_path, monkeypatch):
    runs, seen = TUNING[:3], []

    def fail_at_the_second(run: Run) -> xr.Dataset:
        seen.append(run)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return recorded(run)

    monkeypatch.setattr(recorder, "record_run", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        record(runs, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [path_of(tmp_path, seen[0])]
    record(runs, tmp_path)
    assert sorted(run.name for run in seen[2:]) == sorted(run.name for run in runs if run != seen[0])
    record(runs, tmp_path)
    assert len(seen) == 4


def test_what_was_recorded_with_another_configuration_is_recorded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "record_run", recorded)
    record([TINY], tmp_path)
    assert is_recorded(tmp_path, TINY)
    with open_run(tmp_path, TINY) as history:
        other = json.loads(history.attrs["config"]) | {"balance_weight": 0.5}
    xr.Dataset(attrs={"config": json.dumps(other)}).to_netcdf(path_of(tmp_path, TINY), engine="scipy")
    assert not is_recorded(tmp_path, TINY)
    record([TINY], tmp_path)
    assert is_recorded(tmp_path, TINY)
