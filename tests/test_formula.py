"""Formulas: their text, their parts, and that they behave as values."""

from __future__ import annotations

import copy
import pickle
import re

import pytest

from moe_rules_callback.errors import RulebookError
from moe_rules_callback.formula import (
    After,
    Always,
    Connective,
    Not,
    Once,
    Previously,
    Rule,
    Since,
    Var,
    children,
    variables,
)  # fmt: skip

A, B, C = Var("a"), Var("b"), Var("c")
AND = Connective("and", (A, B))
TEXTS = [
    (A, "a"),
    (Not(A), "~a"),
    (Not(Not(A)), "~~a"),
    (Not(AND), "~(a & b)"),
    (Connective("and", (A, B, C)), "a & b & c"),
    (Connective("and", (AND, C)), "(a & b) & c"),
    (Connective("or", (A, Not(B)), (2.0, 0.1)), "2*a | 0.1*~b"),
    (Connective("or", (AND, C), (3.0, 1.0)), "3*(a & b) | c"),
    (Connective("nand", (A, B), (1.0, 1 / 3)), "a !& 0.3333333333333333*b"),
    (Connective("nor", (A, B)), "a !| b"),
    (Connective("xor", (A, B)), "a ^ b"),
    (Connective("iff", (A, B)), "a <-> b"),
    (Connective("implies", (A, B)), "a -> b"),
    (Connective("implies", (A, B), (1.0, 0.5)), "a ->[0.5] b"),
    (Always(None, A), "always(a)"),
    (Always(3, AND), "always[3](a & b)"),
    (Not(Once(8, A)), "~once[8](a)"),
    (Previously(Not(A)), "previously(~a)"),
    (After(0, A), "after[0](a)"),
    (Since(None, A, B), "a since b"),
    (Since(5, AND, Since(2, A, B)), "(a & b) since[5] (a since[2] b)"),
]


@pytest.mark.parametrize(("formula", "text"), TEXTS)
def test_text(formula, text):
    assert str(formula) == text


def test_weights_are_one_unless_given():
    assert AND.weights == (1.0, 1.0)
    assert Connective("and", (A, B), (1.0, 1.0)) == AND
    assert Connective("and", (A, B), (2.0, 1.0)) != AND


@pytest.mark.parametrize("formula", [formula for formula, _ in TEXTS])
def test_formulas_are_values(formula):
    for twin in (copy.deepcopy(formula), pickle.loads(pickle.dumps(formula))):
        assert twin == formula
        assert hash(twin) == hash(formula)


def test_formulas_with_different_texts_differ():
    assert len({formula for formula, _ in TEXTS}) == len(TEXTS)


def test_children_stand_left_to_right():
    assert children(A) == ()
    assert children(Not(B)) == (B,)
    assert children(After(3, B)) == (B,)
    assert children(Since(2, B, A)) == (B, A)
    assert children(Connective("or", (C, A, B))) == (C, A, B)


def test_variables_stand_left_to_right_with_repetitions():
    formula = Connective("implies", (Since(2, Var("z"), Not(A)), Connective("and", (Always(4, Var("m")), A))))
    assert list(variables(formula)) == ["z", "a", "m", "a"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "riks"}, "rule 'r': kind is 'riks'; it is one of None, 'health', 'risk'."),
        ({"severity": "bad"}, "rule 'r': severity is 'bad'; it is one of 'info', 'warning', 'error'."),
        ({"threshold": 0.5}, "rule 'r': the threshold is 0.5; it lies above 0.5 and is at most 1."),
    ],
)
def test_a_rule_with_a_field_that_means_nothing_is_refused(fields: dict, message: str):
    with pytest.raises(RulebookError, match=f"^{re.escape(message)}$"):
        Rule("r", Var("a"), **fields)
