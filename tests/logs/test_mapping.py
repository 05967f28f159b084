"""Columns become signals by their names; the user has the last word."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_rules_callback.errors import LogError
from moe_rules_callback.logs import Log, SignalMapping, map_columns
from moe_rules_callback.logs.mapping import SHOWN
from moe_rules_callback.logs.names import SYNONYMS, guess, load_layer
from moe_rules_callback.signals import SCALAR_RAMPS, shipped

SHARES = [0.5, 0.25, 0.125, 0.125]


def log(columns: dict[str, Any]) -> Log:
    arrays = {name: np.array([values, values], float) for name, values in columns.items()}
    return Log(Path("log.jsonl"), "json", np.arange(2), "step", arrays, ())


def mapped(columns: dict[str, Any], maps: Iterable[str] = (), **options: Any) -> SignalMapping:
    return map_columns(log(columns), maps, **options)


def targets(mapping: SignalMapping) -> dict[str, str]:
    return {each.column: each.target for each in mapping.assignments}


@pytest.mark.parametrize(
    ("name", "signal"),
    [
        ("loss", "loss"), ("train/loss", "loss"), ("metrics.loss", "loss"), ("Loss", "loss"),
        ("routing_acc", "routing_accuracy"), ("entropy", "router_entropy"),
        ("moe/router/entropy", "router_entropy"),
        ("train/gradNorm", "gradient_norm"), ("lr", "learning_rate"), ("z_loss", "router_z_loss"),
        ("load_cv", "load_cv"), ("router_mutual_information", "router_mutual_information"),
        ("eval/loss", None), ("val_loss", None), ("accuracy", None), ("layer_0/entropy", None), ("", None),
    ],
)  # fmt: skip
def test_names_that_logs_use(name: str, signal: str | None):
    guessed = guess(name)
    assert (guessed and guessed[0]) == signal


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("utilization", ""), ("expert", ""), ("metrics.expert_utilization", ""), ("train/moe/load", ""),
        ("utilization.block_0", "block_0"), ("layer_3/moe/expert_load", "layer_3"),
        ("encoder/load", "encoder"),
        ("layers.3.load", "layers_3"), ("load.0", "0"),
    ],
)  # fmt: skip
def test_names_of_loads_and_their_layers(name: str, layer: str):
    guessed = load_layer(name)
    assert guessed is not None
    assert guessed[1] == layer


@pytest.mark.parametrize("name", ["eval/load", "confusion_matrix", "gpu_memory", "val.utilization"])
def test_lists_that_are_no_loads(name: str):
    assert load_layer(name) is None


def test_synonyms_mean_signals_that_exist():
    own = {"routing_accuracy", "learning_rate", "loss"}
    assert SYNONYMS.keys() - own <= {*shipped(), *SCALAR_RAMPS}
    words = [word for words in SYNONYMS.values() for word in words.split()]
    assert len(words) == len(set(words))


def test_the_log_of_the_visualisation_tool():
    mapping = mapped(
        {
            "routing_acc": 0.58,
            "entropy": 1.3,
            "utilization": SHARES,
            "metrics.accuracy": 0.4,
            "metrics.loss": 2.5,
        }
    )
    assert targets(mapping) == {
        "routing_acc": "routing_accuracy",
        "entropy": "router_entropy",
        "utilization": "expert_load",
        "metrics.accuracy": "metrics_accuracy",
        "metrics.loss": "loss",
    }
    assert mapping.metrics["router_entropy"] == pytest.approx([1.3 / np.log(4)] * 2)
    assert mapping.metrics["expert_load"]["router"].tolist() == [SHARES, SHARES]
    assert (mapping.experts, mapping.top_k) == (4, 1)
    assert mapping.notes == ("experts per token are not known: 1 is assumed; say --top-k K if it is more",)


def test_the_table_says_what_was_made_of_each_column():
    text = str(mapped({"entropy": 1.3, "utilization": SHARES, "matrix": [1, 2], "lr": 1e-3}, ["lr=-"]))
    assert text.splitlines() == [
        "column       signal          unit    why",
        "entropy      router_entropy  nats    its name; up to 1.300, at most ln 4 = 1.386",
        "utilization  expert_load     shares  its name, lists of 4",
        "matrix       -               -       lists of 2; if they are loads: --map 'matrix=expert_load'",
        "lr           -               -       as told",
    ]


def test_a_table_of_many_columns_stays_short():
    text = str(mapped({f"own_{i}": 1.0 for i in range(SHOWN + 30)}))
    assert text.endswith("and 30 more columns under their own names")
    assert len(text.splitlines()) == SHOWN + 2


def test_the_user_has_the_last_word():
    mapping = mapped(
        {"entropy": 1.3, "ent2": 0.5, "loss": 2.0, "my loss": 3.0, "xs": SHARES, "utilization": SHARES},
        ["ent2=router_entropy:share", "loss=-", "my loss=loss", "xs=expert_load/block_0"],
    )
    assert targets(mapping) == {
        "entropy": "entropy",
        "ent2": "router_entropy",
        "loss": "-",
        "my loss": "loss",
        "xs": "expert_load/block_0",
        "utilization": "-",
    }
    assert mapping.metrics["loss"].tolist() == [3, 3]
    assert list(mapping.metrics["expert_load"]) == ["block_0"]


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (["entropy"], "--map 'entropy' is not of the form column=signal, column=signal:unit or column=-"),
        (["=loss"], "is not of the form"),
        (["entrpy=loss"], "no column 'entrpy'. Did you mean entropy? There are: entropy, load, x."),
        (["entropy=router_entropy:grams"], "'grams' is no unit of router_entropy. It has: nats, bits,"),
        (["x=loss:nats"], "'nats' is no unit of loss. It has but one: leave the unit out."),
        (["x=my loss"], "'my loss' is no name that a rule can speak"),
        (["x=loss/block_0"], "'loss/block_0' is no name that a rule can speak"),
        (["load=loss"], "the column holds lists of 4, and only expert_load is one"),
        (["x=expert_load"], "expert_load has a number for each expert, the column a single one"),
        (["x=router_probs"], "router_probs is an array of the training step, which no log holds"),
        (["x=loss", "entropy=loss"], "--map names two columns for loss. Give one"),
        (["x=-", "load=-", "entropy=-"], "no column is left to replay. Map one: --map COLUMN=SIGNAL"),
        (["x=router_entropy"],
         "column 'x' has values 0.5 .. 0.5: nats, bits, or already a share of the maximum? "
         "Say --map 'x=router_entropy:UNIT' with :nats or :bits or :share, or leave it out: --map 'x=-'"),
    ],
)  # fmt: skip
def test_maps_that_cannot_be(maps: list[str], message: str):
    with pytest.raises(LogError) as caught:
        mapped({"entropy": 1.3, "load": SHARES, "x": 0.5}, maps)
    text = str(caught.value)
    assert message in text
    assert "\n" not in text


def test_a_unit_that_cannot_be_told_is_asked_for():
    with pytest.raises(
        LogError, match=r"column 'entropy' has values 0.7 .. 0.7: nats, bits, or already"
    ) as caught:
        mapped({"entropy": 0.7, "utilization": SHARES})
    assert "--map 'entropy=router_entropy:UNIT' with :nats or :bits or :share" in str(caught.value)
    told = mapped({"entropy": 0.7, "utilization": SHARES}, ["entropy=router_entropy:nats"])
    assert told.metrics["router_entropy"] == pytest.approx([0.7 / np.log(4)] * 2)


def test_experts_that_do_not_fit_the_loads():
    with pytest.raises(LogError, match=r"8 experts do not fit loads of 4. Leave --experts out"):
        mapped({"load": SHARES}, experts=8)


def test_layers():
    mapping = mapped({"load.block_1": SHARES, "load.block_0": SHARES, "load": [1, 2, 3, 4]})
    assert targets(mapping) == {
        "load.block_1": "expert_load/block_1",
        "load.block_0": "expert_load/block_0",
        "load": "-",
    }
    assert mapping.experts == 4


def test_of_two_columns_for_one_signal_the_surer_name_wins():
    mapping = mapped(
        {"train/loss": 1.0, "loss": 2.0, "total_loss": 3.0, "counts": [1, 2], "expert_load": [3, 4]}
    )
    assert targets(mapping) == {
        "train/loss": "train_loss",
        "loss": "loss",
        "total_loss": "total_loss",
        "counts": "-",
        "expert_load": "expert_load",
    }


def test_losses_with_a_coefficient_in_them_are_no_signals():
    mapping = mapped({"aux_loss": 0.011, "z_loss": 0.02, "load_balancing_loss": 0.01})
    assert targets(mapping) == {
        "aux_loss": "aux_loss",
        "z_loss": "z_loss",
        "load_balancing_loss": "load_balancing_loss_logged",
    }
    assert targets(mapped({"aux_loss": 1.1, "z_loss": 6.0})) == {
        "aux_loss": "load_balancing_loss",
        "z_loss": "router_z_loss",
    }


def test_own_names_can_be_spoken_and_mean_nothing_else():
    names = {"a.b": "a_b", "a b": "a_b_2", "7th": "_7th", "é": "column", "params": "params_logged"}
    names |= {"loss": "loss", "eval/loss": "eval_loss", "routing_acc": "routing_acc"}
    values = dict.fromkeys(names, 1.0) | {"routing_acc": -5.0}
    assert targets(mapped(values)) == names


@pytest.mark.parametrize(
    ("load", "unit", "top_k"),
    [
        (SHARES, "shares", None),
        ([50, 25, 12.5, 12.5], "percent", None),
        ([400, 200, 300, 100], "counts", None),
        ([0.75, 0.5, 0.5, 0.25], "shares of tokens", 2),
    ],
)
def test_what_loads_count(load: list[float], unit: str, top_k: int | None):
    mapping = mapped({"load": load})
    assert (mapping.assignments[0].unit, mapping.top_k) == (unit, top_k or 1)
    assert bool(mapping.notes) == (top_k is None)
    assert mapped({"load": load}, top_k=3).top_k == 3
    assert mapped({"load": load}, top_k=3).notes == ()
