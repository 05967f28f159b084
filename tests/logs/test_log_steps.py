"""Which column counts the steps, and what becomes of rows that do not rise."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs import Log, read_log


def read(folder: Path, *rows: dict[str, Any], step: str | None = None) -> Log:
    path = folder / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return read_log(path, step=step)


@pytest.mark.parametrize(
    "name", ["step", "global_step", "_step", "iteration", "epoch", "trainer/global_step"]
)
def test_names_of_steps(name: str, tmp_path: Path):
    log = read(tmp_path, {"loss": 1.0, name: 10}, {"loss": 0.5, name: 20})
    assert (log.step_column, log.steps.tolist(), list(log.columns)) == (name, [10, 20], ["loss"])


def test_a_step_wins_over_an_epoch_which_stays_a_column(tmp_path: Path):
    log = read(tmp_path, {"epoch": 1, "step": 5}, {"epoch": 1, "step": 6})
    assert log.step_column == "step"
    assert log.columns["epoch"].tolist() == [1, 1]


def test_rows_out_of_order_are_sorted(tmp_path: Path):
    log = read(tmp_path, {"step": 2, "loss": 2.0}, {"step": 1, "loss": 1.0}, {"step": 3, "loss": 3.0})
    assert log.steps.tolist() == [1, 2, 3]
    assert log.columns["loss"].tolist() == [1, 2, 3]
    assert log.notes == ("'step' does not rise from row to row: rows are sorted by it",)


def test_a_later_row_of_the_same_step_counts_value_by_value(tmp_path: Path):
    log = read(
        tmp_path,
        {"step": 1, "loss": 1.0, "entropy": 0.5},
        {"step": 2, "loss": 2.0, "entropy": 0.4},
        {"step": 2, "loss": math.nan},  # NaN is a value, a missing one is none
        {"step": 3, "loss": 3.0},
    )
    assert log.steps.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(log.columns["loss"], [1, math.nan, 3])
    np.testing.assert_array_equal(log.columns["entropy"], [0.5, 0.4, math.nan])
    assert log.notes == ("1 row repeats a 'step': the later value counts",)


def test_rows_without_a_step_are_left_out(tmp_path: Path):
    log = read(tmp_path, {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"total_flos": 9.0})
    assert log.steps.tolist() == [1, 2]
    assert log.notes == ("1 row has no 'step': left out",)


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([0.5, 1.0, 1.5], "it has fractions"),
        ([-1, 0, 1], "it has negative values"),
        ([1, 1, 1], "most rows repeat it"),
        ([1, 2, 2**31], "it goes beyond 2,147,483,647"),
        ([[1], [2], [3]], "it holds lists"),
    ],
)
def test_a_guess_that_cannot_be_is_told_and_rows_are_numbered(steps: list[Any], why: str, tmp_path: Path):
    log = read(tmp_path, *({"epoch": step, "loss": 1.0} for step in steps))
    assert (log.step_column, log.steps.tolist()) == ("", [0, 1, 2])
    assert log.notes == (
        f"'epoch' is not taken for the step: {why}",
        "no column counts the steps: rows are numbered. Name one with --step-column",
    )


def test_the_step_can_be_named(tmp_path: Path):
    rows = [{"step": 1, "tokens": 100, "loss": 1.0}, {"step": 2, "tokens": 200, "loss": 1.0}]
    assert read(tmp_path, *rows, step="tokens").steps.tolist() == [100, 200]
    numbered = read(tmp_path, *rows, step="-")
    assert numbered.steps.tolist() == [0, 1]
    assert "step" in numbered.columns


def test_a_named_step_that_cannot_be_is_an_error(tmp_path: Path):
    rows = [{"token_count": 0.5, "loss": 1.0}]
    with pytest.raises(LogError, match=r"no column 'token_counts' for the steps. Did you mean token_count\?"):
        read(tmp_path, *rows, step="token_counts")
    with pytest.raises(
        LogError, match=r"'token_count' cannot be the steps: it has fractions. Or number the rows"
    ):
        read(tmp_path, *rows, step="token_count")
