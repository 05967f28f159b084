"""The rule language: what it reads, what it refuses, and in which words."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_rules_callback.formula import (
    After,
    Always,
    Connective,
    Formula,
    Not,
    Once,
    Previously,
    Rule,
    Since,
    Var,
)  # fmt: skip
from moe_rules_callback.language import parse_formula, parse_rule

A, B, C, D = map(Var, "abcd")
GOLDEN = json.loads((Path(__file__).parent / "golden" / "truth_intervals.json").read_text())["cases"]


def binary(kind, left, right, weights=()):
    return Connective(kind, (left, right), weights)


def folded(node: Formula) -> list:
    """The formula as nested lists of the form of the golden file, chains folded from the left."""
    match node:
        case Var(name=name):
            return ["var", name]
        case Not(operand=operand):
            return ["not", folded(operand)]
        case Connective(kind=kind, operands=(first, *others)):
            tree = folded(first)
            for operand in others:
                tree = [kind, tree, folded(operand)]
            return tree
    raise AssertionError(node)


@pytest.mark.parametrize("case", GOLDEN, ids=[case["formula"] for case in GOLDEN])
def test_golden_syntax_trees(case):
    assert folded(parse_rule(case["formula"]).formula) == case["ast"]


PRECEDENCE = [
    ("a & b | c", binary("or", binary("and", A, B), C)),
    ("a | b & c", binary("or", A, binary("and", B, C))),
    ("a & b & c", Connective("and", (A, B, C))),
    ("a | (b | c)", binary("or", A, binary("or", B, C))),
    ("(a & b) & c", binary("and", binary("and", A, B), C)),
    ("a & b !& c & d", binary("and", binary("nand", binary("and", A, B), C), D)),
    ("a !& b !& c", binary("nand", binary("nand", A, B), C)),
    ("a | b ^ c !| d", binary("nor", binary("xor", binary("or", A, B), C), D)),
    ("a -> b | c", binary("implies", A, binary("or", B, C))),
    ("a -> b <-> c -> d", binary("implies", binary("iff", binary("implies", A, B), C), D)),
    ("a ->[0.5] b -> c", binary("implies", binary("implies", A, B, (1.0, 0.5)), C)),
    ("~a & b", binary("and", Not(A), B)),
    ("~a since b & c", binary("and", Since(None, Not(A), B), C)),
    ("a since[2] b since c", Since(None, Since(2, A, B), C)),
    ("2*a & b & .5*c", Connective("and", (A, B, C), (2.0, 1.0, 0.5))),
    ("2*a & b !& 3*c", binary("nand", binary("and", A, B, (2.0, 1.0)), C, (1.0, 3.0))),
    ("2*a & b | c", binary("or", binary("and", A, B, (2.0, 1.0)), C)),
    ("2*(a | b) & 3*~c", binary("and", binary("or", A, B), Not(C), (2.0, 3.0))),
    ("2*once[3] a | b", binary("or", Once(3, A), B, (2.0, 1.0))),
    ("1*a & b", binary("and", A, B)),
    ("always[3] a & b", binary("and", Always(3, A), B)),
    ("G F[4] ~a", Always(None, Once(4, Not(A)))),
    ("previously after[0] a", Previously(After(0, A))),
    ("always (a since [5] b)", Always(None, Since(5, A, B))),
    ("Gx & always_b | since_c", binary("or", binary("and", Var("Gx"), Var("always_b")), Var("since_c"))),
    ("a # first\n  & # second\r\n\tb", binary("and", A, B)),
    ("once[" + "0" * 5000 + "3] a", Once(3, A)),
    ("a" + " | a" * 2000, Connective("or", (A,) * 2001)),
    ("(" * 400 + "a" + ")" * 400, A),
]


@pytest.mark.parametrize(("text", "formula"), PRECEDENCE)
def test_precedence(text, formula):
    assert parse_formula(text) == formula


LEVELS = [{"&": "and", "!&": "nand"}, {"|": "or", "^": "xor", "!|": "nor"}, {"->": "implies", "<->": "iff"}]


@given(st.lists(st.sampled_from([s for level in LEVELS for s in level]), max_size=12), st.data())
def test_infix_text_reads_as_a_level_by_level_reduction(operators, data):
    text = data.draw(st.sampled_from("abc"))
    items: list = [["var", text]]
    for operator in operators:
        name = data.draw(st.sampled_from("abc"))
        text += f" {operator} {name}"
        items += [operator, ["var", name]]
    for level in LEVELS:
        at = 1
        while at < len(items):
            if items[at] in level:
                items[at - 1 : at + 2] = [[level[items[at]], items[at - 1], items[at + 1]]]
            else:
                at += 2
    assert [folded(parse_formula(text))] == items


WEIGHTS = st.just(1.0) | st.floats(1e-300, 1e6)
WINDOWS = st.none() | st.integers(1, 10_000)


def grown(inner):
    several = st.lists(st.tuples(inner, WEIGHTS), min_size=2, max_size=4)
    pairs = st.tuples(inner, inner)
    return st.one_of(
        st.builds(lambda k, o: Connective(k, *zip(*o, strict=True)), st.sampled_from(["and", "or"]), several),
        st.builds(Connective, st.sampled_from(["nand", "nor"]), pairs, st.tuples(WEIGHTS, WEIGHTS)),
        st.builds(lambda o, w: Connective("implies", o, (1.0, w)), pairs, WEIGHTS),
        st.builds(Connective, st.sampled_from(["xor", "iff"]), pairs),
        st.builds(Not, inner),
        st.builds(Always, WINDOWS, inner),
        st.builds(Once, WINDOWS, inner),
        st.builds(Previously, inner),
        st.builds(Since, WINDOWS, inner, inner),
        st.builds(After, st.integers(0, 1_000_000), inner),
    )  # fmt: skip


FORMULAS = st.recursive(
    st.builds(Var, st.from_regex(r"[a-z_][A-Za-z0-9_]{0,3}", fullmatch=True)), grown, max_leaves=12
)


@given(FORMULAS)
def test_a_formula_reads_back_from_its_text(formula):
    assert parse_formula(str(formula)) == formula


def test_rule_keeps_text_threshold_and_fields():
    rule = parse_rule(" 0.85 :: a & b\n", "x", kind="risk", warmup=3, severity="error", next_step="wait")
    formula = binary("and", A, B)
    assert rule == Rule("x", formula, 0.85, "0.85 :: a & b", "risk", 3, "error", next_step="wait")
    assert parse_rule("a").threshold == 0.75
    assert parse_rule("1 :: a").threshold == 1.0


NAMES = [
    ("a", "a"),
    ("high_x & low_y", "high_x_and_low_y"),
    ("0.85 :: high_x & ~low_y", "high_x_and_not_low_y_at_0_85"),
    ("a & b | c", "a_and_b_or_c_"),
    ("a & (b | c)", "a_and_b_or_c_"),
    ("always[3](a)", "always_3_a_"),
    ("a_and_b & c", "a_and_b_and_c_"),
    ("2*a & b", "2_a_and_b_"),
    (" & ".join("abcdefghijklmno"), "a_and_b_and_c_and_d_and_e_and_f_and_g_and_h_and_i_and_j_and_"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "name"), NAMES)
def test_name_from_content(text, name):
    found = parse_rule(text).name
    assert found.startswith(name)
    assert len(found) == len(name) + (8 if name.endswith("_") else 0)  # a hash of 8 digits
    assert found == parse_rule(f"({text})" if "::" not in text else text).name


def test_different_rules_get_different_names():
    operands = [
        "a",
        "b",
        "~a",
        "not_a",
        "a_and_b",
        "a_at_0_9",
        "a__b",
        "previously(a)",
        "always[3](a)",
        "always_3_a",
    ]
    texts = {f"{x} {sign} {y}" for x, sign, y in product(operands, ["&", "|", "^", "->", "->[2]"], operands)}
    texts |= {f"({x} & {y}) | b" for x in operands for y in operands} | {
        f"{x} & ({y} | b)" for x in operands for y in operands
    }
    rules = [parse_rule(t + text) for t in ("", "0.9 :: ") for text in (*operands, *texts)]
    meanings = {(str(rule.formula), rule.threshold) for rule in rules}
    assert len({rule.name for rule in rules}) == len(meanings) > 1000
