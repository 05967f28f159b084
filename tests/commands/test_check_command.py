"""`moe-rules check`: its exit codes and what it leaves for machines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import fake_records as fake
import pytest

from moe_rules_callback.cli import main
from moe_rules_callback.commands.check_reports import Checked
from moe_rules_callback.formula import SEVERITIES, Severity
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.verdicts import verdicts

RULES = """
[rules.one_expert]
rule = "0.75 :: high_load_cv"
kind = "risk"
severity = "warning"
description = "One expert | takes <all>."
cause = "No balancing loss."
next = "Raise its coefficient."

[rules.decided]
rule = "0.75 :: low_router_entropy"
kind = "risk"

[rules.later]
rule = "0.75 :: high_load_cv"
kind = "risk"
severity = "error"
warmup = 100

[rules.watched]
rule = "0.75 :: high_router_entropy"
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    rows = [
        {"step": epoch, "entropy": 1.3, "utilization": [0.97, 0.01, 0.01, 0.01], "loss": 2.5}
        for epoch in range(40)
    ]
    path = tmp_path / "log.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def check(log: Path, *arguments: str) -> int:
    rules = log.parent / "rules.toml"
    rules.write_text(RULES)
    return main(["check", str(log), "--rules", str(rules), *arguments])


@pytest.mark.parametrize(("fail_on", "code"), [([], 0), (["--fail-on", "warning"], 3)])
def test_the_exit_code(fail_on: list[str], code: int, log: Path):
    assert check(log, *fail_on) == code


@pytest.mark.parametrize("fail_on", SEVERITIES)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_what_fired_fails_from_its_severity_down(severity: Severity, fail_on: Severity):
    risk = replace(fake.RULES[4], severity=severity)  # fires at once
    found = verdicts(records_to_dataset(fake.make_records(50, fake.make_schema(rules=(risk,)))))
    failures = Checked("demo", found, (), fail_on).failures
    assert bool(failures) == (SEVERITIES.index(severity) >= SEVERITIES.index(fail_on))


def test_it_prints_the_mapping_and_the_verdicts(log: Path, capsys: pytest.CaptureFixture[str]):
    check(log)
    printed = capsys.readouterr().out
    assert "utilization  expert_load     shares" in printed
    assert "one_expert: fired in 40 of 40 rows (100 %), first at step 0" in printed
    assert "later: not judged: it warms up until step 100, and the run ends at 39." in printed
    assert printed.endswith("1 of 3 rules fired, still at the end: one_expert (warning); 1 not judged.\n")


def test_rules_that_cannot_be_evaluated_do_not_pass(log: Path, capsys: pytest.CaptureFixture[str]):
    log.write_text('{"step": 1, "mine": 2}')
    assert main(["check", str(log)]) == 1
    *_, error = capsys.readouterr().err.splitlines()
    assert (
        f"none of the rules can be evaluated on {log}, which lacks their signals. Say which column" in error
    )


def test_a_log_that_cannot_be_read_is_not_a_rule_that_fired(log: Path):
    log.write_text("{\n}")
    assert check(log) == 1


def test_junit_xml_has_a_test_case_for_each_rule(log: Path):
    path = log.parent / "rules.xml"
    assert check(log, "--fail-on", "warning", "--junit", str(path)) == 3
    root = ElementTree.parse(path).getroot()
    assert root.tag == "testsuites"
    (suite,) = root
    counts = {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "4", "failures": "1", "errors": "0", "skipped": "1"}
    assert suite.get("name") == str(log)
    outcomes = {case.get("name"): [child.tag for child in case] for case in suite}
    assert outcomes == {
        "one_expert": ["failure"],
        "decided": ["system-out"],
        "later": ["skipped"],
        "watched": ["system-out"],
    }
    failure = suite.find("testcase/failure")
    assert failure is not None
    assert failure.get("type") == "warning"
    assert (failure.get("message") or "").startswith("fired in 40 of 40 rows")
    assert "Next: Raise its coefficient." in (failure.text or "")


def test_junit_xml_drops_what_xml_cannot_hold(log: Path):
    path = log.parent / "rules.xml"
    (log.parent / "odd.toml").write_text(
        '[rules.odd]\nrule = "0.75 :: high_load_cv"\nkind = "risk"\ndescription = "bell \\u0007 & <tag>"'
    )
    main(
        [
            "check",
            str(log),
            "--rules",
            str(log.parent / "odd.toml"),
            "--fail-on",
            "info",
            "--junit",
            str(path),
        ]
    )
    failure = ElementTree.parse(path).getroot().find(".//failure")
    assert failure is not None
    assert "bell \N{REPLACEMENT CHARACTER} & <tag>" in (failure.text or "")


def test_markdown_is_added_to_a_file(log: Path):
    path = log.parent / "summary.md"
    path.write_text("before\n")
    check(log, "--fail-on", "warning", "--markdown", str(path))
    lines = path.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[1] == f"## Router rules failed: {log}"
    rows = [line for line in lines if line.startswith("|")]
    assert rows[0] == "| result | rule | severity | verdict |"
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| **failed**",
        "| passed",
        "| not judged",
        "| watched",
    ]
    assert "**one_expert**: `0.75 :: high_load_cv`" in lines
    assert "- Why: One expert \\| takes &lt;all>." in lines
    assert "- Next: Raise its coefficient." in lines
    assert check(log, "--markdown", str(path)) == 0
    assert "## Router rules passed" in path.read_text()
    assert "| fired | one_expert |" in path.read_text()


def test_rules_of_a_book_that_the_log_cannot_feed_are_told(log: Path, caplog: pytest.LogCaptureFixture):
    path, report = log.parent / "rules.xml", log.parent / "summary.md"
    assert main(["check", str(log), "--junit", str(path), "--markdown", str(report)]) == 0
    case = ElementTree.parse(path).getroot().find(".//testcase[@name='router_not_learning']/skipped")
    assert case is not None
    assert case.get("message") == "left out: the log lacks its signals."
    assert "| left out | router_not_learning | | the log lacks its signals |" in report.read_text()
    assert "rules without their signals are left out" in caplog.text


def test_json(log: Path, capsys: pytest.CaptureFixture[str]):
    assert check(log, "--json", "--fail-on", "warning") == 3
    told = json.loads(capsys.readouterr().out)
    assert (told["failed"], told["fail_on"], told["left_out"]) == (True, "warning", [])
    assert [verdict["fired"] for verdict in told["verdicts"]] == [True, False, False, False]


def test_a_run_of_this_package_is_checked_by_its_own_rules(log: Path, capsys: pytest.CaptureFixture[str]):
    check(log)
    out = log.parent / "run"
    assert main(["replay", str(log), "--rules", str(log.parent / "rules.toml"), "--out", str(out)]) == 0
    capsys.readouterr()
    assert main(["check", str(out), "--fail-on", "warning"]) == 3
    printed = capsys.readouterr().out
    assert printed.startswith(f"{out}: 40 rows, steps 0 to 39\n\none_expert: fired in 40 of 40 rows")
