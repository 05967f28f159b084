"""Rules and rule files that nobody sane writes: a rule, or a short error of ours that says what to do."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rules_callback.errors import MoeRulesError, RulebookError, RuleSyntaxError
from moe_rules_callback.formula import Connective, Var, variables
from moe_rules_callback.language import parse_formula, parse_rule
from moe_rules_callback.lint import lint
from moe_rules_callback.program import Program
from moe_rules_callback.rulebook import Rulebook, load_rules
from moe_rules_callback.rulefile import read_rule_file
from moe_rules_callback.rulekeys import MAX_NAME
from moe_rules_callback.rulewriter import rule_file_text
from moe_rules_callback.verdicts import verdicts

RULE = '[rules.a]\nrule = "0.85 :: high_load_cv"\n'
CURVE = RULE + '[predicates.high_load_cv]\nsignal = "load_cv"\nis = "high"\n'
NESTED = (
    "~",
    "always ",
    "once[3] ",
    "previously ",
    "G ",
    "a since ",
    "a -> ",
    "a <-> ",
    "after[1] ",
    "a & (",
)


def refused(text: str) -> RuleSyntaxError:
    with pytest.raises(RuleSyntaxError) as caught:
        parse_rule(text)
    assert len(str(caught.value)) < 700
    return caught.value


@pytest.mark.parametrize("times", [1_000, 100_000])
@pytest.mark.parametrize("operator", NESTED)
def test_operators_inside_each_other(operator: str, times: int):
    error = refused(operator * times + "a" + ")" * (times * operator.count("(")))
    most = (
        "a rule nests at most 64 operators" if len(operator) * times <= 9_000 else "at most 10,000 characters"
    )
    assert most in str(error) or "at most 10,000 characters" in str(error)


def test_parentheses_inside_each_other():
    assert parse_formula("(" * 4_999 + "a" + ")" * 4_999) == Var("a")
    assert "at most 10,000 characters" in str(refused("(" * 100_000 + "a" + ")" * 100_000))


@pytest.mark.parametrize("operator", ["<->", "^", "->", "!&", "since"])
def test_the_longest_chain_is_compiled_and_linted(operator: str):
    """An equivalence uses its operands twice: as a tree, 64 of them would have 2^64 leaves."""
    text = f" {operator} ".join(f"high_x{i}" for i in range(65))
    formula = parse_formula(text)
    assert len(list(variables(formula))) == 65
    assert len(Program([formula]).atoms) == 65
    assert {finding.code for finding in lint([f"0.85 :: {text}"])} == {"unknown-signal"}


def test_a_rule_of_hundreds_of_operands_is_linted():
    text = " | ".join(f"high_x{i}" for i in range(650))
    assert {finding.code for finding in lint([f"0.85 :: {text}"])} == {"unknown-signal"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a" * 9_990 + " & & b", "an operand is missing after `&` and before `&`"),
        ("1" * 9_990 + " a", f"`::` or `*` is missing after `{'1' * 60}..`"),
        (
            "x" * 5_000 + " " + "y" * 4_000,
            f"an operator is missing between `{'x' * 60}..` and `{'y' * 60}..`",
        ),
        ("always[999999999999] a", "`[999999999999]` is not a whole number from 1 to 1,000,000"),
        ("always[600000] a & once[600000] b", "the windows of a rule have at most 1,000,000 rows together"),
        ("1e308*a & b", "a weight is above 0 and at most 1,000,000"),
        ("inf*a & b", "an operator is missing between `inf` and `*`"),
        ("-1*a & b", "`-` has no meaning here"),
        ("nan :: a", "`::` stands after a threshold"),
        ("1.01 :: a", "the threshold 1.01 is not in (0.5, 1]"),
        ("a & \u202eb", "the character U+202E (RIGHT-TO-LEFT OVERRIDE) has no meaning here"),
        ("\ufeffa", "the character U+FEFF (ZERO WIDTH NO-BREAK SPACE) has no meaning here"),
        ("a \ud800", "the character U+D800 (a control character) has no meaning here"),
    ],
)
def test_a_hostile_rule(text: str, told: str):
    assert str(refused(text)).startswith(told)


FILES = [
    ("description = '\x00'\n", "is not valid TOML: Found invalid character '\\x00'"),
    (RULE + RULE, "is not valid TOML: Cannot declare ('rules', 'a') twice"),
    (RULE + f"warmup = {'9' * 5_000}", "is not valid TOML: Exceeds the limit"),
    (RULE + f"warmup = 0x{'f' * 5_000}", "warmup of [rules.a] is int too large to show; it must be a whole"),
    (RULE + "warmup = 2147483648", "is 2147483648; it must be a whole number of steps, 0 to 2,147,483,647."),
    (RULE + "description = " + "[" * 50_000, "holds arrays or tables hundreds deep inside each other"),
    (RULE + "a" + ".a" * 50_000 + " = 1", "line 3: a key of more than 32 parts"),
    ("[" + ".".join(['"a"'] * 20_000) + "]", "line 1: a key of more than 32 parts"),
    (
        f"[rules.{'a' * 201}]\nrule = 'x'",
        "a name is a string of at most 200 characters, printable and not blank",
    ),
    ('[rules."a\\u202eb"]\nrule = "x"', "'a\\u202eb' cannot name a rule"),
    ('[rules."a\\u0000b"]\nrule = "x"', "'a\\x00b' cannot name a rule"),
    ("".join(f"rules.r{i} = 'x'\n" for i in range(1_001)), "has 1,001 rules; a file holds at most 1,000."),
    *(
        (CURVE + f"{key} = {value}", f"{key} of [predicates.high_load_cv] is ")
        for key in ("offset", "slope", "margin", "window", "sampling")
        for value in ("1e308", "nan", "inf", "-1e13", "9" * 400, "0x" + "f" * 5_000, "9_999_999_999_999")
    ),
    (CURVE + "slope = 1e-320", "slope of [predicates.high_load_cv] is 1e-320; it must be a number above 0"),
]


@pytest.mark.parametrize(("text", "told"), FILES, ids=[f"{told[:50]}" for _, told in FILES])
def test_a_hostile_file(text: str, told: str):
    with pytest.raises(RulebookError) as caught:
        read_rule_file(text, "own.toml")
    assert told in str(caught.value)
    assert len(str(caught.value)) < 600


def test_the_linter_says_of_a_hostile_file_what_the_reader_says(tmp_path: Path):
    for text, told in FILES[::3]:
        (tmp_path / "own.toml").write_text(text, "utf-8")
        (finding, *_) = lint(tmp_path / "own.toml")
        assert finding.level == "error"
        assert told.removeprefix("is ").removeprefix("line 3: ").removeprefix("line 1: ") in finding.message


def test_names_of_python_are_names_like_others():
    names = "[rules.__class__]\nrule='__dict__'\n[rules.__init__]\nrule='__import__ & eval'"
    assert [rule.name for rule in read_rule_file(names, "x").rules] == ["__class__", "__init__"]


@pytest.mark.parametrize("read", [load_rules, lint])
def test_what_is_no_file(read, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes(b"# \xff")
    (tmp_path / "wide.toml").write_bytes(RULE.encode("utf-16"))
    with (tmp_path / "large.toml").open("wb") as file:
        file.truncate(100 * 2**20)
    for name, told in [
        ("pipe.toml", "is a pipe or a device. Name a file on disk."),
        ("folder.toml", "cannot be read: [Errno 21] Is a directory"),
        ("latin.toml", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("wide.toml", "cannot be read: 'utf-8' codec can't decode byte 0xff"),
        ("large.toml", "has more than 1,048,576 bytes, the most that one may have."),
        ("none\x00.toml", "cannot be read: embedded null byte"),
    ]:
        with pytest.raises(RulebookError) as caught:
            read(str(tmp_path / name))
        assert told in str(caught.value)


def test_a_long_rule_in_the_place_of_a_file_is_not_shown_whole():
    with pytest.raises(RulebookError, match="rules= is the text of one rule") as caught:
        load_rules("0.85 :: " + "a & " * 100_000)
    assert len(str(caught.value)) < 600


def test_a_byte_order_mark_is_none_of_the_text(tmp_path: Path):
    (tmp_path / "own.toml").write_bytes(b"\xef\xbb\xbf" + RULE.encode())
    assert load_rules(tmp_path / "own.toml").rules[0].name == "a"


NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=MAX_NAME)


@given(
    names=st.lists(NAMES, min_size=1, max_size=4, unique=True), words=st.text(st.characters(codec="utf-8"))
)
def test_names_and_words_of_any_kind_come_back(names: list[str], words: str):
    rules = tuple(parse_rule("a & ~b", name, description=words, cause=words) for name in names)
    told = read_rule_file(rule_file_text(Rulebook("x", rules)), "x").rules
    assert told == rules


@given(
    st.text(max_size=300)
    | st.lists(st.sampled_from([*CURVE.splitlines(), "x", "[", "a = [1", "'''"])).map("\n".join)
)
def test_any_text_is_a_rule_file_or_an_error_of_ours(text: str):
    try:
        file = read_rule_file(text, "own.toml")
    except MoeRulesError as error:
        told = str(error)
    else:
        told, found = "", {rule.name for rule in file.rules}
        assert tomllib.loads(text)["rules"].keys() == found
    assert len(told) < 1_000


def test_conclusions_in_a_ladder_have_a_proof_of_bounded_size():
    """Each of 40 names follows from the one before in two ways: there are 2^40 chains of reasons."""
    from moe_rules_callback.replay import replay

    texts = {"a0": "high_x -> name_0", "b0": "high_y -> name_0", "end": "0.85 :: name_39"}
    for i in range(1, 40):
        texts |= {f"{way}{i}": f"name_{i - 1} -> name_{i}" for way in "ab"}
    rules = [parse_rule(text, name, kind="risk" if name == "end" else None) for name, text in texts.items()]
    from moe_rules_callback.history import records_to_dataset

    history = records_to_dataset(replay({"x": [0.0] * 40 + [99.0], "y": [0.0] * 40 + [99.0]}, rules))
    (end,) = (verdict for verdict in verdicts(history) if verdict.rule == "end")
    assert end.fired
    assert 8 <= str(end).count("name_") <= 600


def test_a_chain_of_equivalences_pushes_each_name_once():
    from moe_rules_callback.axioms import Axioms

    names = [f"name_{i}" for i in range(60)]
    chain = parse_formula(" <-> ".join(names))
    assert isinstance(chain, Connective)
    pushed = list(Axioms((), {}, names).pushes(chain, True))
    assert sorted(pushed) == sorted((name, sign) for name in names for sign in (True, False))
