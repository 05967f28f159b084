"""CSV, its columns of single experts, and what is no CSV."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs import Log, read_log


def read(folder: Path, text: str | bytes) -> Log:
    path = folder / "log.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_log(path)


@pytest.mark.parametrize("separator", [",", ";", "\t", ", "])
def test_a_header_names_the_columns(separator: str, tmp_path: Path):
    text = "step,loss,expert_0,expert_1\n1,2.5,.25,.75\n2,,.5,.5\n"
    log = read(tmp_path, text.replace(",", separator))
    assert (log.format, log.steps.tolist(), log.notes) == ("csv", [1, 2], ())
    np.testing.assert_array_equal(log.columns["loss"], [2.5, math.nan])
    np.testing.assert_array_equal(log.columns["expert"], [[0.25, 0.75], [0.5, 0.5]])


def test_quotes_blank_lines_and_windows_ends_of_lines(tmp_path: Path):
    log = read(tmp_path, b'\xef\xbb\xbf"step","train, loss"\r\n1,2.5\r\n\r\n2,1.5\r\n')
    assert log.steps.tolist() == [1, 2]
    assert log.columns["train, loss"].tolist() == [2.5, 1.5]


def test_text_among_numbers_is_missing_and_told_with_its_line(tmp_path: Path):
    log = read(tmp_path, "step,loss,tag\n1,2.5,a\n\n2,oops,b\n3,1e400,c\n")
    np.testing.assert_array_equal(log.columns["loss"], [2.5, math.nan, math.inf])
    assert log.notes == (
        "'loss': 1 value is no number, taken as missing (first in line 4: 'oops')",
        "'tag' holds no numbers (first in line 2: 'a') and is left out",
    )


@pytest.mark.parametrize("end", ["", "3,", "3,1."])
def test_a_last_line_that_is_cut_off(end: str, tmp_path: Path):
    log = read(tmp_path, f"step,loss,lr\n1,2.5,1\n2,1.5,1\n{end}")
    assert log.steps.tolist() == [1, 2]
    assert log.notes == (("the last line is cut off and left out",) if end else ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "0.1,0.2\n0.3,0.4\n",
            "line 1 is no header: it holds numbers only .'0.1,0.2'.. Write the names of the",
        ),
        ("", "the file is empty"),
        ("\n \n", "the file is empty"),
        ("step,loss\n", "there are no numbers"),
        (
            "step,loss\n1,2\n3,4,5\n",
            "cannot be read as CSV: Expected 2 fields in line 3, saw 3. Usual causes",
        ),
        ("step,loss\n1,2,3\n4,5,6\n", "cannot be read as CSV: Length of header or names does not match"),
        (b"\xff\xfe\x00s\x00t\n", "line 1 is not UTF-8 text"),
        (b"step,loss\n1,\xff\n", "it is not UTF-8 text"),
        ('step,loss\n1,"2\n', "cannot be read as CSV: EOF inside string"),
    ],
)
def test_what_is_no_csv_is_one_line_that_says_what_to_do(text: str | bytes, message: str, tmp_path: Path):
    with pytest.raises(LogError, match=message) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)


# Columns of single experts.


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (["expert_0", "expert_1", "expert_2"], "expert"),
        (["load/1", "load/2", "load/3"], "load"),
        (["utilization.0", "utilization.1", "utilization.2"], "utilization"),
        (["Expert 0 load", "Expert 1 load", "Expert 2 load"], "Expert load"),
        (["moe/load/expert_2", "moe/load/expert_0", "moe/load/expert_1"], "moe/load/expert"),
        (["tokens_per_expert[0]", "tokens_per_expert[1]", "tokens_per_expert[2]"], "tokens_per_expert"),
    ],
)
def test_columns_of_experts_are_joined_in_the_order_of_their_numbers(
    names: list[str], stem: str, tmp_path: Path
):
    by_number = sorted(range(3), key=lambda i: names[i])
    values = {names[i]: f".{rank + 1}" for rank, i in enumerate(by_number)}
    log = read(tmp_path, f"step,{','.join(names)}\n1,{','.join(values[name] for name in names)}\n")
    assert {name: column.tolist() for name, column in log.columns.items()} == {stem: [[0.1, 0.2, 0.3]]}


@pytest.mark.parametrize(
    "names",
    [["loss_0", "loss_1"], ["expert_0", "expert_2"], ["expert_3", "expert_4"], ["expert_0"], ["load5"]],
)
def test_other_numbered_columns_stay(names: list[str], tmp_path: Path):
    log = read(tmp_path, f"step,{','.join(names)}\n1,{','.join('5' for _ in names)}\n")
    assert list(log.columns) == names


def test_experts_of_several_layers_are_told_apart(tmp_path: Path):
    names = [f"layer_{layer}/expert_{expert}" for layer in range(2) for expert in range(2)]
    log = read(tmp_path, f"step,{','.join(names)}\n1,1,2,3,4\n")
    assert log.columns["layer_0/expert"].tolist() == [[1, 2]]
    assert log.columns["layer_1/expert"].tolist() == [[3, 4]]
