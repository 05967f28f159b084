"""`moe-rules lint`, called as a function."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_rules_callback.cli import main

Output = pytest.CaptureFixture[str]


def test_a_clean_book_says_so(capsys: Output) -> None:
    assert main(["lint", "nano_moe"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "no findings\n")


def test_a_note_is_no_failure(capsys: Output) -> None:
    assert main(["lint", "-e", "high_val_loss"]) == 0
    assert capsys.readouterr().out == (
        "-e:1: note: rule 'high_val_loss': 'val_loss' is no shipped signal, so every step must pass it as a "
        "scalar.\n"
    )


def test_a_warning_is_exit_code_3(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "rules.toml"
    path.write_text('[rules]\nnever = "high_loss & ~high_loss"\n')
    assert main(["lint", str(path)]) == 3
    assert capsys.readouterr().out.startswith(f"{path}:2: warning: rule 'never' can never be TRUE")


def test_json_holds_the_findings(capsys: Output) -> None:
    assert main(["lint", "--json", "-e", "high_loss", "-e", "high_loss |"]) == 3
    (finding,) = json.loads(capsys.readouterr().out)
    assert finding["code"] == "syntax"
    assert (finding["file"], finding["line"], finding["level"]) == ("-e", 2, "error")
    assert finding["witness"] == {}
    assert main(["lint", "--json", "nano_moe"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_no_such_file_is_exit_code_1(capsys: Output) -> None:
    assert main(["lint", "nowhere.toml"]) == 1
    assert capsys.readouterr().err.startswith("moe-rules: the rule file 'nowhere.toml' cannot be read")


@pytest.mark.parametrize("arguments", [[], ["nano_moe", "-e", "high_loss"]])
def test_one_source_is_needed(arguments: list[str], capsys: Output) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["lint", *arguments])
    assert stopped.value.code == 2
    assert "RULES" in capsys.readouterr().err
