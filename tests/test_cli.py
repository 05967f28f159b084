"""The command `moe-rules`, called as a function."""

from __future__ import annotations

import pytest

from moe_rules_callback.cli import main


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
