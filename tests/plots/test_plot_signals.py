"""Signals by layer: which lines there are, and what is said where there is nothing to draw."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fake_records as fake
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes

from moe_rules_callback.errors import HistoryError
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.plots import plot_accuracy, plot_coactivation, plot_entropy, plot_layers
from moe_rules_callback.records import SignalInfo


def history_of(rows: int, layers: int = 2, **signals: bool) -> xr.Dataset:
    """A history of random signals: name -> whether it is by layer."""
    infos = tuple(SignalInfo(name, per_layer=by_layer) for name, by_layer in signals.items())
    values = np.random.default_rng(0).random((rows, len(infos), layers)).astype(np.float32)
    schema = replace(fake.make_schema(layers), signals=infos)
    records = fake.make_records(rows, fake.make_schema(layers))
    return records_to_dataset(
        replace(records, schema=schema, signal_value=values, signal_pooled=values.mean(axis=2))
    )


def lines(axes: Axes) -> dict[object, np.ndarray]:
    return {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}


def test_a_line_a_layer_and_a_thick_one_for_the_pooled_value():
    history = history_of(9, router_entropy=True)  # too few rows to be smoothed
    figure = plot_entropy(history)
    drawn = lines(figure.axes[0])
    assert list(drawn) == ["block_0", "block_1", "pooled"]
    np.testing.assert_array_equal(drawn["block_1"], history.signal_value[:, 0, 1])
    np.testing.assert_array_equal(drawn["pooled"], history.signal_pooled[:, 0])
    widths = [line.get_linewidth() for line in figure.axes[0].lines]
    assert widths[-1] == 2 * max(widths[:-1]) + 0.2
    assert figure.axes[0].get_ylim() == (-0.02, 1.02)


def test_lines_are_smooth_and_every_row_stays_to_be_seen():
    history = history_of(600, router_entropy=True)
    axes: Any = plot_entropy(history).axes[0]
    want = history.signal_pooled[:, 0].rolling(step=30, min_periods=1, center=True).mean()
    np.testing.assert_allclose(lines(axes)["pooled"], want, rtol=1e-5)
    band = axes.collections[-1].get_paths()[0].vertices[:, 1]
    assert band.max() == history.signal_pooled.max()
    assert band.min() == history.signal_pooled.min()


def test_of_many_layers_the_depth_is_shown_and_the_extremes_are_named():
    history = history_of(9, layers=61, router_entropy=True)
    figure = plot_entropy(history)
    axes, bar = figure.axes
    assert len(axes.lines) == 62
    assert not figure.legends
    assert [text.get_text() for text in bar.get_yticklabels()] == ["block_0", "block_60"]
    ends = history.signal_value.values[-1, 0]
    assert [text.get_text() for text in axes.texts] == [f"block_{ends.argmin()}", f"block_{ends.argmax()}"]


@pytest.mark.parametrize("name", ["routing_accuracy", "routing_acc"])
def test_a_signal_of_the_whole_model_is_one_line(name):
    figure = plot_accuracy(history_of(9, loss=False, **{name: False}))
    assert list(lines(figure.axes[0])) == ["pooled"]
    assert not figure.legends


def test_small_multiples_show_every_signal_by_layer():
    history = history_of(
        9, loss=False, router_entropy=True, load_cv=True, expert_coactivation=True, max_violation=True
    )
    figure = plot_layers(history)
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == ["router_entropy", "load_cv", "expert_coactivation", "max_violation"]
    for place, axes in enumerate(figure.axes, start=1):
        np.testing.assert_array_equal(lines(axes)["block_0"], history.signal_value[:, place, 0])
    assert [axes.get_xlabel() for axes in figure.axes] == ["", "", "Step", "Step"]


@pytest.mark.parametrize(
    ("draw", "names"),
    [
        (plot_entropy, "router_entropy"),
        (plot_accuracy, "routing_accuracy or routing_acc"),
        (plot_coactivation, "expert_coactivation"),
    ],
)
def test_what_is_not_recorded_is_named(draw, names):
    with pytest.raises(HistoryError, match=rf"holds no {names}: name it in a rule or in signals="):
        draw(history_of(9, load_cv=True))


def test_nothing_but_nan_is_nothing():
    history = history_of(9, router_entropy=True, loss=False)
    history["signal_pooled"][:], history["signal_value"][:] = np.nan, np.nan
    with pytest.raises(HistoryError, match="it is NaN in every row"):
        plot_entropy(history)
    with pytest.raises(HistoryError, match="no signal by layer"):
        plot_layers(history)


@pytest.mark.parametrize(("rows", "layers"), [(1, 1), (1, 8), (2, 61), (3_000, 2)])
def test_extreme_sizes(rows, layers, tmp_path):
    history = history_of(rows, layers, router_entropy=True, load_cv=True)
    history["signal_value"][: rows // 2] = np.nan
    plot_entropy(history).savefig(tmp_path / "entropy.png")
    plot_layers(history).savefig(tmp_path / "layers.png")
