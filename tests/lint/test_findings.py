"""What `lint` says about rule files."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_rules_callback import evaluate
from moe_rules_callback.errors import RulebookError, UnknownNameError
from moe_rules_callback.lint import Finding, lint
from moe_rules_callback.predicates import SENSES
from moe_rules_callback.rulebook import book_names
from moe_rules_callback.signals import shipped

FAULTY = """\
[predicates.low_queue]
signal = "queue_length"
is = "low"
offset = 4.0

[predicates.unused]
signal = "loss"
is = "low"
offset = 2.0

[rules.broken]
rule = "high_load_cv &"

[rules.halves]
rule = "0.9 :: 0.5*high_load_cv | 0.3*low_queue"
kind = "risk"

[rules.misspelt]
rule = "high_rooter_entropy"
kind = "rusk"

[rules]
twice = "high_load_cv & high_load_gini"
again = "high_load_gini & high_load_cv"
"""


def of(*texts: str) -> list[Finding]:
    return lint(list(texts))


def book(**rules: str) -> str:
    """A file of rules, each given as `KIND [SEVERITY] [WARMUP]: TEXT`."""
    tables = []
    for name, told in rules.items():
        head, text = told.split(": ", 1)
        kind, severity, warmup = (*head.split(), *("warning", "0")[len(head.split()) - 1 :])
        tables.append(
            f'[rules.{name}]\nrule = "{text}"\nkind = "{kind}"\nseverity = "{severity}"\nwarmup = {warmup}\n'
        )
    return "".join(tables)


@pytest.fixture
def of_book(tmp_path: Path):
    def of_book(**rules: str) -> list[tuple[str, str, int]]:
        path = tmp_path / "rules.toml"
        path.write_text(book(**rules))
        return [(finding.code, finding.name, finding.line) for finding in lint(path)]

    return of_book


@pytest.mark.parametrize("name", book_names())
def test_shipped_books_are_clean(name: str) -> None:
    meant = {
        # Scalars that the trainer passes: validation_loss, balancing_loss.
        "router_health": [("note", "standing_validation"), ("note", "told_unbalanced")],
        "balanced_but_not_learning": [("note", "learning_router")],  # watched, and no risk
    }
    assert [(finding.level, finding.name) for finding in lint(name)] == meant.get(name, [])


def test_every_fault_of_a_file_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "faulty.toml"
    path.write_text(FAULTY)
    found = [(finding.line, finding.level, finding.code, finding.name) for finding in lint(path)]
    assert found == [
        (1, "note", "unknown-signal", "low_queue"),
        (6, "note", "unused", "unused"),
        (12, "error", "syntax", "broken"),
        (15, "error", "never-true", "halves"),
        (20, "error", "syntax", "misspelt"),
        (24, "warning", "duplicate", "again"),
    ]
    assert str(lint(path)[3]) == (
        f"{path}:15: error: rule 'halves' can never be TRUE, so that it never fires: its lower bound reaches "
        "at most 0.8, and TRUE begins at 0.9 (at high_load_cv = 1, low_queue = 1). "
        "A threshold a little below 0.8 can be reached."
    )
    assert lint(path)[4].message.startswith("kind of [rules.misspelt] is 'rusk'; it must be one of")


def test_a_file_that_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[rules]\na = "b"\nc = \n')
    (finding,) = lint(path)
    assert (finding.line, finding.level, finding.code) == (3, "error", "syntax")
    assert finding.message.startswith("not valid TOML")


def test_no_such_file_or_book() -> None:
    with pytest.raises(UnknownNameError, match="nano_moe"):
        lint("nano_mo")
    with pytest.raises(RulebookError, match="cannot be read"):
        lint("nowhere.toml")


@pytest.mark.parametrize(
    ("text", "level", "message", "remedy"),
    [
        ("high_val_loss", "note", "'val_loss' is no shipped signal, so every step must pass it", ""),
        ("high_router_entropi", "warning", "'router_entropi' is no", "Did you mean 'router_entropy'?"),
        ("entropy_is_high", "error", "no predicate is called 'entropy_is_high'", ""),
    ],
)  # fmt: skip
def test_unknown_names(text: str, level: str, message: str, remedy: str) -> None:
    finding = of(f"{text} & high_loss")[0]
    assert (finding.level, finding.remedy) == (level, remedy)
    assert message in finding.message


def test_scalars_that_are_known_need_no_note() -> None:
    assert of("high_loss & high_dropped_token_fraction & low_activation_entropy") == []


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("high_load_cv & ~high_load_cv", "never-true", "reaches at most 0"),
        ("high_load_cv | ~high_load_cv", "never-false", "can never be FALSE"),
        ("1.0 :: low_activation_entropy", "constant", "is UNKNOWN whatever its predicates say"),
        ("5*high_load_cv | 5*~high_load_cv", "constant", "is TRUE whatever its predicates say"),
        ("~(5*high_load_cv | 5*~high_load_cv)", "constant", "is FALSE whatever its predicates say"),
        ("high_expert_imbalance & low_expert_imbalance", "never-true", "reaches at most 0.53"),
        ("increasing_loss & decreasing_loss", "never-true", "can never be TRUE"),
        ("high_val_loss & low_val_loss", "constant", "is FALSE whatever its predicates say"),
    ],
)
def test_a_rule_alone(text: str, code: str, message: str) -> None:
    (finding,) = [finding for finding in of(text) if finding.code != "unknown-signal"]
    assert finding.code == code
    assert message in finding.message


def test_a_witness_shows_the_truth_that_is_told() -> None:
    text = "0.9 :: high_expert_imbalance & low_expert_imbalance"
    (finding,) = of(text)
    lower = evaluate(text, finding.witness).interval.lower
    assert 0.536 < lower < 0.538
    assert "reaches at most 0.538" in finding.message


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ({"a": "risk: high_load_cv", "b": "risk: always[8](high_load_cv)"}, [("subsumed", "b", 7)]),
        ({"a": "risk: high_load_cv", "b": "risk error: always[8](high_load_cv)"}, []),
        ({"a": "risk warning 100: high_load_cv", "b": "risk: always[8](high_load_cv)"}, []),
        ({"a": "risk: high_load_cv", "b": "risk warning 9: always[8](high_load_cv)"}, [("subsumed", "b", 7)]),
        ({"a": "health: high_load_cv", "b": "health: always[8](high_load_cv)"}, [("subsumed", "a", 2)]),
        ({"a": "risk: 0.8 :: high_load_cv", "b": "risk: 0.6 :: high_load_cv"}, [("subsumed", "a", 2)]),
        ({"a": "risk: high_load_cv", "b": "risk: ~~high_load_cv"}, [("duplicate", "b", 7)]),
        ({"a": "risk: high_load_cv", "b": "health: high_load_cv"}, [("contradictory", "b", 7)]),
        ({"a": "risk: high_load_cv", "b": "health: ~high_load_cv"}, []),
        ({"a": "health: high_load_cv", "b": "health: low_load_cv"}, [("contradictory", "b", 7)]),
        ({"a": "risk: high_load_cv", "b": "risk: low_load_cv"}, []),
        ({"a": "risk: high_load_cv", "b": "risk: ~high_load_cv"}, [("contradictory", "b", 7)]),
        ({"a": "risk: high_load_cv", "b": "risk: high_load_gini"}, []),
    ],
)  # fmt: skip
def test_two_rules(of_book, rules: dict[str, str], found: list[tuple[str, str, int]]) -> None:
    assert of_book(**rules) == found


def test_a_rule_that_is_contained_in_another_without_a_kind_is_a_note() -> None:
    (finding,) = of("high_load_cv", "high_load_cv & high_load_gini")
    assert (finding.line, finding.level, finding.code) == (2, "note", "subsumed")


@pytest.mark.parametrize("signal", shipped())
def test_every_shipped_predicate_can_be_true_and_false(signal: str) -> None:
    found = lint([f"{sense}_{signal}" for sense in SENSES])
    assert not {"never-true", "never-false", "constant"} & {finding.code for finding in found}
