"""What the shipped books conclude: a healthy run in which one thing goes wrong, told by its signals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import pytest

from moe_rules_callback import Audit, Records
from moe_rules_callback.records import State
from moe_rules_callback.rulebook import load_rules

TRUE, FALSE, UNKNOWN = State.TRUE, State.FALSE, State.UNKNOWN
ROWS, ONSET, TOP_K = 460, 256, 2  # by the onset all warm-ups are over
Judge = Callable[[Mapping[str, Any]], Records]

NOISE = 0.01 * (-1.0) ** np.arange(ROWS)
HEALTHY = {
    "loss": 2 + NOISE,
    "expert_load": np.full(8, 1 / 8),
    "router_tokens": 4096.0,
    "router_entropy": 0.6,
    "router_mutual_information": 0.3,
    "router_gradient_share": 0.2,
    "router_logit_rms": 2.0,
    "boundary_margin": 0.1,
    "expert_imbalance": 0.3,
    "expert_gradient_min_share": 0.4,
    "expert_weight_cosine": 0.01,
    "weight_norm": 40.0,
    "validation_loss": np.linspace(2.2, 2.0, ROWS),
    "generalisation_ratio": 1.05,
    "dropped_token_fraction": 0.02,
    "balancing_loss": 1.05,
    "load_balancing_loss": 1.05,
    "router_noise_repetition": 0.0,
    "router_precision_disagreement": 0.0,
}
SYMPTOMS = {
    "router_not_learning",
    "uneven_load",
    "expert_monopoly",
    "loss_spike",
}  # rules that name no illness
ONE_SILENT = np.array([0, *[1 / 7] * 7])
UNEVEN = np.array([0.35, 0.2, 0.15, 0.1, 0.05, 0.05, 0.05, 0.05])
# What each axiom of router_health asks for, and no more: the other signals stay healthy.
FAULTS = {
    "starved_by_gradient": {"router_gradient_share": 0.005, "router_mutual_information": 0.009},
    "dominated_by_gradient": {"router_gradient_share": 0.95},
    "saturated_by_logits": {"router_logit_rms": 12.0},
    "saturated_by_choice": {"router_entropy": 0.01},
    "dead_by_load": {"expert_load": ONE_SILENT, "expert_gradient_min_share": 0.0},
    "dead_for_long": {"expert_load": ONE_SILENT},
    "collapsed_by_load": {"expert_load": np.array([0.49, 0.49, *[0.02 / 6] * 6])},
    "collapsed_by_first": {"expert_imbalance": 0.9},
    "weak_by_load": {"expert_load": UNEVEN},
    "overflow_by_drops": {"dropped_token_fraction": 0.4},
    "misrouted_by_margin": {"boundary_margin": -0.3},
    "shock_by_weights": {"weight_norm": 44.0},
    "corrupt_by_loss": {"loss": 2.045 + NOISE},  # no spike: 4.5 standard deviations
    "shift_by_validation": {"generalisation_ratio": 1.7},
    "duplicated_by_weights": {"expert_weight_cosine": 0.95},
    "reuse_by_probe": {"router_noise_repetition": 0.99},
    "rounded_by_probe": {"router_precision_disagreement": 0.01},
    "telemetry_by_validation": {"generalisation_ratio": 0.3},
    "telemetry_by_balance": {"balancing_loss": 2.1},
}


def table(**fault: Any) -> dict[str, np.ndarray]:
    """float32 [ROWS, ..] of each signal: healthy, from the onset on with the fault."""
    late = np.arange(ROWS) >= ONSET

    def column(name: str) -> np.ndarray:
        before, after = (np.asarray(source[name]) for source in (HEALTHY, HEALTHY | fault))
        when = late[:, None] if name == "expert_load" else late
        return np.where(when, after, before).astype(np.float32)

    return {name: column(name) for name in HEALTHY}


def compiled(book: str) -> Judge:
    """One program for all tables."""
    audit = Audit(book, rows=ROWS, top_k=TOP_K)
    begin = audit.init({name: rows[0] for name, rows in table().items()})

    @jax.jit
    def scan(rows):
        return jax.lax.scan(lambda state, row: (audit.update(state, row), None), begin, rows)[0].rows

    def judge(fault: Mapping[str, Any]) -> Records:
        rows = jax.device_get(scan(table(**fault)))
        return audit.records(rows, np.arange(ROWS), np.zeros(ROWS))

    return judge


@pytest.fixture(scope="module")
def health() -> Judge:
    return compiled("router_health")


@pytest.fixture(scope="module")
def balanced() -> Judge:
    return compiled("balanced_but_not_learning")


def states(records: Records, rule: str) -> np.ndarray:
    """[ROWS]"""
    return records.state[:, records.schema.rule_names.index(rule)]


def fired(records: Records) -> set[str]:
    """Risks that were TRUE in some row."""
    return {
        rule.name
        for rule in records.schema.rules
        if rule.kind == "risk" and (states(records, rule.name) == TRUE).any()
    }


CONCLUDES = {
    rule.name: name
    for rule in load_rules("router_health").rules
    if "->" in rule.text and not (name := rule.text.rpartition("-> ")[2]).startswith("~")
}


def test_every_axiom_has_its_table():
    assert FAULTS.keys() == CONCLUDES.keys()
    risks = {rule.name for rule in load_rules("router_health").rules if rule.kind == "risk"}
    assert risks - set(CONCLUDES.values()) == SYMPTOMS


def test_a_healthy_run_fires_nothing(health):
    records = health({})
    assert set(records.schema.rule_names) == {rule.name for rule in load_rules("router_health").rules}
    assert fired(records) == set()
    assert set(states(records, "router_in_health")) == {TRUE}
    assert set(states(records, "starved_router")) == {FALSE}  # its gradient speaks against it


@pytest.mark.parametrize("axiom", FAULTS)
def test_one_thing_wrong_is_called_by_its_name(health, axiom):
    records = health(FAULTS[axiom])
    assert fired(records) - SYMPTOMS == {CONCLUDES[axiom]}
    first = int(np.argmax(states(records, CONCLUDES[axiom]) == TRUE))
    assert first >= ONSET
    # Of two axioms with one conclusion it is this one.
    assert (states(records, axiom)[first:] == TRUE).any()
    assert (states(records, axiom)[:ONSET] != TRUE).all()


@pytest.mark.parametrize(
    ("fault", "rule"),
    [
        ({"router_mutual_information": 0.001}, "router_not_learning"),
        ({"expert_load": UNEVEN, "router_logit_rms": 4.9, "expert_weight_cosine": 0.1}, "uneven_load"),
        ({"loss": np.where(np.arange(ROWS) == ONSET, 2.08, 2 + NOISE)}, "loss_spike"),
    ],
)
def test_plain_rules_name_no_illness(health, fault, rule):
    assert fired(health(fault)) == {rule}


def test_a_loss_that_jumps_while_the_weights_do_is_no_fault_of_labels(health):
    both = FAULTS["corrupt_by_loss"] | FAULTS["shock_by_weights"]
    assert fired(health(both)) == {"lr_shock"}


def test_one_bad_batch_is_no_fault_of_labels(health):
    """Its loss is 30 standard deviations above, and the mean of 8 rows with it."""
    spike = np.where(np.arange(ROWS) == ONSET, 2.3, 2 + NOISE)
    assert fired(health({"loss": spike})) == {"loss_spike"}


def test_a_validation_loss_that_stands_says_nothing(health):
    """The loss falls, and what it is compared with was measured long ago."""
    ratio = np.where(np.arange(ROWS) < ONSET + 70, 1.05, 1.7)
    assert fired(health({"generalisation_ratio": ratio, "validation_loss": 2.1})) == set()
    assert fired(health({"generalisation_ratio": ratio})) == {"data_shift"}


def test_few_tokens_cannot_tell_uneven_loads(health):
    assert fired(health(FAULTS["weak_by_load"] | {"router_tokens": 4.0})) == set()
    records = health(FAULTS["overflow_by_drops"] | {"router_tokens": 4.0})
    assert set(states(records, "capacity_overflow")[ONSET:]) == {UNKNOWN}
    assert fired(records) == set()


# Of each router: learning_router, starved_router, aux_dominated.
BALANCED = {
    "learning": ({}, (TRUE, FALSE, FALSE)),
    "starved": (FAULTS["starved_by_gradient"], (FALSE, TRUE, UNKNOWN)),
    "dominated": (FAULTS["dominated_by_gradient"], (FALSE, UNKNOWN, TRUE)),
}


@pytest.mark.parametrize("router", BALANCED)
def test_three_balanced_routers_are_told_apart(balanced, router):
    fault, expected = BALANCED[router]
    records = balanced(fault)
    assert set(states(records, "balanced")[ONSET:]) == {TRUE}
    found = [
        states(records, name)[-1].item() for name in ("learning_router", "starved_router", "aux_dominated")
    ]
    assert found == list(expected)


def test_few_tokens_cannot_tell_balance(balanced):
    assert states(balanced({"router_tokens": 4.0}), "balanced")[-1] == UNKNOWN
