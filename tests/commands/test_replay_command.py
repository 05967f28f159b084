"""`moe-rules replay`, called as a function."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from moe_rules_callback.cli import main
from moe_rules_callback.commands.log_options import progress_bar
from moe_rules_callback.history import open_history
from moe_rules_callback.runs import open_run

RULES = """
[rules.decided]
rule = "0.75 :: low_router_entropy"

[rules.one_expert]
rule = "0.75 :: high_load_cv"
kind = "risk"
severity = "error"
next = "Raise the balancing coefficient."
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """40 epochs in which one of 4 experts takes over from epoch 20 on."""
    rows = []
    for epoch in range(40):
        load = [0.97, 0.01, 0.01, 0.01] if epoch >= 20 else [0.25] * 4
        rows.append({"step": epoch, "entropy": 1.3, "utilization": load, "metrics": {"loss": 2.5}})
    path = tmp_path / "training_log.txt"
    path.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "rules.toml").write_text(RULES)
    return path


def test_it_shows_the_mapping_writes_a_history_and_prints_verdicts(
    log: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["replay", str(log), "--rules", str(log.parent / "rules.toml")]) == 0
    printed, error = capsys.readouterr()
    assert error == ""
    assert f"{log}: 40 rows, steps 0 to 39 of 'step'" in printed
    assert "entropy       router_entropy  nats    its name; up to 1.300, at most ln 4 = 1.386" in printed
    assert (
        "one_expert: fired in 20 of 40 rows (50 %), first at step 20, last at 39, worst in layer" in printed
    )
    assert "  Next: Raise the balancing coefficient." in printed
    assert "1 of 1 rule fired, still at the end: one_expert (error)." in printed
    store = log.parent / "training_log.audit" / "audit.zarr"
    assert printed.splitlines()[-1] == str(store)
    history = open_history(store)
    expected = open_run(log, str(log.parent / "rules.toml"))
    for name in ("step", "truth", "state", "signal_value", "expert_share"):
        np.testing.assert_array_equal(history[name].values, expected[name].values)
    assert json.loads(history.attrs["config"])["columns"]["entropy"] == "router_entropy"


def test_a_history_can_be_replayed_with_other_rules(log: Path, capsys: pytest.CaptureFixture[str]):
    out = log.parent / "first"
    assert main(["replay", str(log), "--rules", str(log.parent / "rules.toml"), "--out", str(out)]) == 0
    other = log.parent / "other.toml"
    other.write_text('[rules.calm]\nrule = "0.75 :: ~high_load_cv"\nkind = "health"')
    assert main(["replay", str(out), "--rules", str(other)]) == 0
    assert "calm: fired in 20 of 40 rows" in capsys.readouterr().out
    assert open_history(log.parent / "first.audit").rule.values.tolist() == ["calm"]


def test_json(log: Path, capsys: pytest.CaptureFixture[str]):
    assert (
        main(["replay", str(log), "--rules", str(log.parent / "rules.toml"), "--json", "--top-k", "1"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] == 40
    assert told["notes"] == []
    assert told["columns"][0] == {
        "column": "entropy", "signal": "router_entropy", "layer": "", "unit": "nats",
        "why": "its name; up to 1.300, at most ln 4 = 1.386",
    }  # fmt: skip
    assert [verdict["rows_fired"] for verdict in told["verdicts"]] == [0, 20]
    assert open_history(told["history"]).sizes["step"] == 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map", "entropie=router_entropy"], "the log has no column 'entropie'. Did you mean entropy?"),
        (["--step-column", "steps"], "there is no column 'steps' for the steps."),
        (["--rules", "router_helth"], "no rule book is called 'router_helth'. Did you mean router_health?"),
        (["--map", "entropy=-", "--rules", "rules.toml"], "rule 'decided' needs the signal 'router_entropy'"),
        (["--log-format", "events"], "the record at byte 0 is damaged, or the file is none of TensorBoard's"),
        (["--map", "entropy=-", "--map", "utilization=-", "--map", "metrics.loss=mine"],
         "none of the rules can be evaluated"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line(
    arguments: list[str],
    message: str,
    log: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.chdir(log.parent)
    assert main(["replay", str(log), *arguments]) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("moe-rules: ")
    assert message in error
    assert not (log.parent / "training_log.audit").exists()


def test_numbers_that_are_none_are_wrong_usage(log: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main(["replay", str(log), "--top-k", "0"])
    assert stopped.value.code == 2
    assert "'0' is not a whole number above 0" in capsys.readouterr().err


def test_a_bar_shows_on_a_terminal_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    with progress_bar(10) as bar:
        bar.update(10)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar(10) as bar:
        bar.update(5)
        bar.refresh()
    assert "50%" in capsys.readouterr().err
