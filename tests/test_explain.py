"""What is told of a rule, against the history, against replays, and against ramps solved by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import xarray as xr

from moe_rules_callback import Predicate, RuleAuditCallback, Rulebook, State, parse_rule
from moe_rules_callback.errors import HistoryError, MissingSignalError, UnknownNameError
from moe_rules_callback.explain import Change, Explanation, explain
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.replay import replay, replay_history

ROWS, EXPERTS = 60, 8
OWN = [
    parse_rule("0.75 :: always[4](high_routing_confidence) | increasing_loss", "mixed", kind="risk"),
    parse_rule("0.70 :: high_noise -> once(stable_loss)", "implied"),
    parse_rule("0.60 :: previously(high_noise) since[6] low_load_cv", "before", kind="health"),
    parse_rule("0.65 :: ~low_router_entropy ^ (high_noise & low_noise)", "both_ways"),
]


def sharp(confidence: Any, tokens: int = 8) -> np.ndarray:
    """Probabilities [layers, tokens, experts] whose largest one is `confidence` [layers]."""
    top = np.asarray(confidence, float)[:, None]
    rest = (1 - top) / (EXPERTS - 1)
    rows = np.concatenate([top, np.repeat(rest, EXPERTS - 1, axis=1)], axis=1)
    return np.repeat(rows[:, None], tokens, axis=1).astype(np.float32)


def history_of(run: list[dict[str, Any]], rules: Any) -> xr.Dataset:
    with RuleAuditCallback(rules, top_k=1, layer_axis=0) as audit:
        for i, metrics in enumerate(run):
            audit.on_step(metrics, step=10 * i)
        return audit.history


def steps() -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {
            "loss": np.float32(np.nan if i % 17 == 3 else 3 * np.exp(-i / 50) + random.normal(0, 0.1)),
            "noise": np.float32(random.random()),
            "params": {"w": np.full(3, 1 + i / 50, np.float32)},
            "router_probs": random.dirichlet(np.full(EXPERTS, 0.5 + i / 30), (3, 16)).astype(np.float32),
        }
        for i in range(ROWS)
    ]


@pytest.fixture(scope="module")
def run() -> list[dict[str, Any]]:
    return steps()


@pytest.fixture(scope="module")
def history(run: list[dict[str, Any]]) -> xr.Dataset:
    return history_of(run, OWN)


def of_confidence(kind: Any, *confidence: float) -> xr.Dataset:
    """One row, in which the router of each layer is this confident."""
    rule = parse_rule("0.75 :: high_routing_confidence", "sure", kind=kind)
    return history_of([{"router_probs": sharp(confidence)}], [rule])


def changed(history: xr.Dataset, row: int, change: Change, part: float = 1.0) -> xr.Dataset:
    """The history with a part of a change in it."""
    history = history.copy(deep=True)
    before, after = np.array(change.before), np.array(change.after)
    values = (before + part * (after - before)).astype(np.float32)
    signal = history["signal"].values.tolist().index(change.signal)
    layers = [history["layer"].values.tolist().index(layer) for layer in change.layers]
    history["signal_value"].transpose("step", "signal", "layer").values[
        row, signal, layers or slice(None)
    ] = values
    if not layers:
        history["signal_pooled"].transpose("step", "signal").values[row, signal] = values[0]
    return history


def state_of(history: xr.Dataset, told: Explanation) -> State:
    records = replay_history(history)
    row = history["step"].values.tolist().index(told.step)
    return State(int(records.state[row, records.schema.rule_names.index(told.rule)]))


@pytest.mark.parametrize(
    "book",
    [OWN, *(pytest.param(name, marks=pytest.mark.slow) for name in ("nano_moe", "router_health"))],
    ids=["own", "nano_moe", "router_health"],
)
def test_it_tells_the_truth_of_the_history(run: list[dict[str, Any]], book: Any) -> None:
    history = history_of(run, book)
    for number, rule in enumerate(history["rule"].values.tolist()):
        step = 10 * ((7 + 11 * number) % ROWS)
        told, row = explain(history, rule, step), history.sel(step=step, rule=rule)
        assert told.step == step
        assert told.state == int(row["state"])
        np.testing.assert_array_equal(np.array(told.truth, np.float32), row["truth"].values)
        layer = (
            row["truth_layer"].values if not told.layer else row["truth_layer"].sel(layer=told.layer).values
        )
        np.testing.assert_array_equal(
            np.broadcast_to(np.array(told.tree.truth, np.float32), layer.shape), layer
        )


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        pytest.param("mixed", 450, marks=pytest.mark.slow),
        ("implied", 400),
        pytest.param("before", 300, marks=pytest.mark.slow),
        ("both_ways", 590),
    ],
)
def test_a_change_changes_the_state_and_a_smaller_one_does_not(
    history: xr.Dataset, rule: str, step: int
) -> None:
    told = explain(history, rule, step)
    assert told.changes
    assert [c.size for c in told.changes] == sorted(c.size for c in told.changes)
    for change in told.changes:
        row = step // 10
        assert change.state != told.state
        assert state_of(changed(history, row, change), told) == change.state
        assert state_of(changed(history, row, change, 0.99), told) == told.state


TURNS = {  # value of routing_confidence at which sigmoid(12 (x - (.35 +- .05))) is .75 or .25
    State.TRUE: 0.40 + math.log(3) / 12,
    State.FALSE: 0.30 - math.log(3) / 12,
}


@pytest.mark.parametrize(
    ("kind", "confidence", "layers", "to"),
    [
        ("risk", (0.44, 0.46, 0.30), [1], State.TRUE),  # one is enough
        ("health", (0.44, 0.46, 0.60), [0, 1], State.TRUE),  # every layer has to
        ("health", (0.27, 0.46, 0.60), [0], State.FALSE),
        ("risk", (0.27, 0.28, 0.60), [2], State.UNKNOWN),
        ("risk", (0.55, 0.28, 0.60), [0, 2], State.UNKNOWN),
        (None, (0.55, 0.70, 0.60), [0], State.UNKNOWN),
    ],
)
def test_a_ramp_is_inverted(kind: Any, confidence: tuple[float, ...], layers: list[int], to: State) -> None:
    told = explain(of_confidence(kind, *confidence), "sure")
    (change,) = told.changes
    assert change.state == to
    assert change.layers == tuple(f"layer_{i}" for i in layers)
    np.testing.assert_allclose(change.before, [confidence[i] for i in layers], atol=1e-6)
    turn = TURNS[State.TRUE if to == State.UNKNOWN else to]
    np.testing.assert_allclose(change.after, turn, atol=1e-5)
    assert change.size == pytest.approx(max(abs(turn - confidence[i]) for i in layers), abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "confidence", "worst"),
    [("risk", (0.3, 0.7, 0.5), 1), ("health", (0.3, 0.7, 0.5), 0), (None, (0.45, 0.44, 0.46), 1)],
)
def test_the_worst_layer_and_its_experts(kind: Any, confidence: tuple[float, ...], worst: int) -> None:
    told = explain(of_confidence(kind, *confidence), "sure")
    assert (told.layer, told.layers) == (f"layer_{worst}", 3)
    assert told.busiest is not None
    assert told.idlest is not None
    assert (told.busiest.number, told.busiest.share, told.idlest.share) == (0, 1.0, 0.0)
    assert told.fair_share == 0.125
    assert told.tree.reading is not None
    assert told.tree.reading.value == pytest.approx(confidence[worst])


def test_values_that_cannot_be_are_not_tried() -> None:
    """An entropy of 0 is the least there is: not even that gives a lower bound of .9999."""
    rule = parse_rule("0.9999 :: low_router_entropy", "r")
    assert explain(history_of([{"router_probs": sharp([0.4])}], [rule]), "r").changes == ()


def scalars(rules: Any, **metrics: Any) -> xr.Dataset:
    return records_to_dataset(replay({name: np.asarray(x, float) for name, x in metrics.items()}, rules))


def book(text: str) -> Rulebook:
    """One risk over `up`, which is true where x is above .5."""
    rule = parse_rule(text, "r", kind="risk")
    return Rulebook("book", (rule,), {"up": Predicate("x", "high", 0.5)})


def test_what_former_rows_decided_stays() -> None:
    history = scalars(book("0.75 :: always[4](up)"), x=[1, 1, 0.1, 1, 1])
    told = explain(history, "r")
    assert told.state == State.FALSE
    assert told.changes == ()
    assert told.tree.note == "rows since step 1; lower bound lowest at step 2"
    assert told.layer == ""
    assert "None of the values tried for one signal in this row changes the state." in str(told)
    assert "The rule looks back. Only this row was varied; what former rows left behind stayed." in told.notes


@pytest.mark.parametrize(
    ("text", "x", "note"),
    [
        ("once[3](up)", [0, 1, 0], "rows since step 0; lower bound highest at step 1"),
        ("always[5](up)", [1, 1, 1], "rows since step 0, and 2 before the run that count as unknown; lower "
         "bound lowest at step 0"),
        ("previously(up)", [0, 1, np.nan, 0], "as it was at step 1"),
        ("previously(up)", [0], "no row before"),
        ("once[2](up)", [0, 1, np.nan, 0], "rows since step 2; lower bound highest at step 3"),
        ("up since[2] up", [0, 1, 1], "rows since step 1"),
    ],
)  # fmt: skip
def test_what_a_window_rests_on(text: str, x: list[float], note: str) -> None:
    told = explain(scalars(book(text), x=x), "r", len(x) - 1)
    assert told.tree.note == note


def test_a_value_that_is_not_finite_is_said() -> None:
    told = explain(scalars(book("up"), x=[1, np.nan]), "r", 1)
    assert told.truth == (0, 1)
    assert "Not finite in this row: x. What rests on it is unknown, [0, 1]." in told.notes
    assert told.changes == ()
    json.dumps(told.to_dict(), allow_nan=False)


def test_it_finds_rule_and_step_itself() -> None:
    history = scalars(book("up"), x=[0, 0, 1, 1])
    told = explain(history)
    assert (told.rule, told.step) == ("r", 2)
    assert told.notes == ("Rules that fired, by the step where they first did: r (step 2).",
                          "This is where it first fired.")  # fmt: skip
    assert explain(scalars(book("up"), x=[0, 0]), "r").notes == ("It never fired; last row.",)


def test_a_step_between_rows() -> None:
    told = explain(of_confidence("risk", 0.6), "sure", 4)
    assert told.step == 0
    assert "Step 4 was not recorded; step 0 is the nearest." in told.notes


def test_a_step_before_the_warm_up() -> None:
    early = replace(book("up"), rules=(replace(book("up").rules[0], warmup=9),))
    assert "It warms up until step 9 and does not fire before." in explain(scalars(early, x=[1]), "r").notes


def test_a_record_that_its_signals_do_not_give() -> None:
    history = scalars(book("up"), x=[0, 1])
    history["truth"].values[:] = 0.5
    assert (
        explain(history, "r", 1).notes[0].startswith("The record of this step says [0.50, 0.50], which its")
    )


def test_what_cannot_be_explained() -> None:
    history = scalars(book("up"), x=[0, 0])
    with pytest.raises(
        HistoryError, match=r"no rule fired in this run, so which one is to be explained\? Name one: r\."
    ):
        explain(history)
    with pytest.raises(UnknownNameError, match="has no rule 'q'"):
        explain(history, "q")
    with pytest.raises(HistoryError, match="the history has no rows"):
        explain(history.isel(step=slice(0)))
    with pytest.raises(MissingSignalError, match="rule 'r' needs the signal 'x'"):
        explain(history.isel(signal=slice(0)), "r")


def test_as_text_and_as_json() -> None:
    told = explain(of_confidence("health", 0.44, 0.46, 0.6), "sure")
    assert (
        str(told)
        == """\
sure at step 0: UNKNOWN [0.62, 0.84]
  0.75 :: high_routing_confidence
  A health rule: TRUE if every layer's lower bound is at least 0.75, FALSE if one layer's upper bound is at \
most 0.25.

In layer 'layer_0', the worst of 3:
[0.62, 0.84]  high_routing_confidence
                routing_confidence = 0.44; high above 0.35, over a range of 1
  Expert 0 has the largest share there, 100.0%, and expert 1 the smallest, 0.0%; a fair share is 12.5%.

Smallest change of one signal in this row that would have changed the state, least first:
  routing_confidence 0.44 -> 0.4916 in 'layer_0', 0.46 -> 0.4916 in 'layer_1', all of them: TRUE, by 0.052 \
of its range

It never fired; last row."""
    )
    data = json.loads(json.dumps(told.to_dict(), allow_nan=False))
    assert (data["state"], data["layer"]) == ("unknown", "layer_0")
    assert data["changes"][0]["state"] == "true"
    assert data["tree"]["reading"]["ramp"]["offset"] == 0.35
