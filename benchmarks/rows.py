"""Rows of a make-believe run, as the audit hands them to sinks: for benchmarks of what comes after it.

    source = Source(rules=6, layers=4, experts=8)
    records = source(first=128, rows=64)             # rows 128 .. 191

Values repeat after `VARIETY` rows, so that making them costs nothing beside what receives them; steps and
times go on. Truths are noisy as measured ones are, and far from their thresholds: states do not flicker.
"""

from __future__ import annotations

import numpy as np

from moe_rules_callback.formula import Connective, Rule, Var
from moe_rules_callback.records import ARRAYS, Records, Schema, SignalInfo, State

VARIETY = 1024
LOCAL = (
    "router_entropy",
    "routing_confidence",
    "router_mutual_information",
    "expert_imbalance",
    "load_cv",
    "dead_expert_fraction",
    "load_cv_living",
    "load_cv_normalised",
    "boundary_margin",
    "weight_norm",
    "routing_accuracy",
    "expert_coactivation",
)  # fmt: skip; signals by layer, about as many as the book `router_health` records
STARTED = 1.7e9  # seconds since the epoch

FORMULA = Connective("and", (Var("high_routing_confidence"), Var("low_router_entropy")))


def make_schema(rules: int, layers: int, experts: int) -> Schema:
    """One global signal, the loss, and the others by layer; every third rule is a risk."""
    kinds = ("health", None, "risk")
    return Schema(
        tuple(Rule(f"rule_number_{i:03d}", FORMULA, kind=kinds[i % 3]) for i in range(rules)),
        (SignalInfo("loss", per_layer=False), *map(SignalInfo, LOCAL)),
        tuple(f"block_{i}/moe" for i in range(layers)),
        experts,
        routers=((experts, 2),) * layers,
    )


class Source:
    """Makes rows of one width.

    Args:
        rules, layers, experts: the width.
        steps_per_second: of the make-believe run.

    Attributes:
        schema: of the records.
        width: in words.
    """

    def __init__(self, rules: int, layers: int, experts: int, steps_per_second: float = 200.0) -> None:
        self.schema, self._rate = make_schema(rules, layers, experts), steps_per_second
        self.width = f"{rules} rules, {layers} layers, {experts} experts"
        random = np.random.default_rng(0)
        variety = VARIETY if layers * experts < 1024 else VARIETY // 8
        middle = np.resize([0.95, 0.5, 0.1], rules)[:, None] + 0.02 * random.normal(size=(variety, 1, layers))
        truth = np.clip(np.stack([middle - 0.03, middle + 0.03], axis=-1), 0, 1)
        state = np.resize([State.TRUE, State.UNKNOWN, State.FALSE], rules).astype(np.int8)
        signal = random.normal(0.5, 0.1, (variety, 1 + len(LOCAL), layers)).astype(np.float32)
        self._block = Records(
            self.schema,
            step=np.arange(variety),
            state=np.broadcast_to(state, (variety, rules)).copy(),
            truth_layer=truth.astype(np.float32),
            signal_value=signal,
            signal_pooled=signal.mean(axis=2),
            expert_share=random.dirichlet(np.full(experts, 40.0), (variety, layers)).astype(np.float32),
            wall_time=np.zeros(variety),
        )

    def __call__(self, first: int, rows: int) -> Records:
        """Rows `first` .. `first + rows - 1` of the run."""
        step = np.arange(first, first + rows, dtype=np.int64)
        values = self._block[step % len(self._block)]
        told = {name: getattr(values, name) for name in ARRAYS}
        return Records(self.schema, **told | {"step": step, "wall_time": STARTED + step / self._rate})
