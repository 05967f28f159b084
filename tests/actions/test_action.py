"""When an action is taken, and what it says when it is not."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from collector import HOT, RULES, Collector, make

from moe_rules_callback import Alert, PluginError, Rule, RuleAuditCallback, UnknownNameError
from moe_rules_callback.actions import Action, SnapshotRouting, StopTraining
from moe_rules_callback.formula import Var


class Act(Action):
    deed = "ring a bell"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.alerts: list[Alert] = []

    def act(self, alert: Alert) -> None:
        self.alerts.append(alert)


def acted(action: Act, fires: str, flush_every: int = 4) -> list[int]:
    """Steps at which it acted, when the rule `hot` fires where there is a 1."""
    with make(actions=[action], dry_run=False, flush_every=flush_every) as audit:
        for each in fires:
            audit.on_step({"x": -float(each)})
    return [alert.step for alert in action.alerts]


@pytest.mark.parametrize(("options", "fires", "steps"), [
    ({}, "0011101", [2, 6]),
    ({"after": 3}, "1101110111101", [5, 9]),  # in a row; once however long it goes on
    ({"after": 2}, "1110110", [1, 5]),
    ({"cooldown": 4}, "1010101", [0, 4]),
    ({"cooldown": 4, "after": 2}, "110110011", [1, 8]),
    ({"cooldown": 3}, "1001", [0, 3]),
])  # fmt: skip
@pytest.mark.parametrize("flush_every", [1, 4])
def test_hysteresis_and_cool_down(options, fires, steps, flush_every):
    assert acted(Act(**options), fires, flush_every) == steps


@pytest.mark.parametrize(("on", "names"), [
    ("info", ["mild", "hot", "grave"]),
    ("warning", ["hot", "grave"]),
    ("error", ["grave"]),
    (["mild"], ["mild"]),
    (("grave", "mild"), ["mild", "grave"]),
])  # fmt: skip
def test_rules_are_chosen_by_least_severity_or_by_name(on, names):
    mild, grave = (replace(HOT, name=n, severity=s) for n, s in (("mild", "info"), ("grave", "error")))
    rules = (replace(mild, warmup=0), replace(HOT, warmup=1), replace(grave, warmup=2))
    action = Act(on)
    with RuleAuditCallback(replace(RULES, rules=rules), actions=[action], dry_run=False) as audit:
        for _ in range(3):
            audit.on_step({"x": -1.0})
    assert [alert.rule.name for alert in action.alerts] == names


def test_the_alert_is_of_the_row_that_decided():
    action = Act(after=2)
    acted(action, "0111")
    (alert,) = action.alerts
    assert (alert.rule, alert.step, alert.layer, alert.signals) == (HOT, 2, "model", {"x": -1})


def test_a_dry_run_is_the_default_and_says_once_what_would_be_done(caplog, tmp_path):
    act = Act(after=2)
    dry = [act, StopTraining(on="warning"), SnapshotRouting()]
    with make(actions=dry, logdir=tmp_path, sinks=[]) as audit:
        for x in (0, -1, -1, 0, -1, -1):
            audit.on_step({"x": x, "router_probs": np.full((2, 2), 0.5)})
            audit.flush()
            assert not audit.should_stop
    assert act.alerts == list(tmp_path.iterdir()) == []
    assert sorted(message for message in caplog.messages if message.startswith("would")) == [
        "would ring a bell at step 2: rule 'hot' has fired in 2 rows in a row; pass dry_run=False to let it",
        "would stop training at step 1: rule 'hot' fires; pass dry_run=False to let it",
        "would write a snapshot of the routing at step 1: rule 'hot' fires; pass dry_run=False to let it",
    ]


def test_an_action_that_raises_is_switched_off_and_reported(caplog):
    class Broken(Act):
        def act(self, alert: Alert) -> None:
            super().act(alert)
            raise RuntimeError("no bell")

    broken, whole, seen = Broken(), Act(), Collector()
    with make(seen, actions=[broken, whole], dry_run=False, flush_every=1) as audit:
        for x in (-1, 0, -1):
            audit.on_step({"x": x})
    assert ([a.step for a in broken.alerts], [a.step for a in whole.alerts]) == ([0], [0, 2])
    assert seen.steps == [0, 1, 2]
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert error.getMessage().endswith("Broken' raised in on_records and is switched off; training goes on")
    assert "no bell" in caplog.text


def test_a_severity_that_no_rule_has_is_told(caplog):
    assert acted(Act("error"), "111") == []
    assert caplog.messages[0] == (
        "no action will ring a bell: no rule that can fire has the severity error or above. Name rules "
        "instead, on=['..'], or give them a kind and a severity."
    )


def test_what_cannot_be_meant():
    with pytest.raises(UnknownNameError, match=r"on is 'hot'.* a list of the names of rules, .*\['hot'\]"):
        Act("hot")
    with pytest.raises(ValueError, match=r"after is 0 and cooldown is 0; they count rows, from 1 on and"):
        Act(after=0)
    with pytest.raises(PluginError, match=r"is not an action. Pass objects such as StopTraining\(\), not"):
        make(actions=[StopTraining])
    with pytest.raises(UnknownNameError, match=r"ring a bell on the rule 'hott'.* so. Did you mean hot\?"):
        acted(Act(["hott"]), "1")
    silent = replace(RULES, rules=(Rule("watched", Var("is_hot")),))
    audit = RuleAuditCallback(silent, actions=[Act(["watched"])])
    with pytest.raises(PluginError, match=r"'watched', which has no kind and so never fires. Give it kind"):
        audit.on_step({"x": 0.0})
    with pytest.raises(PluginError, match=r"has no place for them: pass logdir="):
        make(actions=[SnapshotRouting()]).on_step({"x": 0.0})
    with pytest.raises(ValueError, match=r"rows is 0; it counts steps before and after an alert"):
        SnapshotRouting(rows=0)
