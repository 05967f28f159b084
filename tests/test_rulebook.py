"""Where rules come from: shipped books, mappings, lists and TOML files; and what is wrong with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moe_rules_callback.errors import RulebookError, RuleSyntaxError, UnknownNameError
from moe_rules_callback.formula import Rule, variables
from moe_rules_callback.language import parse_rule
from moe_rules_callback.predicates import TUTORIAL, Predicate
from moe_rules_callback.rulebook import Rulebook, book_names, load_rules

# The six rules of the tutorial, verbatim.
NANO_MOE = {
    "expert_specialization": "0.85 :: high_routing_confidence & low_activation_entropy",
    "load_imbalance": "0.75 :: high_expert_imbalance & increasing_weight_magnitude",
    "routing_stability": "0.80 :: high_routing_confidence & stable_loss",
    "learning_progress": "0.70 :: decreasing_loss & low_activation_entropy",
    "underutilized_experts": "0.65 :: ~low_activation_entropy & ~high_routing_confidence",
    "healthy_specialization": "0.75 :: low_activation_entropy & ~high_expert_imbalance",
}
FILE = """\
description = "Queues."

[predicates.high_queue_length]
signal = "queue_length"
is = "high"
offset = 40
slope = 0.2
margin = 2.0

[predicates.queue_grows]
signal = "queue_length"
is = "increasing"
window = 64

[rules]
plain = "high_load_cv"

[rules."long queue"]
rule = \"\"\"
0.9 :: high_queue_length   # tokens that wait
    & queue_grows\"\"\"
kind = "risk"
warmup = 100
severity = "error"
description = "Tokens wait."
cause = "Capacity."
next = "Raise it."
"""


def file_of(directory: Path, text: str) -> Path:
    path = directory / "own.toml"
    path.write_text(text, "utf-8")
    return path


def refusal(directory: Path, text: str, error: type[Exception] = RulebookError) -> str:
    with pytest.raises(error) as caught:
        load_rules(file_of(directory, text))
    return str(caught.value).removeprefix(str(directory))


def test_nano_moe_is_the_tutorial_verbatim():
    book = load_rules("nano_moe")
    assert (book.name, book.shipped, dict(book.predicates)) == ("nano_moe", True, {})
    assert {rule.name: rule.text for rule in book.rules} == NANO_MOE
    assert [rule.name for rule in book.rules if rule.kind] == ["load_imbalance", "underutilized_experts"]
    assert {rule.kind for rule in book.rules} == {None, "risk"}
    assert {name for rule in book.rules for name in variables(rule.formula)} <= set(TUTORIAL)


@pytest.mark.parametrize("name", book_names())
def test_every_shipped_book_explains_itself(name):
    book = load_rules(name)
    assert book.shipped
    assert book.description
    axioms = [rule.name for rule in book.rules if "->" in rule.text]  # their conclusions are explained
    assert [rule.name for rule in book.rules if not rule.description and rule.name not in axioms] == []
    assert [rule.name for rule in book.rules if rule.kind and not (rule.cause and rule.next_step)] == []


def test_no_rules_mean_the_book_router_health():
    assert load_rules() == load_rules(None) == load_rules("router_health")


def test_a_book_is_taken_as_it_is():
    book = Rulebook("mine", (parse_rule("a"),))
    assert load_rules(book) is book


def test_a_mapping_names_its_rules():
    book = load_rules({"x": "0.9 :: a", "y": parse_rule("b", "z", kind="risk")})
    assert book == Rulebook("rules", (parse_rule("0.9 :: a", "x"), parse_rule("b", "y", kind="risk")))


def test_a_list_is_named_from_its_content():
    book = load_rules(["a & b", "0.9 :: a & b", parse_rule("c", "mine")])
    assert [rule.name for rule in book.rules] == ["a_and_b", "a_and_b_at_0_9", "mine"]
    assert load_rules(("a",)).rules == (parse_rule("a"),)


@pytest.mark.parametrize("kind", [Path, str])
def test_a_file_may_say_everything(tmp_path, kind):
    book = load_rules(kind(file_of(tmp_path, FILE)))
    text = "0.9 :: high_queue_length   # tokens that wait\n    & queue_grows"
    words = {"description": "Tokens wait.", "cause": "Capacity.", "next_step": "Raise it."}
    long_queue = Rule("long queue", parse_rule(text).formula, 0.9, text, "risk", 100, "error", **words)
    assert (book.name, book.shipped, book.description) == ("own", False, "Queues.")
    assert book.rules == (parse_rule("high_load_cv", "plain"), long_queue)
    assert book.predicates == {
        "high_queue_length": Predicate("queue_length", "high", 40, slope=0.2, margin=2.0),
        "queue_grows": Predicate("queue_length", "increasing", window=64),
    }


def test_a_file_without_the_ending_and_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "rules"
    path.write_bytes(b"\xef\xbb\xbf" + FILE.encode())
    assert len(load_rules(str(path)).rules) == 2


RULE = "[rules.x]\nrule = 'a'\n"
KEYS = "rule, kind, warmup, severity, description, cause, next"
PREDICATE = RULE + "[predicates.p]\n"
REFUSALS = [
    ("", " has no rules. Write them as [rules.NAME] with a key `rule`."),
    ("\nrulez = 1", ", line 2: the file has an unknown key 'rulez'. Did you mean rules?"),
    ("rules = 1", ", line 1: rules of the file is 1; it must be a table."),
    ("[rules]\n\nx = 1", f", line 3: [rules.x] is 1; it must be a table with the keys {KEYS}."),
    ("# x\n[rules.x]\nkind = 'risk'", ", line 2: [rules.x] lacks the key 'rule', a string."),
    (RULE + "\nwarmpu = 3", ", line 4: [rules.x] has an unknown key 'warmpu'. Did you mean warmup?"),
    (RULE + "[rules.y]\nrule = 'b'\nq = 1", f", line 5: [rules.y] has an unknown key 'q'. Known are {KEYS}."),
    (RULE + "kind = 'bad'", """, line 3: kind of [rules.x] is 'bad'; it must be one of "health", "risk"."""),
    ("[rules]\nx.rule = 'a'\nx.warmup = -1",
     ", line 3: warmup of [rules.x] is -1; it must be a whole number of steps, 0 to 2,147,483,647."),
    ("[rules]\nx = {rule = 'a', warmup = true}",
     ", line 2: warmup of [rules.x] is True; it must be a whole number of steps, 0 to 2,147,483,647."),
    ("rules.x.rule = 2", ", line 1: rule of [rules.x] is 2; it must be a string."),
    ("[rules]\n'' = 'a'", ", line 2: '' cannot name a rule: a name is a string of at most 200 characters, "
     "printable and not blank."),
    (PREDICATE + "is = 'high'", ", line 3: [predicates.p] lacks the key 'signal', a string."),
    (PREDICATE + "signal = 'y'",
     ", line 3: [predicates.p] lacks the key 'is', one of "
     '"high", "low", "increasing", "decreasing", "stable".'),
    (PREDICATE + "signal = 'y'\nis = 'high'\noffset = nan",
     ", line 6: offset of [predicates.p] is nan; it must be a number from -1e+12 to 1e+12."),
    (PREDICATE + "signal = 'y'\nis = 'stable'\noffset = 2",
     ", line 6: offset of [predicates.p] is a degree from 0 to 1, because it is stable."),
    (PREDICATE + "signal = 'y'\nis = 'high'\nslope = 0",
     ", line 6: slope of [predicates.p] is 0; it must be a number above 0, from 1e-12 to 1e+12."),
    (PREDICATE + "signal = 'y'\nis = 'high'\nmargin = '1'",
     ", line 6: margin of [predicates.p] is '1'; it must be a number from 0 to 1e+12."),
    (PREDICATE + "signal = 'y'\nis = 'high'\nwindow = 1",
     ", line 6: window of [predicates.p] is 1; it must be a whole number of rows, 2 to 1,000,000."),
    (RULE + "[predicates.'high y']\nsignal = 'y'\nis = 'high'",
     ", line 3: no rule can call a predicate 'high y': names are a-z, A-Z, 0-9 and _."),
    (RULE + "[predicates.since]\nsignal = 'y'\nis = 'high'",
     ", line 3: no rule can call a predicate 'since': it is a temporal operator."),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSALS)
def test_a_fault_in_a_file_is_told_with_its_line(tmp_path, text, message):
    assert refusal(tmp_path, text) == f"/own.toml{message}"


@pytest.mark.parametrize(
    ("text", "line"),
    [("[rules]\nx = 'a b'", 2), ("[rules.x]\nkind = 'risk'\nrule = 'a b'", 3), ("rules.x = 'a b'", 1)],
)
def test_a_fault_in_a_rule_of_a_file_is_told_with_both_lines(tmp_path, text, line):
    message = (
        f"/own.toml, line {line}, rule 'x': an operator is missing between `a` and `b` (line 1, column 3)\n"
    )
    assert refusal(tmp_path, text, RuleSyntaxError).startswith(message)


NO_SOURCES = [
    ("0.85 :: a", RulebookError,
     "rules= is the text of one rule, '0.85 :: a'. One string names a book or a file: give the text in a "
     "list, rules=['0.85 :: a'], or under a name, rules={'my_rule': '0.85 :: a'}."),
    ("nano_mo", UnknownNameError,
     "no rule book is called 'nano_mo'. Did you mean nano_moe? Shipped are balanced_but_not_learning, "
     "nano_moe, router_health; a rule file ends in .toml; the text of a rule goes into a list."),
    ("no/such.toml", RulebookError, "the rule file 'no/such.toml' cannot be read: [Errno 2] No such file"),
    (3, RulebookError, "rules= is of type int. It takes a mapping name -> text, a list of texts, the name "
     "of a shipped book (balanced_but_not_learning, nano_moe, router_health) or the path of a TOML file."),
    ({"x": 3}, RulebookError, "rule 'x' is of type int, not the text of a rule."),
    ({3: "a"}, RulebookError, "3 cannot name a rule: a name is a string of at most 200 characters, "
     "printable and not blank."),
    ({"x": "a b"}, RuleSyntaxError, "rule 'x': an operator is missing between `a` and `b` (line 1, column"),
    (["a", "a b"], RuleSyntaxError, "rules[1]: an operator is missing between `a` and `b` (line 1, column"),
    (["a & b", "c", "a&b"], RulebookError, "rules[0] and rules[2] are both called 'a_and_b': the same rule "
     "twice? Take one away, or name them: rules={'first': ..., 'second': ...}."),
]  # fmt: skip


@pytest.mark.parametrize(("source", "error", "message"), NO_SOURCES)
def test_what_is_no_source_of_rules(source, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        load_rules(source)


@pytest.mark.parametrize("text", ["[rules", "a = 1\na = 2"])
def test_a_file_that_is_no_toml(tmp_path, text):
    assert re.fullmatch(r"/own\.toml is not valid TOML: .*\(at .*\)\.", refusal(tmp_path, text))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "own.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(
        RulebookError, match=r"own\.toml' cannot be read: 'utf-8' codec can't decode byte 0xff"
    ):
        load_rules(path)
