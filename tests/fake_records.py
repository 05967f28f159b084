"""Records of a make-believe training run, from NumPy alone: a router that goes from chance to structure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moe_rules_callback.formula import Connective, Not, Rule, Var
from moe_rules_callback.records import Records, Run, Schema, SignalInfo, State

CONFIDENT, DECISIVE, IMBALANCED = (
    Var("high_routing_confidence"),
    Var("low_activation_entropy"),
    Var("high_expert_imbalance"),
)
RULES = (
    Rule("expert_specialization", Connective("and", (CONFIDENT, DECISIVE)), 0.85,
         "0.85 :: high_routing_confidence & low_activation_entropy",
         description="experts become niche-specific"),
    Rule("load_imbalance", Connective("and", (IMBALANCED, Var("increasing_weight_magnitude"))), 0.75,
         "0.75 :: high_expert_imbalance & increasing_weight_magnitude", kind="risk", warmup=100),
    Rule("routing_stability", Connective("and", (CONFIDENT, Var("stable_loss"))), 0.8,
         "0.80 :: high_routing_confidence & stable_loss"),
    Rule("learning_progress", Connective("and", (Var("decreasing_loss"), DECISIVE)), 0.7,
         "0.70 :: decreasing_loss & low_activation_entropy"),
    Rule("underutilized_experts", Connective("and", (Not(DECISIVE), Not(CONFIDENT))), 0.65,
         "0.65 :: ~low_activation_entropy & ~high_routing_confidence", kind="risk"),
    Rule("healthy_specialization", Connective("and", (DECISIVE, Not(IMBALANCED))), 0.75,
         "0.75 :: low_activation_entropy & ~high_expert_imbalance"),
)  # fmt: skip
LEVELS = (0.95, 0.35, 0.8, 0.7, 0.08, 0.88)  # where the truth of the six settles
SIGNALS = (
    SignalInfo("loss", "training loss", "nat", per_layer=False),
    SignalInfo("router_entropy", "routing entropy over its maximum"),
    SignalInfo("routing_confidence", "mean of the largest routing probability"),
)


def make_schema(layers: int = 2, experts: int = 4, rules: tuple[Rule, ...] = RULES) -> Schema:
    names = tuple(f"block_{index}/moe" for index in range(layers))
    return Schema(rules, SIGNALS, names, experts, routers=((experts, 2),) * layers)


def many_rules(count: int) -> tuple[Rule, ...]:
    return tuple(Rule(f"rule_number_{index:03d}", CONFIDENT) for index in range(count))


def make_records(
    rows: int, schema: Schema | None = None, *, seed: int = 0, steps_per_second: float = 10.0
) -> Records:
    """Rows 0 .. rows - 1 of a run; slice them into batches."""
    schema = schema or make_schema()
    random = np.random.default_rng(seed)
    count, layers = len(schema.rules), len(schema.layers)
    step = np.arange(rows)
    progress = 1 / (1 + np.exp(-(step / max(rows, 1) - 0.3) * 14))  # 0 .. 1
    level = np.resize(np.array(LEVELS), count)
    start = np.where(np.resize(np.arange(6), count) == 4, 0.9, 0.1)
    middle = start + (level - start) * progress[:, None] + 0.04 * random.standard_normal((rows, count))
    middle = middle[:, :, None] + 0.02 * random.standard_normal((rows, count, layers))
    width = 0.05 + 0.1 * (1 - progress)[:, None, None]
    truth = np.clip(np.stack([middle - width, middle + width], axis=-1), 0, 1).astype(np.float32)
    threshold = np.array([rule.threshold for rule in schema.rules], np.float32)
    loss = 1.5 + 2.7 * np.exp(-4 * step / max(rows, 1)) + 0.08 * random.standard_normal(rows)
    signals = np.stack(
        [
            np.broadcast_to(loss[:, None], (rows, layers)),
            1 - 0.6 * progress[:, None] + 0.02 * random.standard_normal((rows, layers)),
            0.25 + 0.6 * progress[:, None] + 0.02 * random.standard_normal((rows, layers)),
        ],
        axis=1,
    ).astype(np.float32)
    records = Records(
        schema=schema,
        step=step.astype(np.int64),
        state=np.zeros((rows, count), np.int8),
        truth_layer=truth,
        signal_value=signals,
        signal_pooled=signals.mean(axis=2),
        expert_share=random.dirichlet(np.full(max(schema.experts, 1), 40.0), (rows, layers))
        .astype(np.float32)[:, :, : schema.experts],
        wall_time=1.7e9 + step / steps_per_second,
    )  # fmt: skip
    lower, upper = records.truth[..., 0], records.truth[..., 1]
    records.state[:] = np.select(
        [lower > upper, lower >= threshold, 1 - upper >= threshold],
        [State.CONTRADICTORY, State.TRUE, State.FALSE],
        State.UNKNOWN,
    )
    return records


def make_run(logdir: Path | None = None, schema: Schema | None = None, **settings: Any) -> Run:
    return Run(schema or make_schema(), logdir, **settings)


def feed(sink: Any, records: Records, run: Run, *, batch: int | None = None, end: bool = True) -> None:
    """What the callback does with a sink during a run."""
    batch = batch or run.flush_every
    sink.on_train_start(run)
    for start in range(0, len(records), batch):
        sink.on_records(records[start : start + batch])
    if end:
        sink.on_train_end(run)
