"""The command `moe-rules`, called as a function."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_records import make_records, make_run

from moe_rules_callback.cli import main
from moe_rules_callback.sinks import ZarrSink


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A log directory with a finished history."""
    records, sink = make_records(120), ZarrSink()
    started = make_run(tmp_path, records.schema)
    sink.on_train_start(started)
    sink.on_records(records)
    sink.on_train_end(started)
    return tmp_path


@pytest.mark.parametrize("store", [".", "audit.zarr"])
def test_plot_leaves_a_picture_beside_the_history(run: Path, store: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plot", str(run / store)]) == 0
    assert capsys.readouterr().out == f"{run / 'audit.png'}\n"
    assert (run / "audit.png").read_bytes().startswith(b"\x89PNG")


def test_plot_goes_where_it_is_told(run: Path):
    assert main(["plot", str(run), "--out", str(run / "demo.svg")]) == 0
    assert "<svg" in (run / "demo.svg").read_text()


def test_no_history_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plot", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moe-rules: There is no directory")
    assert error.count("\n") == 1


def test_rules_prints_what_each_rule_means(capsys: pytest.CaptureFixture[str]):
    assert main(["rules", "nano_moe"]) == 0
    printed = capsys.readouterr().out
    assert "load_imbalance (risk, warning, from step 100)" in printed
    assert "    0.75 :: high_expert_imbalance & increasing_weight_magnitude" in printed
    assert "    cause: " in printed
    assert "    next: " in printed


def test_rules_prints_the_default_book(capsys: pytest.CaptureFixture[str]):
    assert main(["rules"]) == 0
    assert "router_not_learning (risk" in capsys.readouterr().out


def test_an_unknown_book_names_the_closest(capsys: pytest.CaptureFixture[str]):
    assert main(["rules", "nano_mo"]) == 1
    assert "nano_moe" in capsys.readouterr().err


def test_no_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "COMMAND" in capsys.readouterr().err
