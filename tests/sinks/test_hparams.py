from __future__ import annotations

import dataclasses

import fake_records as fake
import numpy as np
import pytest

from moe_rules_callback.records import State
from moe_rules_callback.sinks.hparams import Standing, session_start, settings

WATCHED = fake.Rule("watched", fake.CONFIDENT)
RISK = fake.Rule("risk", fake.CONFIDENT, kind="risk")
HEALTH = fake.Rule("good health", fake.CONFIDENT, kind="health", warmup=60)


def test_standing_is_the_last_state_and_the_share_of_rows_fired():
    records = fake.make_records(200, fake.make_schema(rules=(WATCHED, RISK, HEALTH)))
    records.state[:] = np.random.default_rng(0).integers(0, 4, records.state.shape)
    standing, ends = Standing(records.schema), {}
    for start in range(0, 200, 64):
        ends = dict(standing(records[start : start + 64]))
    assert list(ends) == [
        f"{what}/{name}" for what in ("final", "fired") for name in ("watched", "risk", "good_health")
    ]
    assert [ends["final/watched"], ends["final/risk"], ends["final/good_health"]] == records.state[
        -1
    ].tolist()
    true = sum(state == State.TRUE for state in records.state[:, 1])
    false = sum(state == State.FALSE for state in records.state[60:, 2])
    assert ends["fired/watched"] == 0
    assert ends["fired/risk"] == pytest.approx(true / 200)
    assert ends["fired/good_health"] == pytest.approx(false / 140)


def test_nothing_has_fired_before_the_warm_up_is_over():
    records = fake.make_records(30, fake.make_schema(rules=(HEALTH,)))
    records.state[:] = State.FALSE
    assert dict(Standing(records.schema)(records))["fired/good_health"] == 0


def test_config_is_flattened():
    config = {"lr": 1e-3, "model": {"layers": 4, "moe": {"top_k": 2}}, "tags": ["a"], "empty": {}}
    told = settings(fake.make_run(config=config))
    del told["rulebook"]
    assert told == {"lr": 1e-3, "model.layers": 4, "model.moe.top_k": 2, "tags": ["a"]}


def test_rulebook_tells_rules_apart_but_not_their_descriptions():
    def rulebook(**change):
        rules = (dataclasses.replace(fake.RULES[0], **change), *fake.RULES[1:])
        return settings(fake.make_run(schema=fake.make_schema(rules=rules)))["rulebook"]

    assert rulebook() == rulebook(description="told otherwise")
    assert rulebook().startswith("6 rules, ")
    others = {
        rulebook(threshold=0.9),
        rulebook(kind="health"),
        rulebook(warmup=5),
        rulebook(formula=fake.DECISIVE),
    }
    assert len(others | {rulebook()}) == 5


def test_values_keep_their_kind():
    pytest.importorskip("tensorboard")
    from tensorboard.plugins.hparams import metadata

    given = {
        "lr": np.float32(0.5),
        "on": np.bool_(True),
        "off": False,
        "name": "x",
        "shape": (2, 3),
        "none": None,
    }
    summary = session_start(given, 17.0)
    assert summary.value[0].tag == metadata.SESSION_START_INFO_TAG
    start = metadata.parse_session_start_info_plugin_data(summary.value[0].metadata.plugin_data.content)
    kinds = {name: value.WhichOneof("kind") for name, value in start.hparams.items()}
    assert kinds == {
        "lr": "number_value", "on": "bool_value", "off": "bool_value", "name": "string_value",
        "shape": "string_value", "none": "string_value",
    }  # fmt: skip
    assert start.hparams["lr"].number_value == 0.5
    assert start.start_time_secs == 17.0
