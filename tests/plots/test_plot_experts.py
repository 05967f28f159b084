"""Shares of experts: which lines, cells and marks there are; the pictures are judged by eye."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fake_records as fake
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import QuadMesh

from moe_rules_callback.errors import HistoryError
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.plots import plot_expert_totals, plot_experts
from moe_rules_callback.plots.experts import LINES, PANELS
from moe_rules_callback.plots.style import ALARM


def drawn(draw: Any, share: np.ndarray) -> Any:
    """The figure of a history with these shares [rows, Y, E]."""
    return draw(history_of(share))


def history_of(share: np.ndarray) -> xr.Dataset:
    """A history with these shares [rows, Y, E]."""
    rows, layers, experts = share.shape
    records = fake.make_records(rows, fake.make_schema(layers, experts))
    return records_to_dataset(replace(records, expert_share=share.astype(np.float32)))


def shares(rows: int = 60, layers: int = 2, experts: int = 8) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.full(experts, 50.0), (rows, layers))


def collapsed(experts: int) -> np.ndarray:
    """In the second of two layers the last expert takes most, and the one before it nothing."""
    share = shares(experts=experts)
    share[30:, 1] = 0.25 / (experts - 2)
    share[30:, 1, -1], share[30:, 1, -2] = 0.75, 0.0
    return share


def meshes(figure: Any) -> list[Any]:
    return [part for axes in figure.axes for part in axes.collections if isinstance(part, QuadMesh)]


def test_up_to_16_experts_are_lines_with_their_fair_share():
    share = shares(rows=9)  # too few to be smoothed
    figure = drawn(plot_experts, share)
    assert [axes.get_title("left") for axes in figure.axes] == ["block_0", "block_1"]
    for layer, axes in enumerate(figure.axes):
        lines = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
        assert lines.keys() == {*map(str, range(8)), "fair share"}
        for expert in range(8):
            np.testing.assert_allclose(lines[str(expert)], share[:, layer, expert], rtol=1e-6)
        assert lines["fair share"].tolist() == [1 / 8, 1 / 8]
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [*map(str, range(8)), "fair share"]


def test_all_panels_hold_the_largest_share():
    axes = drawn(plot_experts, collapsed(8)).axes
    assert {panel.get_ylim() for panel in axes} == {axes[0].get_ylim()}
    assert axes[0].get_ylim()[0] == 0
    assert axes[0].get_ylim()[1] > 0.75


def test_more_experts_are_a_heatmap_of_their_share_over_the_fair_one():
    share = shares(experts=LINES + 1)
    first, second, _ = meshes(drawn(plot_experts, share))  # and the colour bar
    for layer, mesh in enumerate((first, second)):
        np.testing.assert_allclose(mesh.get_array(), 17 * share[:, layer].T, rtol=1e-5)


@pytest.mark.parametrize("experts", [8, 64])
def test_dead_and_dominant_experts_are_marked_where_they_are(experts):
    healthy, ill = drawn(plot_experts, collapsed(experts)).axes[:2]
    assert healthy.get_title("right") == ""
    assert ill.get_title("right") == f"dead: expert {experts - 2}; dominant: expert {experts - 1}"
    markers = {line.get_marker() for line in ill.lines if line.get_color() == ALARM}
    assert markers == {"x", "^"}
    assert not [line for line in healthy.lines if line.get_color() == ALARM]


def test_many_dead_experts_are_counted():
    share = shares(experts=64)
    share[20:, 0, :10] = 0
    assert drawn(plot_experts, share).axes[0].get_title("right") == "dead: 10 experts"


def test_of_many_layers_the_most_uneven_are_shown_in_their_order():
    share = shares(layers=61, experts=4)
    uneven = [3, 7, 11, 20, 33, 40, 41, 50, 60]
    share[:, uneven, 0], share[:, uneven, 1:] = 0.55, 0.15
    figure = drawn(plot_experts, share)
    assert [axes.get_title("left") for axes in figure.axes] == [f"block_{layer}" for layer in uneven]
    assert len(uneven) == PANELS
    assert "9 most uneven of 61 layers" in figure.get_suptitle()


def test_layers_with_fewer_experts_and_without_any():
    share = shares(layers=3, experts=8)
    share[:, 1, 4:] = np.nan
    share[:, 1, :4] = 0.25
    share[:, 2] = np.nan
    figure = drawn(plot_experts, share)
    assert [axes.get_title("left") for axes in figure.axes] == ["block_0", "block_1"]
    fair = [
        line.get_ydata()[0] for axes in figure.axes for line in axes.lines if line.get_label() == "fair share"
    ]
    assert fair == [1 / 8, 1 / 4]
    assert figure.axes[1].get_title("right") == ""  # what is not there is not dead


def test_bars_are_means_over_the_run_and_the_layers():
    share = collapsed(8)
    figure = drawn(plot_expert_totals, share)
    bars = [patch.get_height() for patch in figure.axes[0].patches]
    np.testing.assert_allclose(bars, share.mean(axis=(0, 1)), rtol=1e-5)
    (last,) = [line for line in figure.axes[0].lines if line.get_marker() == "D"]
    np.testing.assert_allclose(last.get_ydata(), share[-32:].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(meshes(figure)[0].get_array(), 8 * share.mean(axis=0), rtol=1e-5)


def test_one_layer_has_bars_alone_and_names_the_dead():
    figure = drawn(plot_expert_totals, collapsed(8)[:, 1:])
    assert not meshes(figure)
    assert figure.axes[0].get_title("right") == "dead: expert 6; dominant: expert 7"


@pytest.mark.parametrize("draw", [plot_experts, plot_expert_totals])
@pytest.mark.parametrize(("rows", "layers", "experts"), [(1, 1, 1), (1, 2, 32), (3, 61, 256), (900, 1, 2)])
def test_extreme_sizes(draw, rows, layers, experts, tmp_path):
    draw(history_of(shares(rows, layers, experts))).savefig(tmp_path / "picture.png")


@pytest.mark.parametrize("draw", [plot_experts, plot_expert_totals])
def test_without_shares_there_is_nothing_to_draw(draw):
    with pytest.raises(HistoryError, match="holds no shares of experts: the steps passed neither"):
        draw(records_to_dataset(fake.make_records(5, fake.make_schema(experts=0))))
    with pytest.raises(HistoryError, match="NaN in every row"):
        draw(history_of(shares() * np.nan))
