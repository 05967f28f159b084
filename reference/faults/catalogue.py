"""The faults: what each turns, when, and which illness a doctor should name.

    fault = find("dead_expert")
    fault.knobs(age), fault.text(age)    # of the step that comes `age` steps after the onset

A fault whose nature is from the start sets in at step 0, the others at step 200.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from ..config import ConfigError
from .knobs import Knobs, turned

LATE = 200
Turns = Mapping[str, Any]


@dataclass(frozen=True)
class Fault:
    """One way in which training goes wrong.

    Attributes:
        name: on the command line and in the table of runs.
        illness: what it should be called; several faults may share one. "" for what is harmless.
        description: in a line.
        turns: the knobs that it turns, by the number of steps since its onset.
        onset: step at which it sets in unless somebody says otherwise.
        shows: whether signals can be expected to separate it from health.
        text: the steps' text, by the number of steps since the onset: "train", "held_out" or "tables".
        needs: settings without which it is not this fault.
    """

    name: str
    illness: str
    description: str
    turns: Callable[[int], Turns]
    onset: int = 0
    shows: bool = True
    text: Callable[[int], str] = lambda age: "train"
    needs: Mapping[str, Any] = field(default_factory=dict)

    def knobs(self, age: int) -> Knobs:
        """Those of a step so many steps after the onset."""
        return turned(**self.turns(age))


def find(name: str) -> Fault:
    """The fault of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in FAULTS:
        near = "".join(f" Did you mean {match}?" for match in get_close_matches(name, FAULTS, 1))
        raise ConfigError(f"There is no fault {name!r}.{near} There are: {', '.join(FAULTS)}.")
    return FAULTS[name]


def _always(**knobs: Any) -> Callable[[int], Turns]:
    return lambda age: knobs


def _spike(age: int) -> Turns:
    return {"learning_rate": 30.0} if age < 20 else {}


def _restart(peak: float) -> Callable[[int], Turns]:
    """The learning rate starts again at `peak` times what it is, and comes back within 150 steps."""
    return lambda age: {"learning_rate": 1 + (peak - 1) * max(0.0, 1 - age / 150)}


def _evaluating(age: int) -> bool:
    return age % 8 == 3  # never when the probe is due, which would see a router without noise


_ALL = (
    Fault("no_balancing", "weak_balancing", "the balancing loss is left out", _always(balance=0.0)),
    Fault("no_balancing_fast", "router_collapse", "no balancing loss, and four times the learning rate",
          _always(balance=0.0, learning_rate=4.0)),
    Fault("negative_balancing", "router_collapse", "the balancing loss has the wrong sign",
          _always(balance=-1.0)),
    Fault("dead_expert", "dead_expert", "a bias of -10 keeps all tokens from expert 0",
          _always(expert_bias=-10.0), LATE),
    Fault("frozen_router", "starved_router", "the gate's weight is not applied, so the task does not reach "
          "the router", _always(gate_ignored=True)),
    Fault("top1_renormalised", "starved_router", "with one expert a token, a renormalised gate is always 1",
          _always(gate_renormalised=True), needs={"top_k": 1}),
    Fault("balancing_x1000", "aux_dominated", "the balancing loss weighs a thousand times too much",
          _always(balance=1000.0)),
    Fault("logits_x20", "router_saturation", "the router's logits are twenty times too large",
          _always(logit_scale=20.0), LATE),
    Fault("same_noise", "noise_reuse", "the same random key, so the same router noise, at every step",
          _always(noise_frozen=True)),
    Fault("capacity_half", "capacity_overflow", "experts have places for half of their tokens",
          _always(capacity_factor=0.5)),
    Fault("bfloat16_router", "imprecise_router", "the router's logits are rounded to bfloat16",
          _always(low_precision=True)),
    Fault("learning_rate_x30", "lr_shock", "thirty times the learning rate for 20 steps", _spike, LATE),
    Fault("restart_collapse", "lr_shock", "the learning rate starts again ten times too high, without a "
          "warm-up", _restart(10.0), LATE),
    Fault("identical_experts", "duplicated_experts", "all experts begin with the same weights",
          lambda age: {"experts_merged": age == 0}),
    Fault("shuffled_labels", "label_corruption", "labels are shuffled within a batch",
          _always(labels_shuffled=True), LATE),
    Fault("data_shift", "data_shift", "batches hold nothing but tables of character codes",
          _always(), LATE, text=lambda age: "tables"),
    Fault("index_shift", "misrouted_experts", "tokens go to the expert after the one that was chosen",
          _always(index_shift=1), LATE),
    Fault("pooled_balancing", "weak_balancing", "the balancing loss is pooled over layers, so that one may "
          "make up for another", _always(balance_pooled=True)),
    Fault("doubled_counters", "wrong_telemetry", "counters run again when the forward pass is repeated for "
          "the backward pass: balancing loss and dropped tokens are told twice as large",
          _always(counters_told=2.0)),
    Fault("misreported_loss", "wrong_telemetry", "the loss of four accumulated micro-batches is told as "
          "their sum", _always(loss_told=4.0)),
    Fault("evaluation_rows", "wrong_telemetry", "every eighth row is a held-out batch, without noise, from "
          "which nothing is learned",
          lambda age: {"learning_rate": 0.0, "noise_off": True} if _evaluating(age) else {},
          text=lambda age: "held_out" if _evaluating(age) else "train", shows=False),
    Fault("gentle_restart", "", "the learning rate starts again at twice what it is; harmless",
          _restart(2.0), LATE),
    Fault("strong_balancing", "", "twice the balancing loss; harmless", _always(balance=2.0)),
)  # fmt: skip
FAULTS = {fault.name: fault for fault in _ALL}
