"""Rulebooks to rule files and back."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from golden_table import CASES, read

from moe_rules_callback.formula import Connective, Rule, Var
from moe_rules_callback.language import parse_rule
from moe_rules_callback.predicates import Predicate
from moe_rules_callback.rulebook import Rulebook, book_names, load_rules
from moe_rules_callback.rulefile import read_rule_file
from moe_rules_callback.rulekeys import PREDICATE, RULE
from moe_rules_callback.rulewriter import KEYS, rule_file_text, write_rules

EVERY_KEY = Rulebook(
    "own",
    (
        parse_rule(
            "0.9 :: 2*high_queue  # tokens that wait\n  & ~x",
            "long queue",
            kind="risk",
            warmup=100,
            severity="error",
            description='Tokens "wait".\tPast C:\\ and DEL \x7f, \u2028 and 𝄞.',
            cause="One line,\nand ''' another.",
            next_step="Raise it:\n'capacity'",
        ),
        parse_rule("a since[4] (b ->[0.3] once(c))", "plain"),
    ),
    {
        "high_queue": Predicate("queue", "high", -4e-7, 0.125, 2.0, 64),
        "grows": Predicate("queue", "increasing"),
    },
    description="Queues,\nand nothing else.",
)


def assert_comes_back(book: Rulebook) -> None:
    file = read_rule_file(rule_file_text(book), "own.toml")
    assert file.description == book.description
    assert file.predicates == dict(book.predicates)
    assert file.rules == book.rules


def test_every_key_comes_back() -> None:
    assert_comes_back(EVERY_KEY)


def test_every_key_of_rule_files_is_a_field() -> None:
    """A key that files gain is written as soon as it is a field of its class."""
    for keys, of in ((RULE, Rule), (PREDICATE, Predicate)):
        assert set(keys) <= {KEYS.get(field.name, field.name) for field in fields(of)}


@pytest.mark.parametrize("name", book_names())
def test_shipped_books_come_back(name: str) -> None:
    assert_comes_back(load_rules(name))


def test_a_file_is_read_as_the_same_book(tmp_path: Path) -> None:
    write_rules(EVERY_KEY, tmp_path / "own.toml")
    assert load_rules(tmp_path / "own.toml") == EVERY_KEY


def test_defaults_are_left_out() -> None:
    book = Rulebook("x", (parse_rule("0.8 :: a", "r"),), {"a": Predicate("loss", "low", 2.0)})
    assert rule_file_text(book) == (
        '[predicates.a]\nsignal = "loss"\nis = "low"\noffset = 2.0\n\n[rules.r]\nrule = "0.8 :: a"\n'
    )


def test_a_changed_formula_is_what_is_written() -> None:
    """The text of a rule whose formula was replaced is out of date."""
    old = parse_rule("0.85 :: a & b", "r")
    new = replace(old, formula=Connective("and", (Var("a"), Var("b")), (2.0, 0.0001)))
    for rule in (new, Rule("bare", Var("a")), replace(old, threshold=0.9)):
        (read_back,) = read_rule_file(rule_file_text(Rulebook("x", (rule,))), "x").rules
        assert (read_back.formula, read_back.threshold) == (rule.formula, rule.threshold)


def test_formulas_of_every_kind_come_back() -> None:
    rules = tuple(Rule(f"r{i}", read(case["ast"])) for i, case in enumerate(CASES) if "ast" in case)
    assert rules
    written = read_rule_file(rule_file_text(Rulebook("x", rules)), "x").rules
    assert [rule.formula for rule in written] == [rule.formula for rule in rules]
