"""JSON lines as trainers leave them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs import Log, read_log

EPOCH = (
    '{"epoch": 1, "routing_acc": 0.5841, "entropy": 1.4012, "utilization": '
    '[0.2257, 0.1031, 0.0735, 0.2797, 0.1871, 0.1309], "metrics": {"accuracy": 0.4356, "loss": 2.5902}}'
)


def read(folder: Path, *lines: str, **options: str) -> Log:
    path = folder / "training_log.txt"
    path.write_text("\n".join(lines))
    return read_log(path, **options)


def test_the_log_of_the_visualisation_tool_reads_as_it_stands(tmp_path: Path):
    log = read(tmp_path, EPOCH, EPOCH.replace('"epoch": 1', '"epoch": 2'))
    assert (log.format, log.step_column, log.steps.tolist(), log.notes) == ("json", "epoch", [1, 2], ())
    assert list(log.columns) == ["routing_acc", "entropy", "utilization", "metrics.accuracy", "metrics.loss"]
    assert log.columns["utilization"].shape == (2, 6)
    assert log.columns["utilization"][1].tolist() == [0.2257, 0.1031, 0.0735, 0.2797, 0.1871, 0.1309]
    assert log.columns["metrics.loss"].tolist() == [2.5902, 2.5902]


def test_nan_infinity_blank_lines_and_a_byte_order_mark(tmp_path: Path):
    log = read(
        tmp_path, '\ufeff{"step": 0, "loss": NaN}', "", "  ", '{"step": 1, "loss": -Infinity}', '{"step": 2}'
    )
    assert log.steps.tolist() == [0, 1, 2]
    np.testing.assert_array_equal(log.columns["loss"], [math.nan, -math.inf, math.nan])
    assert log.notes == ()


def test_a_last_line_that_is_cut_off_is_left_out_and_told(tmp_path: Path):
    log = read(tmp_path, '{"step": 0, "loss": 1}', '{"step": 1, "lo')
    assert log.steps.tolist() == [0]
    assert log.notes == ("line 2, the last, is cut off and left out",)


def test_what_is_no_number_counts_as_missing_and_is_told(tmp_path: Path):
    log = read(
        tmp_path,
        '{"step": 0, "loss": "2.5", "name": "demo", "done": true}',
        '{"step": 1, "loss": "n/a", "name": "demo", "done": false}',
        '{"step": 2, "loss": null, "name": "demo"}',
        '{"step": 3, "loss": "diverged", "name": "demo"}',
    )
    np.testing.assert_array_equal(log.columns["loss"], [2.5, math.nan, math.nan, math.nan])
    np.testing.assert_array_equal(log.columns["done"], [1, 0, math.nan, math.nan])
    assert log.notes == (
        "'loss': 2 values are no numbers, taken as missing (first in line 2: 'n/a')",
        "'name' holds no numbers (line 1: 'demo') and is left out",
    )


def test_lists_of_another_length_than_most_count_as_missing(tmp_path: Path):
    log = read(
        tmp_path,
        '{"step": 0, "load": [1, 2]}',
        '{"step": 1, "load": [1, 2, 3]}',
        '{"step": 2, "load": [4, 5]}',
        '{"step": 3, "load": 7}',
        '{"step": 4, "load": []}',
        '{"step": 5, "load": [1, "x"]}',
    )
    expected = [[1, 2], [math.nan] * 2, [4, 5], *[[math.nan] * 2] * 3]
    np.testing.assert_array_equal(log.columns["load"], expected)
    assert log.notes == (
        "'load': 1 value is no number, taken as missing (first in line 6: [1, 'x'])",
        "'load': 3 rows hold lists of 3, most hold lists of 2; taken as missing (first in line 2)",
    )


def test_lists_of_lists_are_layers(tmp_path: Path):
    log = read(tmp_path, '{"step": 0, "load": [[1, 2], [3, 4]]}', '{"step": 1, "load": [[5, 6], [7, 8]]}')
    assert log.columns["load.0"].tolist() == [[1, 2], [5, 6]]
    assert log.columns["load.1"].tolist() == [[3, 4], [7, 8]]


def test_numbers_beyond_a_float_are_no_numbers(tmp_path: Path):
    log = read(tmp_path, f'{{"step": 0, "tokens": 1{"0" * 400}, "loss": 1}}', '{"step": 1, "tokens": 5}')
    np.testing.assert_array_equal(log.columns["tokens"], [math.nan, 5])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"a": 1}', "Epoch 2 of 9", '{"a": 2}'],
         r"training_log.txt: line 2 is not a JSON object \(Expecting value\): 'Epoch 2 of 9'. Usual causes: "
         r"printed text among the rows \(keep the objects with grep '\^\{' FILE"),
        (['{"a": 1}', "[1, 2]"], r"line 2 is an array, not an object. .* jq -c '.\[\]' FILE > log.jsonl"),
        (['{"a": 1}', "17", '{"a": 1}'], "line 2 is a number, not an object"),
        (["{", '"a": 1', "}"], "line 1 is not a JSON object"),
        (['{"a'], "line 1 is not a JSON object"),
        (["{}", "{}"], "there are no numbers. A log has one row a step"),
        (['{"a": "x"}'], "there are no numbers"),
        (['{"a": ' + "[" * 100_000, '{"a": 1}'], "line 1 is not a JSON object"),
        (['{"a": 1' + "0" * 5000 + "}", '{"a": 1}'], "line 1 is not a JSON object"),
    ],
)  # fmt: skip
def test_what_is_no_log_is_one_line_that_says_what_to_do(lines: list[str], message: str, tmp_path: Path):
    with pytest.raises(LogError, match=message) as caught:
        read(tmp_path, *lines)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_name_their_line(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": "\xff\xfe"}\n{"a": 2}\n')
    with pytest.raises(LogError, match=r"line 2 is not UTF-8 text. Convert the file"):
        read_log(path)


def test_keys_that_are_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe_rules_callback.logs.cells.MAX_COLUMNS", 10)
    with pytest.raises(LogError, match="more than 10 columns: its keys differ from row to row"):
        read(tmp_path, *(f'{{"token_{i}": 1}}' for i in range(11)))


def test_a_table_that_no_memory_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe_rules_callback.logs.log.MAX_CELLS", 10)
    with pytest.raises(LogError, match="4 rows of 3 values are more than a log can have"):
        read(tmp_path, *(f'{{"step": {i}, "a": 1, "load": [1, 2]}}' for i in range(4)))


def test_no_file(tmp_path: Path):
    with pytest.raises(LogError, match=r"nowhere: there is no such file or directory. Name a training log"):
        read_log(tmp_path / "nowhere")
    with pytest.raises(
        LogError, match=r"there is no format 'parquet'. There are: json, csv, events, dataset"
    ):
        read_log(tmp_path, format="parquet")
