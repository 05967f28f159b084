"""Rows of an audit on the host: what sinks receive and the history stores.

    Schema    what the columns mean; fixed for a run
    Records   a batch of consecutive rows, as NumPy arrays
    Run       what a trainer starts: schema, where it writes, what it was told

Dimensions: n rows, R rules, S signals, Y layers, E experts; bounds are (lower, upper).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

import numpy as np

from .formula import Rule, RuleKind
from .paths import AnyPath
from .predicates import Predicate


class State(IntEnum):
    """What the threshold makes of an interval; NOT_WRITTEN fills unwritten rows of a history."""

    NOT_WRITTEN = -1
    FALSE = 0
    TRUE = 1
    UNKNOWN = 2
    CONTRADICTORY = 3


def fires_in(kinds: Iterable[RuleKind]) -> np.ndarray:
    """int8 [R]: the state in which rules of these kinds fire; -2, which is none, without a kind."""
    states = {"risk": State.TRUE, "health": State.FALSE}
    return np.array([-2 if kind is None else states[kind] for kind in kinds], np.int8)


@dataclass(frozen=True)
class SignalInfo:
    """A recorded signal. `per_layer` is False for signals of the whole model, such as the loss."""

    name: str
    long_name: str = ""
    units: str = "1"
    per_layer: bool = True


@dataclass(frozen=True)
class Schema:
    """What the columns of a run's records mean.

    Attributes:
        rules: R rules.
        signals: S signals.
        layers: Y layer names, at least one.
        experts: number of columns of `expert_share`; 0 where no router is seen.
        routers: (experts, experts per token or None) of each layer; empty where no router is seen.
        predicates: those that the rules use, by name.
    """

    rules: tuple[Rule, ...]
    signals: tuple[SignalInfo, ...]
    layers: tuple[str, ...]
    experts: int
    routers: tuple[tuple[int, int | None], ...] = ()
    predicates: Mapping[str, Predicate] = field(default_factory=dict)

    @property
    def rule_names(self) -> tuple[str, ...]:
        return tuple(rule.name for rule in self.rules)

    @property
    def signal_names(self) -> tuple[str, ...]:
        return tuple(signal.name for signal in self.signals)


@dataclass(frozen=True)
class Records:
    """n consecutive rows.

    Attributes:
        schema: what the columns mean.
        step: int64 [n].
        state: int8 [n, R], values of `State`.
        truth_layer: float32 [n, R, Y, 2].
        signal_value: float32 [n, S, Y]; a signal of the whole model repeats its value. NaN or inf is
            what the metric was: rules over it are UNKNOWN in that row.
        signal_pooled: float32 [n, S]; from statistics averaged over the layers.
        expert_share: float32 [n, Y, E]; share of assignments, NaN where a layer has fewer experts.
        wall_time: float64 [n], seconds since the epoch, interpolated between flushes.
    """

    schema: Schema
    step: np.ndarray
    state: np.ndarray
    truth_layer: np.ndarray
    signal_value: np.ndarray
    signal_pooled: np.ndarray
    expert_share: np.ndarray
    wall_time: np.ndarray

    @classmethod
    def empty(cls, schema: Schema) -> Records:
        """No rows of this schema."""
        r, s, y, e = len(schema.rules), len(schema.signals), len(schema.layers), schema.experts
        return cls(
            schema,
            step=np.zeros(0, np.int64),
            state=np.zeros((0, r), np.int8),
            truth_layer=np.zeros((0, r, y, 2), np.float32),
            signal_value=np.zeros((0, s, y), np.float32),
            signal_pooled=np.zeros((0, s), np.float32),
            expert_share=np.zeros((0, y, e), np.float32),
            wall_time=np.zeros(0),
        )

    @classmethod
    def joined(cls, batches: Iterable[Records]) -> Records:
        """Consecutive batches, at least one, as one."""
        batches = list(batches)
        arrays = {name: np.concatenate([getattr(each, name) for each in batches]) for name in ARRAYS}
        return cls(batches[0].schema, **arrays)

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, rows: slice | np.ndarray) -> Records:
        """The rows selected by a slice, a mask or an index array."""
        arrays = {name: getattr(self, name)[rows] for name in ARRAYS}
        return Records(self.schema, **arrays)

    def held(self, records: Records) -> int:
        """How many of `records`, from the first on, stand in these rows bit by bit, but for the time."""
        found = np.flatnonzero(self.step == records.step[0]) if len(records) else []
        if not len(found):
            return 0
        begin = int(found[-1])
        number = min(len(records), len(self) - begin)
        same = np.ones(number, bool)
        for name in ARRAYS:
            if name != "wall_time":
                mine, other = (
                    np.ascontiguousarray(part).reshape(number, -1).view(np.uint8)
                    for part in (getattr(self, name)[begin : begin + number], getattr(records, name)[:number])
                )
                same &= (mine == other).all(axis=1)
        return number if same.all() else int(same.argmin())

    @property
    def truth(self) -> np.ndarray:
        """float32 [n, R, 2]: over layers the maximum of each bound for a risk, else the minimum."""
        risk = np.array([rule.kind == "risk" for rule in self.schema.rules], bool)
        # Bound by bound: NumPy reduces over the last axis, and takes ten times as long over the one before.
        layers = (self.truth_layer[..., bound] for bound in (0, 1))
        return np.stack([np.where(risk, each.max(axis=2), each.min(axis=2)) for each in layers], axis=-1)

    def judged(self) -> Records:
        """With the states that today's thresholds make of the truth, as `logic.classify` does on the device:
        a checkpoint may hold rows from before a threshold was changed."""
        lower, upper = np.moveaxis(self.truth, -1, 0)
        alpha = np.array([rule.threshold for rule in self.schema.rules], np.float32)
        conditions = [lower > upper, lower >= alpha, 1 - upper >= alpha]
        states = np.select(conditions, [State.CONTRADICTORY, State.TRUE, State.FALSE], State.UNKNOWN)
        return replace(self, state=states.astype(np.int8))

    @property
    def loss(self) -> np.ndarray:
        """float32 [n]; NaN where the run passes none."""
        names = self.schema.signal_names
        if "loss" not in names:
            return np.full(len(self), np.nan, np.float32)
        return self.signal_pooled[:, names.index("loss")]


ARRAYS = (
    "step", "state", "truth_layer", "signal_value", "signal_pooled", "expert_share", "wall_time",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One training run as plugins see it.

    Attributes:
        schema: what the records will hold.
        logdir: where files go, a Path or for a URL a UPath, or None.
        flush_every: rows that usually arrive together.
        resume: whether an existing history in `logdir` is continued.
        config: whatever the trainer wants kept beside the history (JSON values).
    """

    schema: Schema
    logdir: AnyPath | None = None
    flush_every: int = 64
    resume: bool = False
    config: dict[str, Any] = field(default_factory=dict)
