"""The table of domains by experts: what is read, what is refused and in which words, what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.plots import Affinity, plot_affinity, read_affinity

NUMBERS = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])


def write(folder: Path, text: str) -> Path:
    path = folder / "router_affinity_matrix.csv"
    path.write_text(text, "utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "rows", "experts"),
    [
        ("0.5,0.25,0.25\n0.1,0.2,0.7\n", None, None),
        ("\ufeff 0.5 ; .25;0.25\r\n\r\n.1;.2;.7\r\n", None, None),
        ("a,b,c\n.5,.25,.25\n.1,.2,.7\n", None, ["a", "b", "c"]),
        ("0,1,2\n.5,.25,.25\n.1,.2,.7\n", None, ["0", "1", "2"]),
        ("prose,.5,.25,.25\ncode,.1,.2,.7\n", ["prose", "code"], None),
        ("domain,1,2,3\nprose,.5,.25,.25\ncode,.1,.2,.7\n", ["prose", "code"], ["1", "2", "3"]),
        ("domain\ta\tb\tc\nprose\t.5\t.25\t.25\ncode\t.1\t.2\t.7\n", ["prose", "code"], ["a", "b", "c"]),
        (",0,1,2\n0,.5,.25,.25\n1,.1,.2,.7\n", ["0", "1"], ["0", "1", "2"]),  # as pandas writes it
        ("a,b,c\nprose,.5,.25,.25\ncode,.1,.2,.7\n", ["prose", "code"], ["a", "b", "c"]),  # as R writes it
        ('"the ""old"" prose",.5,.25,.25\n"code, new",.1,.2,.7\n', ['the "old" prose', "code, new"], None),
    ],
)
def test_a_table_is_read_with_or_without_names(text, rows, experts, tmp_path):
    affinity = read_affinity(write(tmp_path, text))
    np.testing.assert_array_equal(affinity.values, NUMBERS)
    assert affinity.rows == rows
    assert affinity.experts == experts


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no rows of numbers. A row is a domain or a sample, a column an expert."),
        (
            ".5,.5\n.2,.3,.5\n",
            "line 2: 3 cells, but line 1 has 2. Every row needs one number for each expert.",
        ),
        (".5,.5\n.2,many\n", "line 2, column 2: 'many' is not a number. Write nan where there is none."),
        (".5,.5\n\n.2,\n", "line 3, column 2: the cell is empty"),
        ("a,b\nprose,.5,.5\ncode,.2,x\n", "line 3, column 3: 'x' is not a number"),
        ("a,b,c,d\n.5,.5\n", "the first line names 4 columns, but the rows below have 2. Name each once."),
        ("prose\ncode\n", "holds no rows of numbers"),
        ("nan,nan\nnan,inf\n", "holds no finite number in 2 rows of 2 columns."),
    ],
)
def test_what_is_no_table_is_refused_in_words(text, told, tmp_path):
    with pytest.raises(MetricsError) as error:
        read_affinity(write(tmp_path, text))
    assert told in str(error.value)
    assert "router_affinity_matrix.csv" in str(error.value)


def test_a_small_table_is_drawn_with_its_names_and_numbers():
    values = NUMBERS.copy()
    values[1, 0] = np.nan
    axes: Any = plot_affinity(Affinity(values, ["prose", "code"], ["first", "second", "third"])).axes[0]
    np.testing.assert_array_equal(np.ma.filled(axes.images[0].get_array(), np.nan), values)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["prose", "code"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["first", "second", "third"]
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.25", "0.25", "0.20", "0.70"]


def test_of_thousands_of_samples_neighbours_are_averaged():
    values = np.random.default_rng(0).dirichlet(np.ones(64), 4_000)
    axes: Any = plot_affinity(Affinity(values)).axes[0]
    drawn = axes.images[0].get_array()
    np.testing.assert_allclose(drawn, values.reshape(400, 10, 64).mean(axis=1))
    assert axes.get_title("right") == "4,000 x 64; a line: mean of up to 10 rows"
    assert not axes.texts


@pytest.mark.parametrize("shape", [(1, 1), (1, 256), (300, 2), (61, 256)])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e6])
def test_extreme_tables(shape, value, tmp_path):
    names = [f"a domain with a long name, number {row}" for row in range(shape[0])]
    plot_affinity(Affinity(np.full(shape, value), names)).savefig(tmp_path / "affinity.png")
