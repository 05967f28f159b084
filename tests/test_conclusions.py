"""Axioms and what follows from them, against linear programming, which knows the tightest bounds."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from moe_rules_callback import Audit, Predicate, RuleAuditCallback, Rulebook, State, parse_rule
from moe_rules_callback.conclusions import Clause, Literal, clauses, concluded, is_axiom
from moe_rules_callback.deduction import Inference
from moe_rules_callback.errors import RulebookError, UnknownNameError
from moe_rules_callback.formula import Var
from moe_rules_callback.language import parse_formula
from moe_rules_callback.records import Records
from moe_rules_callback.replay import replay, replay_history

# Predicates that copy their signal: truth [x, x] to 1e-6 would need a linear ramp, so truths are read back.
P = {name: Predicate(f"s_{name}", "high", 0.5, 12.0, 0.05) for name in ("e", "f", "g")}


def run(rules: dict[str, str], **signals: list[float]) -> Records:
    """Records of rules over e, f and g, of which each row's signal is given."""
    book = Rulebook("test", tuple(parse_rule(text, name) for name, text in rules.items()), P)
    return replay({f"s_{name}": np.array(values) for name, values in signals.items()}, book)


def truth(records: Records, name: str, row: int = -1) -> np.ndarray:
    return records.truth[row, records.schema.rule_names.index(name)]


def test_what_is_concluded() -> None:
    rules = [parse_rule(text) for text in ("high_loss -> ill", "ill -> high_load_cv", "a <-> ~b", "c & d")]
    assert concluded(rules, lambda name: name.startswith("high")) == ("ill", "b")
    assert [is_axiom(rule, ["ill", "b"]) for rule in rules] == [True, False, True, False]


def test_evidence_bounds_the_conclusion_from_below_and_counter_evidence_from_above() -> None:
    records = run({"for": "e -> ill", "against": "f -> ~ill"}, e=[0.45, 0.9], f=[0.4, 0.3])
    assert records.schema.rule_names == ("for", "against", "ill")
    for row in (0, 1):
        e, f = truth(records, "for", row), truth(records, "against", row)
        np.testing.assert_allclose(truth(records, "ill", row), [e[0], 1 - f[0]], atol=1e-7)
    np.testing.assert_allclose(
        truth(records, "for", 0), 1 / (1 + np.exp(-12 * np.array([-0.1, 0]))), atol=1e-6
    )


def test_the_strongest_of_several_axioms_decides() -> None:
    records = run({"a": "e -> ill", "b": "f -> ill", "c": "e & f -> ill"}, e=[0.55], f=[0.6])
    assert truth(records, "ill")[0] == max(truth(records, name)[0] for name in "abc")
    assert truth(records, "ill")[1] == 1


def test_without_evidence_nothing_is_said() -> None:
    records = run({"a": "e -> ill", "b": "f -> ~ill"}, e=[-3.0, np.nan], f=[-3.0, np.nan])
    np.testing.assert_allclose(truth(records, "ill", 0), [0, 1], atol=1e-6)
    np.testing.assert_array_equal(truth(records, "ill", 1), [0, 1])
    assert set(records.state[:, 2].tolist()) == {State.UNKNOWN}


def test_axioms_that_disagree_contradict() -> None:
    records = run({"a": "e -> ill", "b": "f -> ~ill"}, e=[1.0], f=[1.0])
    assert records.state[-1, 2] == State.CONTRADICTORY


def test_an_equivalence_bounds_both_sides() -> None:
    records = run({"a": "e <-> ill"}, e=[0.2, 0.5, 0.8])
    for row in range(3):
        np.testing.assert_allclose(truth(records, "ill", row), truth(records, "a", row), atol=1e-7)


def test_conclusions_are_evidence_themselves() -> None:
    rules = {"a": "e -> weak", "b": "weak & f -> ill", "c": "ill -> grave", "d": "g -> ~grave"}
    records = run(rules, e=[0.9], f=[0.9], g=[0.45])
    e, f = truth(records, "a")[0], 1 / (1 + np.exp(-12 * (0.9 - 0.55)))
    assert truth(records, "ill")[0] == pytest.approx(e + f - 1, abs=1e-6)
    assert truth(records, "grave")[0] == pytest.approx(truth(records, "ill")[0], abs=1e-6)
    # Backwards: what is surely not grave is not ill either.
    assert truth(records, "ill")[1] == pytest.approx(1 - truth(records, "d")[0], abs=1e-7)
    assert truth(records, "b")[0] == pytest.approx(e + f - 1, abs=1e-6)  # how far b speaks


def test_a_disjunction_leaves_what_the_others_exclude() -> None:
    records = run({"a": "e -> one | two", "b": "f -> ~one"}, e=[1.0], f=[1.0])
    np.testing.assert_allclose(truth(records, "two"), [2 * truth(records, "a")[0] - 1, 1], atol=1e-6)


def test_weights_of_conclusions() -> None:
    records = run({"a": "e ->[2] ill", "b": "f ->[.5] worse"}, e=[0.5], f=[0.4])
    assert truth(records, "ill")[0] == pytest.approx(truth(records, "a")[0] / 2, abs=1e-7)
    assert truth(records, "worse")[0] == pytest.approx(truth(records, "b")[0] * 2, abs=1e-7)


def test_rules_over_conclusions() -> None:
    rules = {
        "a": "e -> ill",
        "ill": "0.9 :: ill",
        "long": "always[2](ill)",
        "mixed": "ill & ~f",
        "plain": "~e",
    }
    records = run(rules, e=[0.1, 1.0, 1.0], f=[0.0, 0.0, 1.0])
    assert records.schema.rule_names == tuple(rules)
    e = records.truth[:, 0, 0]
    np.testing.assert_allclose(records.truth[:, 1, 0], e, atol=1e-7)
    np.testing.assert_allclose(records.truth[:, 2, 0], [0, e[0], e[1]], atol=1e-7)
    assert records.truth[1, 3, 0] == pytest.approx(e[1], abs=0.01)
    assert records.truth[2, 3, 0] == pytest.approx(0, abs=0.01)
    np.testing.assert_allclose(records.truth[:, 4], 1 - records.truth[:, 0, ::-1], atol=1e-7)


def test_each_layer_concludes_for_itself() -> None:
    even, one = np.full((1, 1, 16, 4), 0.25), np.tile(np.eye(4)[0], (1, 1, 16, 1))
    probs = np.concatenate([even, one], axis=1)  # [rows, layers, tokens, experts]
    records = replay({"router_probs": probs}, {"a": "low_router_entropy -> sure"}, layer_axis=0)
    low, high = records.truth_layer[0, 1, :, 0]
    assert low < 0.1 < 0.9 < high


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31))
def test_never_tighter_than_what_is_true_and_as_tight_for_one_name(seed: int) -> None:
    """The tightest bounds of each name, by linear programming over all clauses at once."""
    rng = np.random.default_rng(seed)
    names = ["x", "y", "z"]
    made = []
    for _ in range(rng.integers(1, 5)):
        chosen = rng.permutation(names)[: rng.integers(1, 4)]
        literals = (
            Literal(str(n), bool(rng.integers(2)), float(rng.choice([0.5, 1.0, 2.0]))) for n in chosen
        )
        made.append(Clause(Var(f"e{len(made)}"), tuple(literals)))
    evidence = rng.random(len(made)).astype(np.float32).round(2)
    intervals = np.stack([evidence, np.ones_like(evidence)], axis=-1)[:, None]
    got = np.asarray(Inference(made, names)(jnp.asarray(intervals)))[:, 0]
    rows, limits = [], []
    for clause, e in zip(made, evidence, strict=True):
        row = np.zeros(3)
        limit = -float(e)
        for literal in clause.literals:
            sign = 1 if literal.positive else -1
            row[names.index(literal.name)] = -sign * literal.weight
            limit += 0 if literal.positive else literal.weight
        rows.append(row)
        limits.append(limit)
    single = all(len(clause.literals) == 1 for clause in made)
    for i, sense in itertools.product(range(3), (1, -1)):
        objective = np.zeros(3)
        objective[i] = sense
        best = linprog(objective, A_ub=np.array(rows), b_ub=np.array(limits), bounds=[(0, 1)] * 3)
        if best.status == 2:  # contradictory: nothing to compare with
            return
        bound = sense * best.fun
        if sense == 1:
            assert got[i, 0] <= bound + 1e-5
        else:
            assert got[i, 1] >= bound - 1e-5
        if single:
            assert got[i, 0 if sense == 1 else 1] == pytest.approx(bound, abs=1e-5)


def test_clauses_of_an_axiom() -> None:
    rule = parse_rule("high_a & ill & ~well -> b | 2*~c | high_d", "r")
    (clause,) = clauses(rule, ["ill", "well", "b", "c"])
    assert clause.evidence == parse_formula("high_a & ~high_d")
    assert clause.literals == (
        Literal("ill", False), Literal("well", True), Literal("b", True), Literal("c", False, 2.0),
    )  # fmt: skip
    assert clauses(parse_rule("ill -> ~well"), ["ill", "well"])[0].evidence is None
    assert len(clauses(parse_rule("high_a -> ill & ~well"), ["ill", "well"])) == 2


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("high_loss -> always[3](ill)", "a concluded name stands alone"),
        ("high_loss | worse -> ill & worse", "a concluded name stands alone"),
        ("2*high_loss & worse -> ill & worse", "a concluded name stands alone"),
        ("high_loss -> ill & 2*worse", "names that are concluded together with & have no weights"),
        (
            "high_loss -> ill | 2*high_router_entropy",
            "what is measured and stands on the right has no weight",
        ),
        ("ill -> ~ill", "each concluded name stands there once"),
        ("high_loss <-> ill | worse", "on the right of <-> stands one name or its negation"),
    ],
)
def test_what_cannot_be_concluded(text: str, why: str) -> None:
    with pytest.raises(RulebookError) as error:
        Audit({"r": text}).init({"loss": 1.0, "router_probs": np.full((4, 2), 0.5)})
    message = str(error.value)
    assert message.startswith(f"rule 'r' concludes what nothing measures, and {why}")
    assert message.endswith(
        f": {parse_formula(text)}. Write it as several rules, evidence -> name or evidence -> ~name; a "
        "window or warm-up goes into the evidence, or into a rule over the name."
    )


def test_a_name_that_nobody_concludes_is_unknown() -> None:
    with pytest.raises(
        UnknownNameError, match=r"rule 'r': no predicate is called 'il'.*or conclude it by a rule"
    ):
        Audit({"a": "high_loss -> ill", "r": "il & high_loss"}).init({"loss": 1.0})


@pytest.mark.parametrize("text", ["high_loss -> ill", "high_loss"])
def test_a_rule_may_not_take_the_name_of_a_conclusion(text: str) -> None:
    with pytest.raises(RulebookError, match="'ill' is what a rule concludes, and the name of another thing"):
        Audit({"ill": text, "other": "high_loss -> ill"}).init({"loss": 1.0})


def test_a_book_goes_without_conclusions_whose_evidence_is_missing(caplog: pytest.LogCaptureFixture) -> None:
    texts = {
        "a": "high_gradient_norm -> ill",
        "b": "ill -> grave",
        "c": "0.8 :: grave",
        "d": "high_loss -> bad",
    }
    rules = tuple(parse_rule(text, name) for name, text in texts.items())
    audit = Audit(Rulebook("book", rules, shipped=True))
    audit.init({"loss": 1.0})
    assert audit.schema.rule_names == ("d", "bad")
    assert "pass 'grads' for a" in caplog.text


def test_online_and_again_from_the_history() -> None:
    rules = {"a": "high_loss -> ill", "b": "low_router_entropy -> ~ill", "ill": "0.8 :: ill"}
    rng = np.random.default_rng(0)
    with RuleAuditCallback(rules) as audit:
        for loss in rng.random(80):
            audit.on_step({"loss": loss, "router_probs": rng.dirichlet(np.ones(4), (2, 16))})
        history = audit.history
    again = replay_history(history)
    np.testing.assert_array_equal(
        again.truth_layer, history["truth_layer"].transpose("step", "rule", "layer", "bound")
    )
    np.testing.assert_array_equal(again.state, history["state"])
