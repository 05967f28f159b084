"""What can be turned wrong in a step, as numbers that the compiled step takes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

OFF, ON = np.bool_(False), np.bool_(True)


class Knobs(NamedTuple):
    """Scalars, NumPy's or traced; the defaults change nothing."""

    # The router
    expert_bias: Any = np.float32(0)  # added to the logits of expert 0
    logit_scale: Any = np.float32(1)
    low_precision: Any = OFF  # logits rounded to bfloat16
    noise_frozen: Any = OFF  # the same noise at every step
    noise_off: Any = OFF
    gate_ignored: Any = OFF  # experts are added up with weight 1
    gate_renormalised: Any = OFF  # over the k chosen
    index_shift: Any = np.int32(0)  # tokens go to the expert so many further on
    capacity_factor: Any = np.float32(np.inf)  # at most that of the configuration

    # The learner
    balance: Any = np.float32(1)  # times the weight of the balancing loss
    balance_pooled: Any = OFF  # the balancing loss sees all layers as one
    learning_rate: Any = np.float32(1)  # times that of the schedule
    experts_merged: Any = OFF  # before the step, all experts become expert 0
    labels_shuffled: Any = OFF

    # What is told about the step
    loss_told: Any = np.float32(1)  # times the loss
    counters_told: Any = np.float32(1)  # times what was counted: balancing loss, dropped tokens


def turned(**values: Any) -> Knobs:
    """The healthy knobs but for those named, in the types that a compiled step expects."""
    healthy = Knobs()
    return healthy._replace(**{name: type(getattr(healthy, name))(value) for name, value in values.items()})
