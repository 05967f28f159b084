"""`moe-rules explain` and `moe-rules compare`, called as functions, on histories and on a log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.cli import main

RULES = '[rules.steep]\nrule = "0.75 :: ~low_router_entropy"\nkind = "risk"\n'


def trained(logdir: Path, turn: int) -> Path:
    """A run of 80 steps whose router goes from decided to undecided at `turn`."""
    with RuleAuditCallback(str(logdir.parent / "rules.toml"), logdir=logdir, top_k=1) as audit:
        for step in range(80):
            probs = np.full((8, 4), 0.25) if step >= turn else np.tile([0.97, 0.01, 0.01, 0.01], (8, 1))
            audit.on_step({"loss": 1.0, "router_probs": {"moe": probs.astype(np.float32)}}, step=step)
    return logdir


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rules.toml").write_text(RULES)
    return trained(folder / "old", 20), trained(folder / "new", 40)


def test_explain_finds_what_fired(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(runs[0])]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("steep at step 20: TRUE [0.99, 1.00]")
    assert "In layer 'moe':" in printed
    assert "Smallest change of one signal in this row" in printed


def test_explain_says_json(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(runs[0]), "--rule", "steep", "--step", "10", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rule"], told["step"], told["state"], told["layer"]) == ("steep", 10, "false", "moe")
    assert told["changes"][0]["signal"] == "router_entropy"
    assert told["busiest"] == {"number": 0, "share": 1.0}


def test_explain_of_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("\n".join(json.dumps({"step": i, "router_entropy": 0.3}) for i in range(9)))
    (tmp_path / "rules.toml").write_text(RULES)
    assert main(["explain", str(log), "--rules", str(tmp_path / "rules.toml"), "--rule", "steep"]) == 0
    assert capsys.readouterr().out.startswith("steep at step 8: FALSE")


def test_explain_cannot(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(runs[0]), "--rule", "step"]) == 1
    assert capsys.readouterr().err == (
        "moe-rules: This history has no rule 'step'. Did you mean steep? It has: steep.\n"
    )


def test_compare_names_the_first(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    old, new = map(str, runs)
    assert main(["compare", old, new, "--patience", "16"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"A: {old}, steps 0 to 79\nB: {new}, steps 0 to 79\n")
    assert "First to part ways: steep at step 20" in printed
    assert "  By then router_entropy had parted, at step 20" in printed
    assert main(["compare", old, new, "--by", "fraction", "--patience", "16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["first"], told["by"], told["names"]) == ("steep", "fraction", [old, new])


def test_compare_draws_what_parts(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for by in ("step", "fraction"):
        out = tmp_path / f"{by}.svg"
        assert main(["compare", *map(str, runs), "--patience", "16", "--by", by, "--out", str(out)]) == 0
        assert "<svg" in out.read_text()
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *map(str, runs), "--out", "picture.txt"])
    assert stopped.value.code == 2


def test_compare_judges_both_by_other_rules(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.toml").write_text('[rules.calm]\nrule = "stable_loss"\n')
    assert main(["compare", *map(str, runs), "--rules", str(tmp_path / "other.toml")]) == 0
    assert "\ncalm " in capsys.readouterr().out


def test_compare_is_used_wrongly(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(runs[0]), str(runs[1]), "--patience", "1"])
    assert stopped.value.code == 2
    assert "'1' is not a whole number above 1" in capsys.readouterr().err
