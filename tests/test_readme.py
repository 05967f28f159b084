"""README.md: its blocks are run by sybil (see conftest.py), its two commands by .ci/run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("end", ["-m reference.train", "-m pytest -n 2 --dist loadfile"])
def test_a_fresh_machine_needs_one_line(end: str):
    commands = [line for line in README.read_text().splitlines() if re.search(f"^python3 .*{end}$", line)]
    assert len(commands) == 1, f"README.md must hold one command that ends in `{end}`; .ci/run runs it"
    venv, install, use = commands[0].split(" && ")
    assert venv == "python3 -m venv .venv"
    assert install.startswith(".venv/bin/pip install -q -e ")
    assert use.startswith(".venv/bin/python -m ")


def test_every_block_names_a_language_that_is_checked():
    languages = re.findall(r"^```(.*)\n(?:.*\n)*?```$", README.read_text(), flags=re.MULTILINE)
    assert languages
    assert set(languages) <= {"python", "bash", "toml", "text"}
