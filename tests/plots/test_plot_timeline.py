"""The timeline is judged by eye when it changes; here: that each row shows the states of its rule."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import fake_records as fake
import numpy as np
import pytest
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle

from moe_rules_callback.errors import HistoryError
from moe_rules_callback.formula import Rule
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.plots import plot_timeline
from moe_rules_callback.plots.style import ALARM
from moe_rules_callback.plots.timeline import BAND, HEADING, KINDS, STATES, STRIP
from moe_rules_callback.records import State

RISK = Rule("risky", fake.CONFIDENT, kind="risk", warmup=30)
HEALTH = Rule("healthy", fake.CONFIDENT, kind="health")
WATCHED = Rule("watched", fake.CONFIDENT)


def history_of(states: dict[Rule, np.ndarray]) -> xr.Dataset:
    """A history in which rules had these states."""
    rows = len(next(iter(states.values())))
    records = fake.make_records(rows, fake.make_schema(rules=tuple(states)))
    return records_to_dataset(replace(records, state=np.stack(list(states.values()), axis=1).astype(np.int8)))


def areas(figure: Any, colour: str, top: float) -> float:
    """How much of a row that begins at `top` has a colour, in steps times height."""
    total = 0.0
    for collection in figure.axes[0].collections:
        x, y = np.concatenate([path.vertices for path in collection.get_paths()]).T
        if to_hex(collection.get_facecolor()[0]) == colour and top <= y.min() and y.max() <= top + 1:
            total += abs(0.5 * np.sum(x * np.roll(y, -1) - y * np.roll(x, -1)))
    return total


def notes(axes: Axes) -> list[str]:
    (right,) = axes.child_axes
    return [tick.get_text() for tick in right.get_yticklabels()]


def test_a_row_is_filled_by_the_share_of_each_state():
    state = np.repeat([State.FALSE, State.TRUE, State.UNKNOWN, State.CONTRADICTORY], [10, 20, 30, 40])
    figure = plot_timeline(history_of({WATCHED: state}))
    for one, rows in ((State.FALSE, 10), (State.TRUE, 20), (State.UNKNOWN, 30), (State.CONTRADICTORY, 40)):
        want = rows * (BAND[1] - BAND[0])
        assert areas(figure, STATES[one], HEADING) == pytest.approx(want, rel=1e-6), one
    assert areas(figure, ALARM, HEADING) == 0


def test_thinning_keeps_the_shares_and_each_firing():
    random = np.random.default_rng(0)
    state = random.choice([State.FALSE, State.UNKNOWN], 5_000)
    state[3_333] = State.TRUE
    figure = plot_timeline(history_of({RISK: state}))
    want = (state == State.FALSE).sum() * (BAND[1] - BAND[0])
    assert areas(figure, STATES[State.FALSE], HEADING) == pytest.approx(want, rel=0.02)
    assert areas(figure, ALARM, HEADING) >= 11.9 * (STRIP[1] - STRIP[0])  # the whole column, to be seen
    assert "rows" in figure.axes[0].get_title("right")


def test_what_fires_is_marked_from_the_warm_up_on():
    state = np.full(100, State.UNKNOWN)
    state[[10, 50, 51, 52]] = State.TRUE
    state[80] = State.FALSE
    figure = plot_timeline(history_of({WATCHED: state, HEALTH: state, RISK: state}))
    axes = figure.axes[0]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["risky", "healthy", "watched"]  # risks first
    assert [text.get_text() for text in axes.texts] == list(KINDS.values())
    tops = [HEADING, 1 + 2 * HEADING, 2 + 3 * HEADING]
    strip = STRIP[1] - STRIP[0]
    assert [areas(figure, ALARM, top) / strip for top in tops] == pytest.approx([3, 1, 0])
    assert notes(axes) == ["fired in 4 %, first at 50", "fired in 1 %, first at 80", "TRUE in 4 %"]
    weights = [tick.get_fontweight() for tick in axes.get_yticklabels()]
    assert weights == ["bold", "bold", "normal"]
    (warmup,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert (warmup.get_x(), warmup.get_width()) == (0, 30)


def test_a_run_within_its_warm_up_is_not_judged():
    axes = plot_timeline(history_of({RISK: np.full(20, State.TRUE)})).axes[0]
    assert notes(axes) == ["not judged"]
    assert [patch.get_width() for patch in axes.patches if isinstance(patch, Rectangle)] == [20]


@pytest.mark.parametrize(
    ("true", "note"),
    [(0, "did not fire"), (1, "fired in <1 %, first at 30"), (1_969, "fired in >99 %, first at 30")],
)
def test_shares_are_neither_rounded_away_nor_up(true, note):
    state = np.full(2_000, State.FALSE)
    state[30 : 30 + true] = State.TRUE
    assert notes(plot_timeline(history_of({RISK: state})).axes[0]) == [note]


def test_sixty_rules_with_long_names_fit(tmp_path):
    rules = tuple(replace(rule, name="long_" * 30 + rule.name) for rule in fake.many_rules(60))
    history = records_to_dataset(fake.make_records(20, fake.make_schema(rules=rules)))
    figure = plot_timeline(history)
    figure.savefig(tmp_path / "timeline.png")
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert len(set(names)) == 60
    boxes = [tick.get_window_extent() for tick in figure.axes[0].get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0


def test_one_row_is_drawn(tmp_path):
    plot_timeline(history_of({RISK: np.array([State.TRUE])})).savefig(tmp_path / "one.png")


def test_without_rules_there_is_nothing_to_draw():
    history = records_to_dataset(fake.make_records(5, fake.make_schema(rules=())))
    with pytest.raises(HistoryError, match="holds no rules"):
        plot_timeline(history)
