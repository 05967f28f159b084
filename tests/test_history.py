from __future__ import annotations

import dataclasses
import json

import fake_records as fake
import numpy as np
import pytest
import xarray as xr

from moe_rules_callback.columns import columns
from moe_rules_callback.errors import HistoryError, UnknownNameError
from moe_rules_callback.history import open_history, records_to_dataset
from moe_rules_callback.plots.thinning import rolling_mean
from moe_rules_callback.records import Records, State
from moe_rules_callback.sinks.zarr import ZarrSink
from moe_rules_callback.verdicts import verdicts


@pytest.fixture(scope="module")
def records() -> Records:
    return fake.make_records(150)


@pytest.fixture(scope="module")
def history(records) -> xr.Dataset:
    return records_to_dataset(records)


def test_variables_and_dimensions_are_those_of_the_design(history):
    assert dict(history.sizes) == {"step": 150, "rule": 6, "bound": 2, "signal": 3, "layer": 2, "expert": 4}
    assert {name: variable.dims for name, variable in history.data_vars.items()} == {
        "truth": ("step", "rule", "bound"),
        "truth_layer": ("step", "rule", "layer", "bound"),
        "state": ("step", "rule"),
        "signal_value": ("step", "signal", "layer"),
        "signal_pooled": ("step", "signal"),
        "expert_share": ("step", "layer", "expert"),
        "loss": ("step",),
        "wall_time": ("step",),
    }
    assert history.bound.values.tolist() == ["lower", "upper"]
    assert history.state.dtype == np.int8


def test_headline_is_any_layer_for_a_risk_and_all_layers_otherwise(records, history):
    at = history.truth_layer.isel(step=7)
    for rule in records.schema.rules:
        layers = at.sel(rule=rule.name).values.tolist()  # [layer][bound]
        choose = max if rule.kind == "risk" else min
        want = [choose(layer[bound] for layer in layers) for bound in (0, 1)]
        assert history.truth.isel(step=7).sel(rule=rule.name).values.tolist() == want


def test_batches_are_joined_in_order(records, history):
    xr.testing.assert_identical(records_to_dataset([records[:64], records[64:65], records[65:]]), history)


def test_attributes_tell_what_the_rules_say(records):
    history = records_to_dataset(records, {"learning_rate": 1e-3, "mesh": object})
    rules = json.loads(history.attrs["rules"])
    assert list(rules) == list(records.schema.rule_names)
    assert rules["load_imbalance"] == {
        "formula": "high_expert_imbalance & increasing_weight_magnitude",
        "text": "0.75 :: high_expert_imbalance & increasing_weight_magnitude",
        "threshold": 0.75,
        "kind": "risk",
        "warmup": 100,
        "severity": "warning",
        "description": "",
        "cause": "",
        "next_step": "",
    }
    assert json.loads(history.attrs["signals"])["loss"]["units"] == "nat"
    assert json.loads(history.attrs["config"]) == {"learning_rate": 1e-3, "mesh": "<class 'object'>"}
    assert history.attrs["schema_version"] == 1
    assert history.attrs["numpy_version"] == np.__version__
    assert "step = -1" in history.attrs["unwritten_rows"]
    names = history.state.attrs["flag_meanings"].split()
    assert dict(zip(names, history.state.attrs["flag_values"], strict=True)) == {
        "not_written": -1, "false": 0, "true": 1, "unknown": 2, "contradictory": 3,
    }  # fmt: skip


def test_without_a_router_there_is_no_expert_share():
    history = records_to_dataset(fake.make_records(3, fake.make_schema(experts=0)))
    assert "expert_share" not in history
    assert "expert" not in history.dims


def test_no_batch_is_an_error_and_an_empty_batch_is_not(records):
    with pytest.raises(HistoryError, match="Pass at least one batch; it may be empty"):
        records_to_dataset([])
    assert records_to_dataset(records[:0]).sizes["step"] == 0


def test_step_comes_last_since_it_commits_a_row(records):
    assert columns(records.schema)[-1].name == "step"


# Opening.


def test_memory_and_disk_hold_the_same(records, tmp_path):
    fake.feed(ZarrSink(), records, fake.make_run(tmp_path, config={"seed": 1}))
    xr.testing.assert_identical(open_history(tmp_path).load(), records_to_dataset(records, {"seed": 1}))


@pytest.mark.parametrize("experts", [0, 4])
def test_memory_and_disk_hold_the_same_types(experts, tmp_path):
    records = fake.make_records(5, fake.make_schema(experts=experts))
    fake.feed(ZarrSink(), records, fake.make_run(tmp_path, records.schema))
    on_disk, in_memory = open_history(tmp_path), records_to_dataset(records)
    assert {name: on_disk[name].dtype for name in on_disk.variables} == {
        name: in_memory[name].dtype for name in in_memory.variables
    }


def test_a_logdir_gives_its_newest_store(tmp_path):
    for rows in (3, *[4] * 9, 5):
        records = fake.make_records(rows)
        fake.feed(ZarrSink(), records, fake.make_run(tmp_path))
    assert open_history(tmp_path).sizes["step"] == 5  # audit-11, which sorts before audit-2 as text
    assert open_history(tmp_path / "audit.zarr").sizes["step"] == 3


def test_a_live_store_gives_the_rows_written_so_far(records, tmp_path):
    sink = ZarrSink()
    fake.feed(sink, records[:100], fake.make_run(tmp_path), end=False)
    early = open_history(tmp_path)
    sink.on_records(records[100:])
    assert early.step.values.tolist() == list(range(100))
    np.testing.assert_array_equal(early.truth.values, records.truth[:100])
    assert open_history(str(tmp_path)).sizes["step"] == 150


def test_arrays_of_different_lengths_open(records, tmp_path):
    """What a kill leaves behind while a store is grown or closed, one array after the other."""
    sink = ZarrSink()
    fake.feed(sink, records, fake.make_run(tmp_path), end=False)
    assert sink.path
    whole = sink._columns
    sink._columns = whole[:3]
    sink.on_train_end(fake.make_run(tmp_path))
    sink._columns = whole
    with pytest.raises(ValueError, match="conflicting sizes"):
        xr.open_zarr(sink.path, consolidated=False)
    xr.testing.assert_identical(open_history(tmp_path).load(), records_to_dataset(records))


def test_nothing_there(tmp_path):
    with pytest.raises(HistoryError, match=r"There is no directory .*nowhere. open_history takes the logdir"):
        open_history(tmp_path / "nowhere")
    with pytest.raises(HistoryError, match=r"holds no audit.zarr. Either the run has not started, or"):
        open_history(tmp_path)


def test_a_store_of_somebody_else(tmp_path):
    xr.Dataset({"x": ("y", [1.0])}).to_zarr(tmp_path / "other.zarr", zarr_format=3, consolidated=False)
    with pytest.raises(HistoryError, match=r"is not a history of moe_rules_callback: it has no array `step`"):
        open_history(tmp_path / "other.zarr")


# The accessor.


def test_a_rule_reads_as_its_two_bounds(records, history):
    rule = history.moe_rules["routing_stability"]
    assert (rule.name, rule.dims) == ("routing_stability", ("step", "bound"))
    np.testing.assert_array_equal(rule.sel(bound="lower"), records.truth[:, 2, 0])
    np.testing.assert_array_equal(rule.sel(bound="upper"), records.truth[:, 2, 1])
    assert history.moe_rules.rules == records.schema.rule_names


def test_states_are_ints_that_say_what_they_mean(records, history):
    states = history.moe_rules.states("expert_specialization")
    assert states.dims == ("step",)
    np.testing.assert_array_equal(states, records.state[:, 0])
    assert State.TRUE in states
    assert "contradictory" in states.attrs["flag_meanings"]
    np.testing.assert_array_equal(history.moe_rules.states(), records.state)


@pytest.mark.parametrize("ask", ["__getitem__", "states", "first_true"])
def test_an_unknown_rule_names_the_closest(history, ask):
    with pytest.raises(UnknownNameError, match=r"no rule 'load_imbalence'. Did you mean load_imbalance\?"):
        getattr(history.moe_rules, ask)("load_imbalence")


def test_first_true_is_the_first_step_and_not_the_first_row(records):
    later = records_to_dataset(dataclasses.replace(records, step=records.step * 10 + 7))
    row = next(row for row, state in enumerate(records.state[:, 0]) if state == State.TRUE)
    assert row > 0
    assert later.moe_rules.first_true("expert_specialization") == 10 * row + 7
    assert (
        later.isel(step=slice(None, None, -1)).moe_rules.first_true("expert_specialization") == 10 * row + 7
    )
    assert later.moe_rules.first_true("load_imbalance") is None
    assert later.isel(step=slice(0)).moe_rules.first_true("expert_specialization") is None


@pytest.mark.parametrize("rows", [1, 2, 7, 30])
def test_rolling_is_the_mean_of_the_finite_rows_around(records, rows):
    truth = records.truth.copy()  # [n, R, 2]
    truth[40, 1] = np.nan
    history = records_to_dataset(records)
    history["truth"].values[:] = truth
    rolled = history.moe_rules.rolling(rows)
    assert rolled.dims == ("step", "rule", "bound")
    want = np.full(truth.shape, np.nan)
    for i in range(len(truth)):
        around = truth[max(0, i - rows // 2) : i - rows // 2 + rows]
        for index in np.ndindex(truth.shape[1:]):
            finite = [float(row[index]) for row in around if np.isfinite(row[index])]
            if finite:
                want[i, *index] = sum(finite) / len(finite)
    np.testing.assert_allclose(rolled, want, atol=1e-6)


def test_rolling_is_what_the_picture_draws(history):
    drawn = [rolling_mean(history.truth[:, 2, i].values.astype(float), 12)[0] for i in range(2)]
    rolled = history.moe_rules.rolling(12).sel(rule="routing_stability")
    np.testing.assert_allclose(rolled, np.transpose(drawn), atol=1e-6)


def test_the_accessor_gives_the_verdicts(history):
    assert history.moe_rules.verdicts() == verdicts(history)


def test_tutorial_variables(history):
    tutorial = history.moe_rules.to_tutorial()
    assert len(tutorial.data_vars) == 13
    xr.testing.assert_equal(
        tutorial.load_imbalance_U, history.truth.sel(rule="load_imbalance", bound="upper", drop=True)
    )


def test_plot_draws_this_history(history, tmp_path):
    figure = history.moe_rules.plot(tmp_path / "audit.png", smooth_rules=1)
    assert (tmp_path / "audit.png").exists()
    assert figure.axes[-1].lines[0].get_ydata()[-1] == pytest.approx(float(history.truth[-1, 0, 1]))
