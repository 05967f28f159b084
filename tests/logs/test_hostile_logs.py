"""Whatever bytes are thrown at the importers: a log, or an error of ours in one line."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs import FORMATS, map_columns, read_log

NUMBERS = st.floats() | st.integers() | st.integers(-(10**400), 10**400) | st.booleans() | st.none()
LEAVES = NUMBERS | st.text(max_size=5)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
)
KEYS = st.sampled_from(["step", "epoch", "loss", "entropy", "utilization", "expert_0", "expert_1", "params"])
ROWS = st.lists(st.dictionaries(KEYS | st.text(max_size=4), VALUES, max_size=5), max_size=8)
FIELDS = st.sampled_from(["", "1", "2.5", "nan", "-inf", "x", '"', "1e999", "0x1", " 3 ", "\x00", "1_0", "é"])


def attempt(function: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[Any, str]:
    """(what a function returns, ""), or (None, text) of a LogError."""
    try:
        return function(*arguments, **options), ""
    except LogError as error:
        return None, str(error)


def survives(path: Path, format: str | None) -> None:
    """Reads and maps; fails on anything but a sound log or a LogError of one line."""
    log, error = attempt(read_log, path, format=format)
    if log is not None:
        rows = len(log)
        assert rows > 0
        assert (np.diff(log.steps, prepend=-1) > 0).all()
        assert all(values.shape[0] == rows and values.ndim <= 2 for values in log.columns.values())
        mapping, error = attempt(map_columns, log)
        assert mapping is None or [each.column for each in mapping.assignments] == list(log.columns)
        assert mapping is None or all(name.isidentifier() for name in mapping.metrics)
    assert "\n" not in error
    assert len(error) < 2000


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs") / "log"


@given(data=st.binary(max_size=200), format=st.sampled_from([*FORMATS, None]))
def test_any_bytes(data: bytes, format: str | None, path: Path):
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the libraries that xarray tries
        survives(path, format)


@given(rows=ROWS, cut=st.integers(0, 30))
def test_any_objects_cut_anywhere(rows: list[dict[str, Any]], cut: int, path: Path):
    text = "\n".join(map(json.dumps, rows))
    path.write_text(text[: max(0, len(text) - cut)])
    survives(path, "json")


@given(
    header=st.lists(KEYS | FIELDS, min_size=1, max_size=4),
    rows=st.lists(st.lists(FIELDS, max_size=5), max_size=6),
)
def test_any_table(header: list[str], rows: list[list[str]], path: Path):
    path.write_text("\n".join(",".join(row) for row in [header, *rows]))
    survives(path, "csv")


@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {"step": st.integers(0, 5)},
            optional={"loss": st.floats(), "load": st.lists(st.floats(), max_size=3)},
        ),
        min_size=1,
        max_size=12,
    )
)
def test_a_log_holds_what_an_obvious_reader_finds(rows: list[dict[str, Any]], path: Path):
    """A dictionary by step in which later values win, against the arrays."""
    path.write_text("\n".join(map(json.dumps, rows)))
    expected: dict[int, float] = {}
    for row in rows:
        if "loss" in row:
            expected[row["step"]] = row["loss"]
    log, error = attempt(read_log, path, step="step")
    assert (log is None) == ("there are no numbers" in error)
    if log is None:
        return
    assert log.steps.tolist() == sorted({row["step"] for row in rows})
    if "loss" in log.columns:
        np.testing.assert_array_equal(log.columns["loss"], [expected.get(s, math.nan) for s in log.steps])
    else:
        assert not expected
