"""A run with axioms and conclusions, through all that tells of a run."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray as xr
from concluding import concluding_history
from test_explain import changed, state_of

from moe_rules_callback import State
from moe_rules_callback.commands.check_reports import Checked, junit, markdown
from moe_rules_callback.compare import compare
from moe_rules_callback.explain import Part, explain
from moe_rules_callback.plots import FIGURES
from moe_rules_callback.replay import replay_history
from moe_rules_callback.report import render_report
from moe_rules_callback.verdicts import by_role, summary, verdicts


@pytest.fixture(scope="module")
def history() -> xr.Dataset:
    return concluding_history()


def part(tree: Part, text: str) -> Part:
    """The first part that begins with a text, from above."""
    waiting = [tree]
    while not waiting[0].text.startswith(text):
        waiting += waiting.pop(0).operands
    return waiting[0]


def test_axioms_stand_below_the_name_with_their_evidence(history: xr.Dataset) -> None:
    told = explain(history, "starved", 80)
    assert (told.state, told.layer) == (State.TRUE, "layer_1")
    assert [each.text.partition(":")[0] for each in told.tree.operands] == [
        "starved_by_gradient", "noisy", "acquitted",
    ]  # fmt: skip
    assert [each.note for each in told.tree.operands] == ["for it", "for it", "against it"]
    replayed = replay_history(history)
    for name in ("starved_by_gradient", "noisy", "acquitted", "collapsed_scores"):
        row = replayed.truth_layer[8, replayed.schema.rule_names.index(name), 1]
        np.testing.assert_allclose(part(told.tree, name).truth, row, atol=1e-6)
    reading = part(told.tree, "low_router_entropy").reading
    assert reading is not None
    assert reading.signal == "router_entropy"
    json.dumps(told.to_dict(), allow_nan=False)


def test_what_follows_from_right_to_left_is_told_where_it_says_something(history: xr.Dataset) -> None:
    told = explain(history, "sure", 100)
    assert told.tree.operands[0].note == "against it, from right to left"
    assert part(told.tree, "~starved").operands[0].text == "starved"
    assert "from right to left" not in str(explain(history, "sure", 80))


def test_an_axiom_is_explained_by_its_evidence(history: xr.Dataset) -> None:
    told = explain(history, "noisy", 80)
    assert told.tree.text == "high_noise"
    assert told.notes[0].startswith("An axiom: what is judged here is its evidence")


@pytest.mark.parametrize(("rule", "step"), [("starved", 80), ("starved", 100), ("fed", 80)])
def test_a_change_changes_the_conclusion_and_a_smaller_one_does_not(
    history: xr.Dataset, rule: str, step: int
) -> None:
    told = explain(history, rule, step)
    assert told.changes
    for change in told.changes:
        assert state_of(changed(history, step // 10, change), told) == change.state != told.state
        assert state_of(changed(history, step // 10, change, 0.99), told) == told.state
    if step == 80:
        found = {change.signal: change.state for change in told.changes}
        assert found["gradient"] == State.UNKNOWN
        assert found["witness"] == State.CONTRADICTORY


def test_verdicts_come_with_their_proof(history: xr.Dataset) -> None:
    found = {verdict.rule: verdict for verdict in verdicts(history)}
    starved = found["starved"]
    assert (starved.role, starved.first_step, starved.contradicted) == ("conclusion", 60, 100)
    assert (
        "\n  Proof at step 60:\n"
        "    starved_by_gradient [0.98, 1.00]: gradient 0.1, sure (layer layer_1)\n"
        "      collapsed_scores [1.00, 1.00]: router_entropy 0.0267 (layer layer_1)\n"
        "  Next: Cool it." in str(starved)
    )
    assert "CONTRADICTORY in 2 of 12 rows, first at step 100; CONTRADICTORY at the end" in starved.sentence
    assert found["noisy"].sentence.startswith("an axiom; its evidence was TRUE in every layer in 0 % of 12")
    assert summary(list(found.values())).startswith("2 of 3 rules fired")
    assert summary(list(found.values())).endswith("contradictory at times: starved, fed.")
    roles = [verdict.role for verdict in by_role(found.values())]
    assert roles == ["conclusion"] * 3 + ["rule"] + ["axiom"] * 4
    json.dumps([verdict.to_dict() for verdict in found.values()], allow_nan=False)


def test_a_contradiction_that_never_fired_has_a_proof(history: xr.Dataset) -> None:
    late = history.isel(step=slice(10, None))
    starved = next(verdict for verdict in verdicts(late) if verdict.rule == "starved")
    assert not starved.fired
    assert (starved.proof_step, [reason.axiom for reason in starved.proof]) == (
        100, ["acquitted", "starved_by_gradient"],
    )  # fmt: skip
    assert "Proof at step 100:" in str(starved)


def test_of_a_part_of_the_rules_what_is_there_is_told(history: xr.Dataset) -> None:
    (alone,) = verdicts(history.sel(rule=["starved"]))
    assert (alone.role, alone.proof) == ("conclusion", ())
    _, both = verdicts(history.sel(rule=["starved_by_gradient", "starved"]))
    assert [reason.axiom for reason in both.proof] == ["starved_by_gradient"]


def test_a_report_lists_conclusions_rules_and_axioms(history: xr.Dataset) -> None:
    page = render_report(history, "demo")
    places = [page.index(f"<caption>{words}") for words in ("Conclusions:", "Rules over", "Axioms:")]
    assert places == sorted(places)
    assert "<dt>Proof at step 60</dt><dd><ul><li>starved_by_gradient [0.98, 1.00]" in page
    assert "<ul><li>collapsed_scores" in page


def test_reports_of_a_check_and_notebooks(history: xr.Dataset) -> None:
    found = verdicts(history)
    checked = Checked("run", found, (), "error")
    assert "- Proof at step 60:\n    - starved_by_gradient [0.98, 1.00]" in markdown(checked)
    failure = ElementTree.fromstring(junit(checked)).find(".//failure")
    assert failure is not None
    assert "Proof at step 60" in (failure.text or "")
    audit = history.moe_rules._repr_html_()
    assert audit.index(">fed<") < audit.index(">plain<") < audit.index(">noisy<")
    assert "<li>collapsed_scores" in found[4]._repr_html_()


def test_a_comparison_knows_the_signals_under_a_conclusion(history: xr.Dataset) -> None:
    other = history.copy(deep=True)
    names = history["rule"].values.tolist()
    other["state"].transpose("step", "rule").values[6:, names.index("starved")] = State.UNKNOWN
    signals = history["signal"].values.tolist()
    for signal in ("loss", "gradient"):
        other["signal_value"].transpose("step", "signal", "layer").values[:, signals.index(signal)] += 5
    found = next(rule for rule in compare(history, other, patience=4).rules if rule.rule == "starved")
    assert [signal for signal, _ in found.before] == ["gradient"]


def test_axioms_have_a_place_of_their_own_in_the_timeline(history: xr.Dataset) -> None:
    figure = FIGURES["rule_timeline"](history)
    assert [text.get_text() for text in figure.axes[0].texts] == [
        "Risks fire when TRUE",
        "Health rules fire when FALSE",
        "Rules that are only watched",
        "Axioms, by the state of their evidence",
    ]
