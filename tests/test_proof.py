"""The reasons behind conclusions, against what each axiom is known to say."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from concluding import PREDICATES, RULES, concluding_history, concluding_records

from moe_rules_callback import Predicate, Records, Rulebook, parse_rule
from moe_rules_callback.axioms import Axioms
from moe_rules_callback.formula import Not, Var
from moe_rules_callback.language import parse_formula
from moe_rules_callback.proof import Measured, Proofs, Reason, lines
from moe_rules_callback.replay import replay

P = {name: Predicate(f"s_{name}", "high", 0.5) for name in ("e", "f", "g", "h")}


@pytest.fixture(scope="module")
def records() -> Records:
    return concluding_records()


def proofs_of(rules: dict[str, str], **signals: float) -> Proofs:
    """Proofs of one row over e, f, g and h."""
    book = Rulebook("test", tuple(parse_rule(text, name) for name, text in rules.items()), P)
    return Proofs(replay({f"s_{name}": np.array([value]) for name, value in signals.items()}, book))


BACKWARDS = {"z": "h -> ill", "a": "e & ill -> grave", "b": "g -> ~grave"}


def told(reasons: Any) -> list[tuple[str, str]]:
    return [(reason.axiom, reason.concludes) for reason in reasons]


def test_a_true_risk_has_the_axioms_for_it_with_their_chain(records: Records) -> None:
    assert list(lines(Proofs(records)("starved", 8))) == [
        "starved_by_gradient [0.98, 1.00]: gradient 0.1, sure (layer layer_1)",
        "  collapsed_scores [1.00, 1.00]: router_entropy 0.0267 (layer layer_1)",
    ]


def test_a_contradiction_has_both_sides_the_strongest_first(records: Records) -> None:
    reasons = Proofs(records)("starved", 10)
    assert told(reasons) == [("acquitted", "~starved"), ("starved_by_gradient", "starved")]
    assert str(reasons[0]) == "acquitted [0.99, 1.00] against starved: witness 0.9 (layer layer_1)"


def test_the_strength_of_a_reason_is_the_bound_it_makes(records: Records) -> None:
    proofs, number = Proofs(records), records.schema.rule_names.index("starved")
    for row in (6, 8, 10):
        bounds = records.truth_layer[row, number, 1]
        strongest = {reason.concludes: reason.strength for reason in reversed(proofs("starved", row))}
        assert strongest["starved"] == pytest.approx(bounds[0], abs=1e-6)
        if row == 10:
            assert strongest["~starved"] == pytest.approx(1 - bounds[1], abs=1e-6)


def test_a_health_rule_that_is_false_by_what_makes_it_false(records: Records) -> None:
    assert told(Proofs(records)("fed", 8)) == [("starved_by_gradient", "starved")]


def test_without_evidence_and_without_conclusions_there_is_no_reason(records: Records) -> None:
    proofs = Proofs(records)
    assert proofs("starved", 0) == proofs("plain", 8) == proofs("noisy", 8) == ()


def test_a_history_gives_the_same_reasons(records: Records) -> None:
    history = concluding_history()
    for rule in ("starved", "fed", "sure"):
        for row in (0, 8, -1):
            assert Proofs(history)(rule, row) == Proofs(records)(rule, row)


def test_json(records: Records) -> None:
    (reason,) = json.loads(json.dumps([each.to_dict() for each in Proofs(records)("starved", 8)]))
    assert reason["signals"] == [{"signal": "gradient", "value": pytest.approx(0.1), "units": "1"}]
    assert reason["reasons"][0]["axiom"] == "collapsed_scores"


def test_units_are_told() -> None:
    signals = (Measured("rate", 0.0123, "1/s"), Measured("share", np.nan, "1"))
    reason = Reason("a", "ill", (0.9, 1.0), 0.9, signals, (), "model", ())
    assert str(reason) == "a [0.90, 1.00]: rate 0.0123 1/s, share nan (layer model)"
    assert reason.to_dict()["signals"][1]["value"] is None


@pytest.mark.parametrize(
    ("rules", "signals", "rule", "reasons"),
    [
        # What follows from right to left, and from a disjunction.
        (BACKWARDS | {"a": "ill -> grave"}, {"g": 1, "h": 0}, "ill", [("a", "~ill")]),
        ({"a": "e -> one | two", "b": "f -> ~one"}, {"e": 1, "f": 1}, "two", [("a", "two")]),
        ({"a": "e -> one | two", "b": "f -> ~one"}, {"e": 1, "f": 0}, "two", []),
        (BACKWARDS, {"e": 0, "g": 1, "h": 0}, "ill", []),
        # Either side of an equivalence.
        ({"a": "e <-> ill"}, {"e": 1}, "ill", [("a", "ill")]),
        ({"a": "e <-> ill"}, {"e": 0}, "ill", [("a", "~ill")]),
        # Half the weight is twice the word; at [.73, .84] it says all there is to say.
        ({"a": "e ->[0.5] ill", "b": "f -> ill"}, {"e": 0.6, "f": 0.6}, "ill", [("a", "ill"), ("b", "ill")]),
        # By the sign under which a name stands in a rule.
        ({"a": "e -> ill", "b": "f -> well", "r": "ill & ~well"}, {"e": 1, "f": 1}, "r", [("b", "well")]),
        ({"a": "e -> ill", "r": "~f | g | once[3](ill)"}, {"e": 1, "f": 1, "g": 0}, "r", [("a", "ill")]),
        ({"a": "e -> ill", "r": "(ill ^ f) & g"}, {"e": 1, "f": 0, "g": 1}, "r", [("a", "ill")]),
        # Names that hold each other up are followed once.
        ({"a": "e -> x", "b": "x -> y", "c": "y -> x"}, {"e": 1}, "y", [("b", "y")]),
    ],
)  # fmt: skip
def test_which_axioms_bear(
    rules: dict[str, str], signals: dict[str, float], rule: str, reasons: list[tuple[str, str]]
) -> None:
    assert told(proofs_of(rules, **signals)(rule, 0)) == reasons


def test_what_is_said_of_a_weaker_name_is_not_more_than_the_name_has() -> None:
    """The row of `a` holds e & ill; how true e is by itself it does not tell."""
    proofs = proofs_of(BACKWARDS, e=0.6, g=1, h=0)
    (reason,) = proofs("ill", 0)
    assert reason.premises == ("~grave",)
    # 1 - U of ill, which is e + (1 - U of grave) - 1
    e, not_grave = 1 / (1 + np.exp(-12 * 0.05)), 1 / (1 + np.exp(-12 * 0.45))
    assert reason.strength == pytest.approx(e + not_grave - 1, abs=1e-5)


def test_roles_and_grounds() -> None:
    axioms = Axioms((*RULES, parse_rule("sure", "sure")), PREDICATES)
    rules = {rule.name: rule for rule in RULES}
    assert axioms.names == ("sure", "starved")
    assert [axioms.role(rule) for rule in RULES] == ["axiom"] * 4 + ["conclusion", "conclusion", "rule"]
    assert axioms.stated(rules["noisy"]) == Var("high_noise")
    assert axioms.stated(rules["fed"]) == Not(Var("starved"))
    assert axioms.measured(rules["fed"]) == ("small_gradient", "high_noise", "witness", "low_router_entropy")
    assert axioms.measured(rules["plain"]) == ("high_noise",)
    assert parse_formula("small_gradient & ~starved") in axioms.grounds(rules["fed"])
