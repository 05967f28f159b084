"""What the training loop is asked, and when it sees it."""

from __future__ import annotations

import threading

import pytest
from collector import RULES, make

from moe_rules_callback import load_rules
from moe_rules_callback.actions import RequestCheckpoint, StopTraining
from moe_rules_callback.actions.agreement import Requests


def test_should_stop_stays_true(caplog):
    with make(actions=[StopTraining("warning", after=2)], dry_run=False, flush_every=1) as audit:
        seen = []
        for x in (-1, 0, -1, -1, 0, -1, -1):
            audit.on_step({"x": x})
            audit.flush()
            seen.append(audit.should_stop)
        assert not audit.should_checkpoint
    assert seen == [False] * 3 + [True] * 4
    assert audit.should_stop
    told = [message for message in caplog.messages if message.startswith("asks")]
    assert told == ["asks to stop training, at step 3: rule 'hot' has fired in 2 rows in a row"]


def test_should_checkpoint_is_true_until_the_step_after_it_was_read(caplog):
    asks = RequestCheckpoint(cooldown=0)
    with make(actions=[asks], dry_run=False, flush_every=1) as audit:

        def step(x: float) -> None:
            audit.on_step({"x": x})
            audit.flush()

        step(0.0)
        assert not audit.should_checkpoint
        step(-1.0)
        step(0.0)  # was not read
        assert audit.should_checkpoint
        assert audit.should_checkpoint
        step(0.0)
        assert not audit.should_checkpoint
        step(-1.0)
        step(0.0)
        step(-1.0)
        assert audit.should_checkpoint  # two requests, one checkpoint
        step(0.0)
        assert not audit.should_checkpoint
    assert "asks to save a checkpoint, at step 1: rule 'hot' fires" in caplog.messages


def test_a_request_after_the_last_was_read_is_not_lost():
    requests = Requests(4)
    requests.ask("checkpoint")
    assert requests.checkpoint
    requests.ask("checkpoint")  # while the loop saves
    requests.step()
    assert requests.checkpoint
    requests.step()
    assert not requests.checkpoint


def test_requests_of_many_threads():
    requests, served = Requests(4), 0
    threads = [
        threading.Thread(target=lambda: [requests.ask("checkpoint") for _ in range(500)]) for _ in "1234"
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        served += requests.checkpoint
        requests.step()
    served += requests.checkpoint
    assert served
    assert requests._asked["checkpoint"] == requests._read == 2000
    requests.step()
    assert not requests.checkpoint


@pytest.mark.parametrize("dry_run", [True, False])
def test_inside_the_step(dry_run):
    actions = [StopTraining("warning"), RequestCheckpoint()]
    with make(actions=actions, dry_run=dry_run, flush_every=1) as audit:
        state, asked = audit.init({"x": 0.0}), []
        for x in (0, -1, 0, 0):
            state = audit.update(state, {"x": x})
            audit.drain(state)
            audit.flush()
            asked.append((audit.should_checkpoint, audit.should_stop))
    live = not dry_run
    assert asked == [(False, False), (live, live), (False, live), (False, live)]


def test_rules_of_the_shipped_book_can_stop_training():
    """The default severity of StopTraining is one that the default rules have."""
    assert any(rule.severity == "error" and rule.kind for rule in load_rules(None).rules)
    assert all(rule.severity == "warning" for rule in RULES.rules)
