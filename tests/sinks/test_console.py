from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence

import fake_records as fake
import numpy as np
import pytest

from moe_rules_callback.records import Records, State
from moe_rules_callback.sinks import ConsoleSink


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def scripted(states: Sequence[Sequence[int]], steps_per_second: float = 10.0) -> Records:
    """Two rules whose states are given row by row; their intervals are [.87, .95] and [0, 1]."""
    records = fake.make_records(
        len(states), fake.make_schema(1, rules=fake.RULES[:2]), steps_per_second=steps_per_second
    )
    truth = np.array([[0.87, 0.95], [0, 1]], np.float32)[None, :, None]
    truth = np.broadcast_to(truth, records.truth_layer.shape)
    signals = np.full_like(records.signal_pooled, 2.31)
    return dataclasses.replace(
        records, state=np.array(states, np.int8), truth_layer=truth, signal_pooled=signals
    )


def output(records: Records, batch: int, stream: io.StringIO, **options) -> list[str]:
    fake.feed(ConsoleSink(stream, **options), records, fake.make_run(schema=records.schema), batch=batch)
    return stream.getvalue().split("\n")


def test_a_line_for_every_flush_in_which_a_state_changed():
    quiet, risen = [State.UNKNOWN, State.UNKNOWN], [State.TRUE, State.UNKNOWN]
    gone = [State.FALSE, State.CONTRADICTORY]
    lines = output(scripted([quiet] * 3 + [risen] * 5 + [gone] * 4), 2, io.StringIO())
    assert lines == [
        "step 3  loss 2.31  +expert_specialization TRUE [.87, .95]",
        "step 9  loss 2.31  -expert_specialization FALSE [.87, .95]  "
        "!load_imbalance CONTRADICTORY [.00, 1.00]",
        "ended at step 11  10/s  loss 2.31  1 false  1 contradictory",
        "",
    ]


def test_a_state_that_flaps_does_not_flood_a_file():
    states = [[State.TRUE if row % 2 else State.FALSE, State.UNKNOWN] for row in range(3_000)]
    lines = output(scripted(states), 1, io.StringIO())  # five minutes
    changes = [line for line in lines if "expert_specialization" in line]
    assert len(changes) == 20 + 29  # the first twenty, then one in ten seconds


def test_many_changes_make_one_short_line():
    schema = fake.make_schema(1, rules=fake.many_rules(100))
    records = fake.make_records(2, schema)
    records.state[:] = State.FALSE
    first, *_ = output(records, 2, io.StringIO())
    assert first.count("FALSE") == 6
    assert first.endswith("and 94 more")


def test_a_terminal_has_a_live_line_that_lasting_lines_replace(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    quiet, risen = [State.UNKNOWN, State.UNKNOWN], [State.TRUE, State.UNKNOWN]
    first, last, _ = output(scripted([quiet] * 4 + [risen] * 4), 2, Terminal(), total_steps=16)
    live = first.split("\r")
    assert live[1] == "step 1 of 16 (12%)  10/s  loss 2.31  2 unknown\x1b[K"
    assert live[-1] == "\x1b[Kstep 5  loss 2.31  +expert_specialization TRUE [.87, .95]"
    assert last.split("\r")[-1].startswith("\x1b[Kended at step 7 of 16 (50%)  10/s")
    assert all(len(part.removesuffix("\x1b[K")) < 60 for part in live[1:3])


def test_a_pipe_gets_no_control_characters():
    text = "\n".join(output(fake.make_records(200), 10, io.StringIO()))
    assert "\r" not in text
    assert "\x1b" not in text


def test_a_run_without_loss_and_a_run_without_rows():
    records = fake.make_records(4)
    schema = dataclasses.replace(records.schema, signals=records.schema.signals[1:])
    without = dataclasses.replace(records, schema=schema, signal_pooled=records.signal_pooled[:, 1:])
    assert "loss" not in "".join(output(without, 2, io.StringIO()))
    assert output(records[:0], 2, io.StringIO()) == [""]


def test_standard_error_is_the_default(capsys):
    fake.feed(ConsoleSink(), fake.make_records(4), fake.make_run())
    out, err = capsys.readouterr()
    assert out == ""
    assert "ended at step 3" in err


@pytest.mark.parametrize("truth", [0.999, 1.0])
def test_short_numbers(truth):
    from moe_rules_callback.sinks.console import _short

    assert _short(truth) == "1.00"
    assert _short(0.066) == ".07"
