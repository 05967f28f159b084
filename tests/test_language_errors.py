"""Text that is no rule: always a RuleSyntaxError, in words, with a caret under the fault."""

from __future__ import annotations

import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rules_callback.errors import RuleSyntaxError
from moe_rules_callback.language import parse_formula, parse_rule

WEIGHT = "a weight stands only before an operand of `&`, `|`, `!&` or `!|`"
NAME = "Names are made of the letters a-z, A-Z, digits and `_`."
BRACKETS = "Write `always[32](a)` or `a ->[2] b`."
ONCE = "The threshold belongs to the whole rule: `0.85 :: a & b`."
BEFORE = "A weight is written before its operand: `2*a & b`."
NO_NUMBERS = "A rule compares no numbers: use a predicate such as `high_load_cv`."
PREVIOUSLY = "Write `previously(a)`, and shift the rest of the rule by one step."
FOREIGN = [
    (1, "a {} b", "&", ("and", "AND", "&&", "∧")),
    (1, "a {} b", "|", ("or", "Or", "||", "∨")),
    (1, "a {} b", "->", ("=>", "-->", "==>", "→", "implies")),
    (1, "a {} b", "<->", ("<=>", "==", "=", "↔", "iff")),
    (1, "a {} b", "^", ("!=", "xor", "⊕")),
    (1, "a {} b", "!&", ("nand",)),
    (1, "a {} b", "!|", ("nor",)),
    (4, "b & {} a", "~", ("not", "!", "¬")),
]  # fmt: skip
# Text, column of the caret, what is wrong, what to do.
FAULTS = [
    ("", 1, "the rule is empty", "Write a formula over predicates: `0.85 :: a & b`."),
    ("# a & b", 1, "the rule is empty", "Write a formula over predicates: `0.85 :: a & b`."),
    ("!a", 1, "`!` is not an operator of the rule language", "Write `~` for `!`."),
    ("not(a)", 1, "`not` is not an operator of the rule language", "Write `~` for `not`."),
    ("a b", 3, "an operator is missing between `a` and `b`", "Write `a & b` or `a | b`."),
    ("or & a b", 8, "an operator is missing between `a` and `b`", "Write `a & b` or `a | b`."),
    ("a ~b", 3, "an operator is missing between `a` and `~`", "Join operands with `&`, `|` or `->`."),
    ("a * b", 3, "an operator is missing between `a` and `*`",
     "`*` stands between a weight and its operand, `2*a & b`; to join operands write `&`."),
    ("a &", 4, "an operand is missing after `&`", ""),
    ("-> a", 1, "an operand is missing before `->`", ""),
    ("a & | b", 5, "an operand is missing after `&` and before `|`", ""),
    ("0.85 ::", 8, "an operand is missing after `::`", ""),
    ("a & G", 6, "an operand is missing after `G`",
     "`G` is a temporal operator and cannot name a predicate."),
    ("since & a", 1, "an operand is missing before `since`",
     "`since` is a temporal operator and cannot name a predicate."),
    ("a & ()", 6, "the parentheses are empty", "Put a formula between them."),
    ("a & (b | (c)", 5, "this `(` is never closed", "Close it with `)`."),
    ("(a & b))", 8, "this `)` closes nothing", "Take it away, or open it."),
    ("[a | b] & c", 1, "an operand is missing before `[`",
     "Group with parentheses, `(a | b) & c`; `[n]` follows `->` or a temporal operator only."),
    ("0.5 :: a", 1, "the threshold 0.5 is not in (0.5, 1]",
     "A rule is TRUE when its lower bound reaches the threshold. For the opposite, negate it."),
    ("85 :: a", 1, "the threshold 85 is not in (0.5, 1]", "Write it as a fraction: `0.85 ::`."),
    ("a & (.9 :: b)", 9, "`::` stands once, at the start of a rule", ONCE),
    (".9 :: .8 :: a", 10, "`::` stands once, at the start of a rule", ONCE),
    ("a :: b", 3, "`::` stands after a threshold, at the start of a rule", "Write `0.85 :: a & b`."),
    (":: a", 1, "`::` stands where an operand was expected",
     "A rule begins with its threshold: `0.85 :: a & b`."),
    ("0.85 : a", 6, "`:` has no meaning here", "A threshold is followed by two colons: `0.85 :: a & b`."),
    ("0.85 a", 6, "`::` or `*` is missing after `0.85`",
     "A threshold is written `0.85 :: a & b`, a weight `2*a & b`."),
    ("a & 2", 5, "the number `2` is not an operand", BEFORE),
    ("a | 2 b", 5, "the number `2` is not an operand", BEFORE),
    ("2*a", 1, WEIGHT, "Alone a weight changes nothing: take it away."),
    ("(2*a) & b", 2, WEIGHT, "Alone a weight changes nothing: take it away."),
    ("a -> 2*b", 6, WEIGHT,
     "Write `a ->[2] b` to weigh b, or put parentheses around the weighted formula."),
    ("a | b ^ 2*c", 9, WEIGHT, "Put it before the operand as a whole, or take it away: `^` weighs nothing."),
    ("~2*a & b", 2, WEIGHT, "Put it before the operand as a whole, or take it away: `~` weighs nothing."),
    ("0*a & b", 1, "a weight is above 0 and at most 1,000,000",
     "An operand of weight 0 does nothing: leave it out."),
    ("a ->[1e999] b", 6, "a weight is above 0 and at most 1,000,000", ""),
    ("a <->[2] b", 7, "`<->` takes no weight", "Only `a ->[2] b` does."),
    ("always[n](a)", 8, "a number is missing after `[`", BRACKETS),
    ("always[-1](a)", 8, "a number is missing after `[`", BRACKETS),
    ("always[3(a)", 9, "`]` is missing after `3`", BRACKETS),
    ("always[0](a)", 8, "`[0]` is not a whole number from 1 to 1,000,000",
     "Without `[n]` an operator covers the whole run."),
    ("a since[2.5] b", 9, "`[2.5]` is not a whole number from 1 to 1,000,000",
     "Without `[n]` an operator covers the whole run."),
    ("after[1000001] a", 7, "`[1000001]` is not a whole number from 0 to 1,000,000", ""),
    ("after(a)", 1, "`after` needs the step from which a rule counts", "Write `after[100](a)`."),
    ("previously[2] a", 12, "`previously` looks one row back and takes no `[n]`",
     "For a window write `once[n](a)` or `always[n](a)`."),
    ("X a", 1, "`X` asks for the next step, which a running audit cannot see", PREVIOUSLY),
    ("a & next(b)", 5, "`next` asks for the next step, which a running audit cannot see", PREVIOUSLY),
    ("load_cv < 2", 9, "`<` has no meaning here", NO_NUMBERS),
    ("high-load", 5, "`-` has no meaning here",
     "Negation is `~a`, implication `a -> b`; names are written with `_`."),
    ("a\u00a0& b", 2, "the character U+00A0 (NO-BREAK SPACE) has no meaning here", NAME),
    ("a \u0131ff b", 3, "the character U+0131 (LATIN SMALL LETTER DOTLESS I) has no meaning here", NAME),
    ("¹2 & a", 1, "the character U+00B9 (SUPERSCRIPT ONE) has no meaning here", NAME),
    ("a & \x00", 5, "the character U+0000 (a control character) has no meaning here", NAME),
    ("~" * 65 + "a", 1, "a rule nests at most 64 operators inside each other",
     "Split it into several rules."),
    ("~(" + "~" * 63 + "a & b & c)", 1, "a rule nests at most 64 operators inside each other",
     "Split it into several rules."),
    ("a" * 1_000_000, 10_001, "a rule has at most 10,000 characters, this one has 1,000,000",
     "Split it into several rules."),
]  # fmt: skip


def fault_of(text: str) -> RuleSyntaxError:
    with pytest.raises(RuleSyntaxError) as caught:
        parse_rule(text)
    return caught.value


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"), FAULTS, ids=[f[0][:20] or "-" for f in FAULTS]
)
def test_fault(text, column, message, hint):
    error = fault_of(text)
    assert str(error).splitlines()[0] == f"{message} (line 1, column {column})"
    assert (error.hint, error.line, error.column, error.text) == (hint, 1, column, text)
    assert not hint or str(error).endswith(f"\n{hint}")


@pytest.mark.parametrize(
    ("at", "around", "ours", "foreign"), [(*case[:3], sign) for case in FOREIGN for sign in case[3]]
)
def test_operator_of_another_language(at, around, ours, foreign):
    error = fault_of(around.format(foreign))
    assert str(error).startswith(f"`{foreign}` is not an operator of the rule language")
    assert error.hint == f"Write `{ours}` for `{foreign}`."
    assert error.column == around.index("{") + 1


def test_whole_message():
    assert str(fault_of("0.85 :: a\n\t& (b c)  # why\n | d")) == (
        "an operator is missing between `b` and `c` (line 2, column 7)\n"
        "     & (b c)  # why\n"
        "          ^\n"
        "Write `b & c` or `b | c`."
    )


def test_a_long_line_is_cut_around_the_caret():
    message, source, caret, _ = str(fault_of("a | " * 50 + "b c" + " | d" * 50)).splitlines()
    assert message.endswith("(line 1, column 203)")
    assert re.fullmatch(r"    … .{121} …", source)
    assert source[caret.index("^")] == "c"


def test_a_formula_has_no_threshold():
    with pytest.raises(RuleSyntaxError, match="`::` stands once, at the start of a rule"):
        parse_formula("0.85 :: a")
    with pytest.raises(RuleSyntaxError, match="a weight stands only before an operand"):
        parse_formula("2*a")


def test_what_is_no_text_is_a_type_error():
    with pytest.raises(TypeError, match=r"^A rule is text such as '0.85 :: a & b', not int\.$"):
        parse_rule(3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["~" * 64 + "a", "a" + " -> a" * 64, "(a & " * 64 + "a" + ")" * 64, "~" * 63 + "(a & a & a)"]
)
def test_the_deepest_formula_stays_usable(text):
    formula = parse_formula(text)
    assert parse_formula(str(formula)) == formula
    assert hash(pickle.loads(pickle.dumps(formula))) == hash(formula)
    assert repr(formula).count("Var") == text.count("a")


def refused_or_read(text: str) -> None:
    """Reads the text; a fault is a RuleSyntaxError that points into it. Anything else escapes."""
    try:
        rule = parse_rule(text)
    except RuleSyntaxError as error:
        fault = error
    else:
        assert parse_formula(str(rule.formula)) == rule.formula
        return
    lines = text.split("\n")
    assert 1 <= fault.line <= len(lines)
    assert 1 <= fault.column <= len(lines[fault.line - 1]) + 1
    assert re.match(r" +\^$", str(fault).splitlines()[2])


@given(st.text())
def test_any_text_is_read_or_refused(text):
    refused_or_read(text)


PIECES = [
    *(
        "a",
        "b_1",
        "2",
        ".5",
        "0.85 ::",
        "&",
        "|",
        "~",
        "->",
        "<->",
        "!&",
        "!|",
        "^",
        "(",
        ")",
        "[",
        "]",
        "[3]",
    ),
    *("*", "2*", "->[2]", "always", "once[2]", "previously", "after[1]", "since", "since[2]", "G", "X", "::"),
    *(":", "\n", "#", "and", "!", "=", "-", "é", "\x00", "\t"),
]


@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map(" ".join)
    | st.lists(st.sampled_from(PIECES)).map("".join)
)
def test_any_sequence_of_tokens_is_read_or_refused(text):
    refused_or_read(text)


@given(st.data())
def test_a_damaged_rule_is_read_or_refused(data):
    rule = "0.85 :: 2*(a | ~b) & always[3](c) -> d since[2] e  # why"
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(rule))] * 2)))
    refused_or_read(rule[:start] + data.draw(st.text(max_size=3) | st.sampled_from(PIECES)) + rule[end:])
