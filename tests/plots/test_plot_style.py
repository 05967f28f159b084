"""Colours that the colour-blind tell apart, labels, and what thinning must keep."""

from __future__ import annotations

import itertools

import fake_records as fake
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from moe_rules_callback.errors import HistoryError
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.plots.style import ALARM, COLOURS, label, layer_labels, looks, new_figure
from moe_rules_callback.plots.thinning import BINS, rolling_mean, rows_of, smooth, thin
from moe_rules_callback.plots.timeline import STATES

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB
SIGHT = {
    "full": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)  # of linear sRGB


def lab(colour: str, sight: str) -> np.ndarray:
    """CIE L*a*b* of a colour as seen by somebody."""
    srgb = np.array(to_rgb(colour))
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    xyz = XYZ @ np.clip(SIGHT[sight] @ linear, 0, 1) / XYZ.sum(axis=1)
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHT)
def test_states_differ_in_colour_and_in_lightness(sight):
    seen = [lab(colour, sight) for colour in STATES.values()]
    for one, other in itertools.combinations(seen, 2):
        assert abs(one[0] - other[0]) > 12
        assert np.linalg.norm(one - other) > 20


@pytest.mark.parametrize("sight", SIGHT)
def test_firing_is_no_state(sight):
    alarm = lab(ALARM, sight)
    assert min(np.linalg.norm(alarm - lab(colour, sight)) for colour in STATES.values()) > 40


@pytest.mark.parametrize("sight", ["full", "protanopia", "deuteranopia"])
def test_colours_of_lines_are_told_apart(sight):
    seen = [lab(colour, sight) for colour in (*COLOURS, ALARM)]
    assert min(np.linalg.norm(one - other) for one, other in itertools.combinations(seen, 2)) > 10


def test_20_looks_differ():
    assert len({(colour, str(dashes)) for colour, dashes in itertools.islice(looks(), 20)}) == 20


def test_a_long_label_keeps_both_ends():
    shortened = label("a_rule_about_the_router_of_layer_number_17")
    assert shortened.startswith("a_rule_about")
    assert shortened.endswith("number_17")
    assert len(shortened) == 32


@pytest.mark.parametrize(
    ("layers", "labels"),
    [
        (["decoder/block_0/moe", "decoder/block_1/moe"], ["block_0", "block_1"]),
        (["a/0/x", "b/1/x"], ["a/0", "b/1"]),
        (["moe", "decoder/moe"], ["moe", "decoder/moe"]),
        (["decoder/moe"], ["decoder/moe"]),
    ],
)
def test_layers_are_named_by_what_tells_them_apart(layers, labels):
    assert layer_labels(layers) == labels


@pytest.mark.parametrize("block", [1, 10_000, 2**24])  # values read at once
def test_thinning_keeps_extremes_and_means_however_it_reads(block, monkeypatch):
    monkeypatch.setattr("moe_rules_callback.plots.thinning.BLOCK", block)
    values = np.random.default_rng(0).standard_normal((5_000, 3, 2)).astype(np.float32)
    values[3_210, 1, 1], values[17, 0, 0], values[100:200] = 1e6, -1e6, np.nan
    thinned = thin(np.arange(5_000), values)
    starts = thinned.at
    assert thinned.mean.shape == (BINS, 3, 2)
    assert np.nanmax(thinned.high) == 1e6
    assert np.nanmin(thinned.low) == -1e6
    assert thinned.count.sum() == np.isfinite(values).sum()
    np.testing.assert_allclose(
        thinned.mean[300], np.mean(values[starts[300] : starts[301]], axis=0), rtol=1e-5
    )
    np.testing.assert_allclose(thinned.overall, np.nanmean(values.astype(float), axis=0), rtol=1e-4)


def test_uneven_steps_make_equal_parts_of_the_run():
    step = np.concatenate([np.arange(0, 1_000), np.arange(1_000, 100_000, 100)])
    thinned = thin(step, np.ones(len(step)), bins=100)
    assert thinned.rows == 999
    assert thinned.edges[-1] == 100_000 - 100 + np.median(np.diff(step))
    assert (np.diff(thinned.edges) > 0).all()


def test_a_single_row_is_two_points():
    thinned = thin(np.array([7]), np.array([[0.5, np.nan]]))
    assert thinned.at.tolist() == [6.5, 7.5]
    assert thinned.edges.tolist() == [6.5, 7.0, 7.5]
    np.testing.assert_array_equal(thinned.mean, [[0.5, np.nan]] * 2)


def test_few_rows_are_left_as_they_are():
    values = np.random.default_rng(0).standard_normal(2 * BINS)
    thinned = thin(np.arange(2 * BINS), values)
    np.testing.assert_array_equal(thinned.low, values)
    np.testing.assert_array_equal(thinned.high, values)
    assert thinned.rows == 1


def test_smoothing_says_what_it_did():
    random = np.random.default_rng(0).standard_normal
    assert smooth(thin(np.arange(9), random(9)))[1] == "every row"
    few, many = thin(np.arange(600), random(600)), thin(np.arange(40_000), random(40_000))
    means, note = smooth(few)
    assert note == "pale: every row, line: rolling mean of 30 rows"
    np.testing.assert_allclose(means, rolling_mean(few.mean, 30)[0])
    means, note = smooth(many)
    assert note == "pale: least to most of 100 rows, line: their mean"
    np.testing.assert_array_equal(means, many.mean)


def test_rows_are_put_in_order_and_must_be_some():
    history = records_to_dataset(fake.make_records(20))
    shuffled = history.isel(step=np.random.default_rng(0).permutation(20))
    np.testing.assert_array_equal(rows_of(shuffled).loss, history.loss)
    with pytest.raises(HistoryError, match="Rows arrive with the first flush"):
        rows_of(history.isel(step=slice(0)))


def test_a_notebook_shows_a_figure_by_itself() -> None:
    assert new_figure(1, 1)._repr_png_().startswith(b"\x89PNG")  # pyright: ignore[reportAttributeAccessIssue]
