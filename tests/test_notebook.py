"""docs/tutorial.ipynb is what docs/tutorial.py makes, and the script's story is true."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

DOCS = Path(__file__).parents[1] / "docs"
AGAIN = "run `python docs/notebook.py` after every change of docs/tutorial.py"


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: nbformat.NotebookNode) -> str:
    """What a reader without pictures sees."""
    shown = [output.get("text") or output.data.get("text/html", "") for output in outputs(notebook)]
    return "\n".join(shown)


@pytest.fixture(scope="module")
def committed() -> nbformat.NotebookNode:
    return nbformat.read(DOCS / "tutorial.ipynb", as_version=4)


def test_the_notebook_is_that_of_the_script(committed):
    assert cells(committed) == cells(jupytext.read(DOCS / "tutorial.py")), AGAIN
    nbformat.validate(committed)


def test_the_notebook_keeps_its_outputs_and_nothing_of_the_machine(committed):
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), AGAIN
    assert sum("image/png" in output.get("data", {}) for output in outputs(committed)) == 3
    assert (DOCS / "tutorial.ipynb").stat().st_size < 700_000
    assert not re.search(r"/(home|root|tmp|usr|work)/", printed(committed))


@pytest.mark.slow
def test_the_story_is_true(tmp_path):
    out = tmp_path / "tutorial.ipynb"
    command = [sys.executable, str(DOCS / "notebook.py"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(out, as_version=4)
    assert not any("Warning" in output.get("text", "") for output in outputs(notebook))
    told = printed(notebook)

    found = re.search(r"loss of the last 100 steps: (\S+) learning, (\S+) starved", told)
    assert found
    learning, starved = map(float, found.groups())
    assert starved == pytest.approx(learning, rel=0.05)  # the loss does not tell

    before, after = re.findall(r"<b title=[^>]*>blind_router</b>.*?</tr>", told)  # the two runs
    assert "FALSE [0.0" in before
    assert ">fires<" in after
    assert "TRUE [0.9" in after
    assert "700 of 700 rows, first at step 100" in after

    idle = re.findall(r"<b title=[^>]*>underutilized_experts</b>.*?</tr>", told)
    assert "did not fire" in idle[0]
    assert "never decided" in idle[1]
