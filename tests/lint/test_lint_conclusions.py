"""What `lint` says about axioms, and rules over what they conclude."""

from __future__ import annotations

import pytest

from moe_rules_callback.lint import Finding, lint

JUDGED = '\n[rules.ill]\nrule = "0.8 :: ill"\nkind = "risk"\n'


def codes(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.code, finding.level) for finding in found]


@pytest.fixture
def of_rules(tmp_path):
    def of_rules(text: str) -> list[Finding]:
        path = tmp_path / "rules.toml"
        path.write_text(text)
        return lint(path)

    return of_rules


def test_concluded_names_are_known_and_a_conclusion_need_not_be_false(of_rules) -> None:
    assert (
        of_rules('[rules]\na = "high_load_cv -> ill"\nb = "ill & high_loss -> ill2"' + JUDGED)[0].name
        == "ill2"
    )
    assert of_rules('[rules]\na = "high_load_cv -> ill"' + JUDGED) == []
    (finding,) = lint(["high_load_cv & ilness", "high_loss"])
    assert finding.code == "unknown-name"


@pytest.mark.parametrize(
    ("evidence", "told"),
    [
        ("high_loss & low_loss", "the evidence of axiom 'a' is FALSE whatever its predicates say"),
        ("high_expert_imbalance & low_expert_imbalance", "the evidence of axiom 'a' can never be TRUE"),
        ("5*high_loss | 5*~high_loss", "the evidence of axiom 'a' is TRUE whatever its predicates say"),
    ],
)
def test_evidence_that_is_always_or_never_true(of_rules, evidence: str, told: str) -> None:
    (finding,) = of_rules(f'[rules]\na = "{evidence} -> ill"\nb = "high_load_cv -> ill"' + JUDGED)
    assert (finding.line, finding.level) == (2, "warning")
    assert told in finding.message


def test_axioms_that_can_contradict_each_other(of_rules) -> None:
    rules = '[rules]\na = "high_load_cv -> ill"\nb = "high_loss -> ill"\nc = "low_loss -> ~ill"'
    (finding,) = of_rules(rules + JUDGED)
    assert (finding.line, finding.level, finding.code) == (4, "note", "can-contradict")
    assert "the evidence of 'c' against it and that of 'a' (line 2) for it can be TRUE" in finding.message


def test_a_form_that_is_refused_is_told_with_its_line(of_rules) -> None:
    found = of_rules('[rules]\na = "high_load_cv -> always[3](ill)"' + JUDGED)
    assert [(f.line, *codes([f])[0]) for f in found] == [
        (2, "axiom", "error")
    ]  # and nothing that rests on it
    assert "rule 'a' concludes what nothing measures, and a concluded name stands alone" in found[0].message


def test_a_conclusion_that_nothing_is_made_of(of_rules) -> None:
    (finding,) = of_rules('[rules]\na = "high_load_cv -> ill"')
    assert (finding.line, finding.level, finding.code) == (2, "note", "unjudged")
    assert "a rule 'ill' with the text '0.8 :: ill' and its kind" in finding.remedy


@pytest.mark.parametrize(
    ("axiom", "rule", "kind", "level", "lacking"),
    [
        ("high_loss -> ~ill", "0.8 :: ill", "risk", "error", "ill"),
        ("high_loss -> ill", "0.8 :: ~ill", "risk", "error", "~ill"),
        ("high_loss -> ill", "0.8 :: ill", "health", "error", "~ill"),
        ("high_loss -> ~ill", "once[4](ill) & high_load_cv", "", "warning", "ill"),
    ],
)
def test_what_no_axiom_concludes(
    of_rules, axiom: str, rule: str, kind: str, level: str, lacking: str
) -> None:
    kind = f'kind = "{kind}"\n' if kind else ""
    found = of_rules(f'[rules]\na = "{axiom}"\n[rules.r]\nrule = "{rule}"\n{kind}')
    (finding,) = [each for each in found if each.code != "unjudged"]
    assert (finding.line, finding.level) == (4, level)
    assert finding.remedy == f"No axiom concludes '{lacking}': write one, evidence -> {lacking}."


def test_a_rule_with_the_name_of_a_conclusion(of_rules) -> None:
    found = of_rules('[rules]\nill = "high_loss"\na = "high_load_cv -> ill"')
    assert ("misnamed", "error") in codes(found)
