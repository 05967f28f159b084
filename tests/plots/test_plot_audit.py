"""The picture is judged by eye when it changes; here: what is drawn, and that nothing breaks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_records as fake
import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.legend import Legend

from moe_rules_callback.errors import HistoryError
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.plots import plot_audit
from moe_rules_callback.plots.audit import LEGEND_RULES, TUTORIAL
from moe_rules_callback.plots.thinning import BINS


def drawn(figure: Figure, panel: int = -1) -> dict[Any, np.ndarray]:
    """The lines of a panel by their colour, as arrays [points, 2]."""
    return {line.get_color(): np.asarray(line.get_xydata()) for line in figure.axes[panel].lines}


def bands(figure: Figure) -> list[np.ndarray]:
    """Outlines of the bands in the lower panel, each [points, 2]."""
    collections = figure.axes[-1].collections
    return [np.asarray(path.vertices) for band in collections for path in band.get_paths()]


def legend_of(figure: Figure) -> Legend:
    legend = figure.axes[-1].get_legend()
    assert legend is not None
    return legend


@pytest.fixture(scope="module")
def history() -> xr.Dataset:
    return records_to_dataset(fake.make_records(600))


def test_lines_are_rolling_means_of_the_upper_bound_and_the_loss(history):
    figure = plot_audit(history, smooth_loss=50, smooth_rules=30)
    lines = drawn(figure)
    for rule, (colour, _) in TUTORIAL.items():
        upper = history.truth.sel(rule=rule, bound="upper", drop=True)
        np.testing.assert_allclose(
            lines[colour][:, 1],
            upper.rolling(step=30, min_periods=1, center=True).mean(),
            rtol=1e-5,
            err_msg=rule,
        )
    (loss,) = drawn(figure, 0).values()
    np.testing.assert_allclose(
        loss[:, 1], history.loss.rolling(step=50, min_periods=1, center=True).mean(), rtol=1e-5
    )


def test_bands_reach_down_to_the_lower_bound(history):
    figure = plot_audit(history, smooth_rules=1)
    for index, band in enumerate(bands(figure)):
        for bound, extreme in (("lower", band[:, 1].min()), ("upper", band[:, 1].max())):
            values = history.truth.isel(rule=index).sel(bound=bound)
            want = values.min() if bound == "lower" else values.max()
            assert extreme == pytest.approx(float(want), abs=1e-6)


def test_panels_share_the_step_axis_and_the_tutorials_frame(history):
    above, below = plot_audit(history).axes
    assert above.get_xlim() == below.get_xlim()
    assert below.get_ylim() == (-0.05, 1.05)
    assert len({(line.get_linestyle(), line.get_color()) for line in below.lines}) == 6


def test_legend_lists_rules_as_their_lines_end(history):
    legend = legend_of(plot_audit(history, smooth_rules=1))
    last = history.truth.sel(bound="upper").isel(step=-1)
    want = last.rule.values[np.argsort(-last.values)].tolist()
    assert [text.get_text() for text in legend.get_texts()] == want


def test_a_gap_stays_a_gap(history):
    broken = history.copy(deep=True)
    broken["loss"][100:150] = np.nan
    broken["loss"][200] = np.inf
    (loss,) = drawn(plot_audit(broken), 0).values()
    assert np.isnan(loss[100:150, 1]).all()
    assert np.isfinite(np.delete(loss[:, 1], [*range(100, 150), 200])).all()


def test_a_long_run_is_thinned_without_hiding_a_spike():
    history = records_to_dataset(fake.make_records(5_000))
    history["truth"][:] = 0.5
    history["truth"][3_210] = 1.0
    figure = plot_audit(history, smooth_rules=1)
    assert all(len(line) <= BINS for line in drawn(figure).values())
    assert max(band[:, 1].max() for band in bands(figure)) == 1.0


def test_thinning_by_step_keeps_the_mean():
    history = records_to_dataset(fake.make_records(4_000))
    (line,) = drawn(plot_audit(history, smooth_loss=1), 0).values()
    np.testing.assert_allclose(line[:, 1], history.loss.values.reshape(BINS, -1).mean(1), rtol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 10])
def test_short_runs(rows, tmp_path):
    figure = plot_audit(records_to_dataset(fake.make_records(rows)), tmp_path / "short.png")
    assert len(figure.axes[-1].lines) == 6
    assert all(len(line) >= 2 for line in drawn(figure).values())


def test_without_loss_there_is_one_panel(history):
    (only,) = plot_audit(history.assign(loss=history.loss * np.nan)).axes
    assert len(only.lines) == 6


def test_a_hundred_rules_fit_their_legend(tmp_path):
    history = records_to_dataset(fake.make_records(20, fake.make_schema(rules=fake.many_rules(100))))
    figure = plot_audit(history, tmp_path / "crowd.png")
    below = figure.axes[-1]
    legend = legend_of(figure)
    assert len(below.lines) == 100
    assert len(legend.get_texts()) == LEGEND_RULES
    assert legend.get_title().get_text() == "18 of 100 rules"
    box = legend.get_window_extent()
    assert box.y0 >= 0
    assert box.x1 <= figure.bbox.width
    assert below.get_window_extent().width > 0.6 * figure.bbox.width


def test_long_names_and_dollar_signs_do_not_break_the_legend(tmp_path):
    rule = fake.Rule("costs $5 and $" + "x" * 80, fake.CONFIDENT)
    history = records_to_dataset(fake.make_records(20, fake.make_schema(rules=(rule,))))
    figure = plot_audit(history, tmp_path / "long.png")
    assert figure.axes[-1].get_window_extent().width > 0.5 * figure.bbox.width


def test_file_format_follows_the_suffix(history, tmp_path):
    plot_audit(history, tmp_path / "audit.png")
    plot_audit(history, tmp_path / "audit.svg")
    png = (tmp_path / "audit.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert int.from_bytes(png[16:20], "big") == 2000  # ten inches at 200 dots
    assert "<svg" in (tmp_path / "audit.svg").read_text()


def test_no_rows_is_an_error_that_says_when_they_come(history):
    with pytest.raises(HistoryError, match=r"has no rows. Rows arrive with the first flush"):
        plot_audit(history.isel(step=slice(0)))


def test_pyplot_is_left_alone():
    code = (
        "import sys, fake_records as fake\n"
        "from moe_rules_callback.history import records_to_dataset\n"
        "records_to_dataset(fake.make_records(3)).moe_rules.plot()\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    tests = Path(__file__).parents[1]
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": f"{tests}:{tests.parent}"}, timeout=120
    )
