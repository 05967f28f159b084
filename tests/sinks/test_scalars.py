from __future__ import annotations

import dataclasses

import fake_records as fake
import numpy as np
import pytest

from moe_rules_callback.records import Schema, SignalInfo
from moe_rules_callback.sinks.scalars import ScalarTable, Thin, describe_rules


def test_every_value_stands_under_its_tag():
    records = fake.make_records(5)
    table = ScalarTable(records.schema)
    row = dict(zip(table.tags, table.values(records)[3].tolist(), strict=True))
    lower, upper = records.truth[3, 1].tolist()
    assert row["rules/load_imbalance/lower"] == lower
    assert row["rules/load_imbalance/upper"] == upper
    assert row["rules/load_imbalance/value"] == pytest.approx((lower + upper) / 2)
    assert row["rules/load_imbalance/state"] == records.state[3, 1]
    assert row["signals/loss"] == records.loss[3]
    assert row["signals/router_entropy"] == records.signal_pooled[3, 1]
    assert row["signals/block_1/moe/router_entropy"] == records.signal_value[3, 1, 1]
    assert "signals/block_1/moe/loss" not in row  # a signal of the whole model
    assert len(row) == 6 * 4 + 3 + 2 * 2


def test_a_single_layer_adds_no_tags_of_its_own():
    tags = ScalarTable(fake.make_schema(layers=1)).tags
    assert [tag for tag in tags if tag.startswith("signals/")] == [
        "signals/loss", "signals/router_entropy", "signals/routing_confidence",
    ]  # fmt: skip


def test_odd_names_make_legal_tags_that_stay_apart():
    schema = Schema(
        rules=tuple(fake.Rule(name, fake.CONFIDENT) for name in ("a b", "a_b", "→")),
        signals=(SignalInfo("entropy"),),
        layers=("['layers'][0]['moe']", "layers_0_moe", "x//y"),
        experts=2,
    )
    table = ScalarTable(schema)
    assert table.bands == {
        "a b": ("rules/a_b/value", "rules/a_b/lower", "rules/a_b/upper"),
        "a_b": ("rules/a_b_2/value", "rules/a_b_2/lower", "rules/a_b_2/upper"),
        "→": ("rules/unnamed/value", "rules/unnamed/lower", "rules/unnamed/upper"),
    }
    assert table.tags[-4:] == (
        "signals/entropy",
        "signals/layers_0_moe/entropy",
        "signals/layers_0_moe/entropy_2",
        "signals/x/unnamed/y/entropy",
    )


def thinned(records, batch=64):
    thin = Thin()
    return [
        start + row for start in range(0, len(records), batch) for row in thin(records[start : start + batch])
    ]


def test_the_first_thousand_rows_are_all_chosen_then_twenty_a_second():
    records = fake.make_records(3_000, steps_per_second=90.0)
    records = dataclasses.replace(records, state=np.zeros_like(records.state))
    chosen = thinned(records)
    assert chosen[:1_000] == list(range(1_000))
    assert chosen[1_000:] == list(range(1_004, 3_000, 5))  # the first at least .05 s later
    assert chosen == thinned(records, batch=7)


def test_a_change_of_state_is_always_chosen():
    records = fake.make_records(3_000, steps_per_second=1e6)
    state = np.zeros_like(records.state)
    state[1_500:1_600, 2] = 1
    records = dataclasses.replace(records, state=state)
    assert thinned(records)[1_000:] == [1_500, 1_600]


def test_slow_runs_lose_no_row_and_a_clock_set_back_stops_nothing():
    records = fake.make_records(2_000, steps_per_second=20.0)
    state = np.zeros_like(records.state)
    slow = dataclasses.replace(records, state=state, wall_time=np.arange(2_000) * 0.1)
    assert len(thinned(slow)) == 2_000
    back = dataclasses.replace(slow, wall_time=np.where(np.arange(2_000) < 1_500, 1e9, 0) + slow.wall_time)
    assert len(thinned(back)) == 2_000


def test_rules_are_described_in_words():
    text = describe_rules(fake.make_schema())
    assert text.splitlines()[:3] == [
        "- **expert_specialization** (watched, threshold 0.85): "
        "`high_routing_confidence & low_activation_entropy`  ",
        "  experts become niche-specific",
        "- **load_imbalance** (risk, threshold 0.75, from step 100): "
        "`high_expert_imbalance & increasing_weight_magnitude`",
    ]
