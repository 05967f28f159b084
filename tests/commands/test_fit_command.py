"""`moe-rules fit`, called as a function."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe_rules_callback.cli import main
from moe_rules_callback.rulebook import load_rules

RULES = """
[predicates.hot]
signal = "heat"
is = "high"
offset = 0.5

[rules.fault]
rule = "0.75 :: hot"
kind = "risk"
"""


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Six logs; in the first three the heat rises to 0.45 at step 15."""
    lines = ["run,rule,start,end"]
    for i in range(6):
        random = np.random.default_rng(i)
        heat = 0.2 + 0.02 * random.normal(size=30) + 0.25 * (i < 3) * (np.arange(30) >= 15)
        rows = [{"step": step, "heat": x} for step, x in enumerate(heat.tolist())]
        (tmp_path / f"run{i}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        lines.append(f"run{i}.jsonl,fault,{'15,' if i < 3 else ','}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "rules.toml").write_text(RULES)
    return tmp_path


def fit(runs: Path, *more: str) -> int:
    rules, labels = str(runs / "rules.toml"), str(runs / "labels.csv")
    return main(["fit", *map(str, sorted(runs.glob("*.jsonl"))), "--rules", rules, "--labels", labels, *more])


@pytest.mark.slow
def test_it_writes_the_rules_that_it_learnt(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = runs / "fitted.toml"
    assert fit(runs, "-o", str(out), "--map", "heat=heat") == 0
    printed, error = capsys.readouterr()
    assert error == ""
    assert "fault: accepted" in printed
    assert printed.splitlines()[-1] == f"wrote {out}"
    offset = load_rules(out).predicates["hot"].offset
    assert offset is not None
    assert 0.2 < offset < 0.45


def test_few_labels_are_an_error(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "run5.jsonl").unlink()
    assert fit(runs) == 1
    assert "labels of 'run5.jsonl', which is none of the runs given" in capsys.readouterr().err
    labels = runs / "labels.csv"
    labels.write_text("\n".join(labels.read_text().splitlines()[:-1]))
    assert fit(runs, "--map", "heat=heat") == 1
    assert (
        "rule 'fault' has too few labelled runs: 3 in which it ought to be TRUE and 2"
        in capsys.readouterr().err
    )


def test_a_run_without_a_label_is_an_error(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / "run9.jsonl").write_text("{}")
    assert fit(runs) == 1
    assert "has no line for the run" in capsys.readouterr().err
