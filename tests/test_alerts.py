"""Alerts: raised when a rule begins to fire, with the layer that decided, in words."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from collector import HOT, RULES, Collector

from moe_rules_callback import (
    Alert,
    Predicate,
    Records,
    Rule,
    RuleAuditCallback,
    Schema,
    SignalInfo,
    State,
)
from moe_rules_callback.alerts import QUIET, Watch
from moe_rules_callback.formula import Var
from moe_rules_callback.language import parse_rule

F, T, U, C = State.FALSE, State.TRUE, State.UNKNOWN, State.CONTRADICTORY
LAYERS = ("first", "middle", "last")
BOUNDS = {F: (0.0, 0.1), T: (0.9, 1.0), U: (0.4, 0.6), C: (0.9, 0.2)}


def rule(name: str, **fields) -> Rule:
    return Rule(name, Var("a"), **fields)


def records(rules: tuple[Rule, ...], *states: tuple[State, ...], start: int = 0) -> Records:
    """Rows with the states given for each rule, which every layer agrees on."""
    empty = Records.empty(Schema(rules, (), LAYERS, 0))
    count = len(states)
    truth = np.array([[[BOUNDS[each]] * len(LAYERS) for each in row] for row in states], np.float32)
    fields = {name: np.zeros((count, *getattr(empty, name).shape[1:])) for name in (
        "signal_value", "signal_pooled", "expert_share", "wall_time",
    )}  # fmt: skip
    step, state = np.arange(start, start + count), np.array(states, np.int8)
    return Records(empty.schema, step=step, state=state, truth_layer=truth, **fields)


def fired(rules: tuple[Rule, ...], *batches: Records) -> list[tuple[str, int]]:
    watch = Watch(batches[0].schema)
    alerts = [alert for batch in batches for alert in watch(batch)]
    return [(alert.rule.name, alert.step) for alert in alerts if alert.ended is None]


def test_a_risk_fires_when_it_becomes_true():
    rules = (rule("bad", kind="risk"),)
    assert fired(rules, records(rules, (F,), (U,), (C,), (T,), (T,))) == [("bad", 3)]


def test_a_health_rule_fires_when_it_becomes_false():
    rules = (rule("good", kind="health"),)
    assert fired(rules, records(rules, (T,), (U,), (C,), (F,), (F,))) == [("good", 3)]


@pytest.mark.parametrize(("quiet", "again"), [(1, 0), (QUIET - 1, 0), (QUIET, 1)])
def test_a_rule_that_flickers_is_told_once(quiet: int, again: int):
    rules = (rule("bad", kind="risk"), rule("other", kind="risk"))
    rows = [(T, F), (T, F), *[(U, F)] * quiet, (T, F)]
    expected = [("bad", 0), ("bad", quiet + 2)][: 1 + again]
    assert fired(rules, records(rules, *rows)) == expected
    batches = [records(rules, row, start=i) for i, row in enumerate(rows)]
    assert fired(rules, *batches) == expected


def test_a_rule_without_a_kind_never_fires():
    rules = (rule("watched"),)
    assert fired(rules, records(rules, (F,), (T,), (U,), (C,))) == []


def test_the_first_row_may_fire():
    rules = (rule("bad", kind="risk"),)
    assert fired(rules, records(rules, (T,))) == [("bad", 0)]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_alert_ends_when_its_rule_has_been_quiet(size: int):
    """Rows are numbered by tens: the bad rule fires in 20 to 40, 60 and, after an end, from 420 on."""
    rules = (rule("bad", kind="risk"), rule("other", kind="health"))
    bad = [F, F, T, T, T, U, T, *[F] * (QUIET + 3), T, T, *[F] * (QUIET - 1)]
    rows = records(rules, *[(state, F if i == 2 else T) for i, state in enumerate(bad)])
    rows.step[:] *= 10
    watch = Watch(rows.schema)
    alerts = [alert for i in range(0, len(rows), size) for alert in watch(rows[i : i + size])]
    told = [(alert.rule.name, alert.step, alert.ended) for alert in alerts]
    assert told == [
        ("bad", 20, None), ("other", 20, None), ("other", 20, 30), ("bad", 20, 70),
        ("bad", 10 * (QUIET + 10), None),
    ]  # fmt: skip
    assert alerts[3] == replace(alerts[0], ended=70)


def test_batches_are_one_history():
    rules = (rule("bad", kind="risk"),)
    batches = [
        records(rules, (F,), (T,)), records(rules, (T,), start=2), Records.empty(records(rules).schema),
        records(rules, (T,), *[(F,)] * QUIET, start=3), records(rules, (T,), start=4 + QUIET),
    ]  # fmt: skip
    assert fired(rules, *batches) == [("bad", 1), ("bad", 4 + QUIET)]


def test_before_its_warm_up_a_rule_does_not_fire():
    rules = (rule("bad", kind="risk", warmup=102), rule("soon", kind="risk"))
    assert fired(rules, records(rules, (T, F), (F, F), (T, T), (T, T), (T, T), start=99)) == [
        ("soon", 101), ("bad", 102),
    ]  # fmt: skip


def test_rules_of_all_kinds_in_the_order_of_their_steps():
    rules = (rule("bad", kind="risk"), rule("watched"), rule("good", kind="health"))
    assert fired(rules, records(rules, (F, T, T), (F, F, F), (T, T, F))) == [("good", 1), ("bad", 2)]


@pytest.mark.parametrize(("kind", "bounds", "layer", "truth"), [
    ("risk", [(0.1, 0.2), (0.9, 0.95), (0.8, 1.0)], "middle", (0.9, 1.0)),
    ("health", [(0.9, 1.0), (0.1, 0.12), (0.0, 0.2)], "middle", (0.0, 0.12)),
])  # fmt: skip
def test_the_layer_that_decided(kind, bounds, layer, truth):
    rules = (rule("a", kind=kind),)
    batch = records(rules, (F,), (T,)) if kind == "risk" else records(rules, (T,), (F,))
    batch.truth_layer[1, 0] = bounds
    (alert,) = Watch(batch.schema)(batch)
    assert (alert.step, alert.layer) == (1, layer)
    assert alert.truth == pytest.approx(truth)


def test_an_alert_in_words():
    told = parse_rule(
        "0.9 :: high_load_cv & ~stable_loss",
        "load_imbalance",
        kind="risk",
        description="Few experts take most tokens.",
        cause="the balancing loss is too weak.",
        next_step="Raise the loss weight.",
    )
    assert str(Alert(told, 120, "block_3/moe", (0.914, 0.998))) == (
        "load_imbalance is TRUE since step 120 in layer 'block_3/moe' [0.91, 1.00]\n"
        "  Why:  0.9 :: high_load_cv & ~stable_loss. Few experts take most tokens. "
        "Likely cause: the balancing loss is too weak.\n"
        "  Next: Raise the loss weight."
    )
    ended = replace(Alert(told, 120, "block_3/moe", (0.914, 0.998)), ended=340)
    assert str(ended) == "load_imbalance has ended: TRUE since step 120, no longer since step 340"
    bare = Rule("routing", Var("sure"), kind="health")
    assert str(Alert(bare, 0, "model", (0.0, 0.25))) == (
        "routing is FALSE since step 0 in layer 'model' [0.00, 0.25]\n  Why:  sure"
    )


def test_an_alert_names_the_signals_that_decided_in_its_layer():
    told = parse_rule(
        "always[2](high_load_cv) & ~stable_loss & high_load_cv & concluded", "uneven", kind="risk"
    )
    predicates = {"high_load_cv": Predicate("load_cv", "high"), "stable_loss": Predicate("loss", "stable")}
    signals = (SignalInfo("loss", per_layer=False), SignalInfo("load_cv"), SignalInfo("router_entropy"))
    batch = records((told,), (F,), (T,))
    values = np.array([[[2.5] * 3, [0.1, 0.2, 0.3], [0] * 3], [[2.25] * 3, [0.5, 1.3149, 0.7], [0] * 3]])
    schema = replace(batch.schema, signals=signals, predicates=predicates)
    batch = replace(batch, schema=schema, signal_value=values.astype(np.float32))
    batch.truth_layer[1, 0, 1] = 0.95, 1.0
    (alert,) = Watch(schema)(batch)
    assert alert.signals == pytest.approx({"load_cv": 1.3149, "loss": 2.25})
    assert list(alert.signals) == ["load_cv", "loss"]
    assert str(alert).splitlines()[0] == (
        "uneven is TRUE since step 1 in layer 'middle' [0.95, 1.00]: load_cv 1.31, loss 2.25"
    )


def test_a_rule_of_several_lines_is_told_in_one():
    told = parse_rule("0.9 :: a   # of tokens\n    & b", "long", kind="risk")
    assert str(Alert(told, 0, "model", (1.0, 1.0))).splitlines()[1:] == ["  Why:  0.9 :: a & b"]


@pytest.mark.parametrize("severity", ["info", "warning", "error"])
def test_an_alert_is_logged_at_the_severity_of_its_rule(severity, caplog):
    caplog.set_level(logging.INFO, "moe_rules_callback")
    seen = Collector()
    book = replace(RULES, rules=(replace(HOT, severity=severity),))
    with RuleAuditCallback(book, plugins=[seen]) as audit:
        audit.on_step({"x": -1.0})
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == (severity.upper(), str(seen.alerts[0]))
    assert record.getMessage().startswith("hot is TRUE since step 0 in layer 'model'")


@pytest.mark.parametrize(
    ("severity", "level"), [("info", "INFO"), ("warning", "WARNING"), ("error", "WARNING")]
)
def test_an_alert_that_ends_is_logged(severity, level, caplog):
    caplog.set_level(logging.INFO, "moe_rules_callback")
    book = replace(RULES, rules=(replace(HOT, severity=severity),))
    with RuleAuditCallback(book) as audit:
        for step in range(QUIET + 1):
            audit.on_step({"x": 0.0 if step else -1.0})
    assert [(record.levelname, record.getMessage()) for record in caplog.records[1:]] == [
        (level, "hot has ended: TRUE since step 0, no longer since step 1")
    ]
