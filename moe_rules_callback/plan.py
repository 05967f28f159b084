"""Rules compiled for one layout of metrics: the pure function from a step's metrics to a row.

    metrics -> statistics -> signals -> predicates -> rules -> row

What can be known from shapes is decided here once: which rules have their signals, which statistics and
windows they need, where each ramp turns for E experts of which k are used. `Plan.update` is then a
straight run of array operations.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import logic
from .deduction import Deduction
from .errors import MetricsError, MissingSignalError
from .formula import Rule
from .judges import Judges, explicit
from .metrics import ROUTER_METRICS
from .program import Program
from .records import Schema, SignalInfo
from .rings import put
from .routers import Routers
from .signals import TOKENS, RecordedSignal, RouterSignal, WindowSignal
from .state import AuditState, pack
from .statistics import NEED_LOGITS, Statistics, measure
from .summaries import Summary
from .trends import Lookbacks
from .vocabulary import Vocabulary

log = logging.getLogger("moe_rules_callback")
RECENT = 32  # rows over which an expert must be idle to be dead


class Plan:
    """See the module.

    Args:
        vocabulary: of the metrics.
        rules: the user's own; one without its signals is an error.
        optional: rules of shipped books and plugins; those without their signals are left out.
        record: further signals to record; "all" for every one that the metrics allow.
        max_experts: columns of expert_share at most.
        ring: rows that the state holds.

    Raises:
        UnknownNameError, MissingSignalError: a rule cannot be evaluated on these metrics.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        rules: Sequence[Rule],
        optional: Sequence[Rule],
        record: Sequence[str] | str,
        max_experts: int,
        ring: int,
    ) -> None:
        self._vocabulary, self._ring = vocabulary, ring
        self.layout = vocabulary.layout
        found = vocabulary.choose(rules, optional)
        names = vocabulary.concluded(found)
        self._program = Deduction(found, names) if names else Program([rule.formula for rule in found])
        predicates = [vocabulary.predicate(name) for name in self._program.atoms]
        used = [predicate.signal for predicate in predicates]
        if any(predicate.sampling for predicate in predicates) and not vocabulary.missing(TOKENS):
            used.append(TOKENS)
        self._order = self._signals(used, record)

        groups = self.layout.groups
        sizes = [(experts, k or 1) for (experts, k), names in groups.items() for _ in names] or [(1, 1)]
        self._judges = Judges(predicates, self._order, vocabulary.signals, sizes)
        needs = {need for name in self._base for need in self._needs(name)}
        self._recent = "recent_load" in needs
        self._share = "load" if self.layout.k_known else "first"
        self._statistics = needs - {"recent_load"} | ({self._share} if groups else set())

        width = max((experts for experts, _ in groups), default=0)
        if width > max_experts:
            log.warning(
                "expert_share keeps %d of %d experts; raise max_experts to keep all", max_experts, width
            )
        self.schema = Schema(
            rules=tuple(found),
            signals=tuple(self._info(name) for name in self._order),
            layers=tuple(name for names in groups.values() for name in names) or ("model",),
            experts=min(width, max_experts),
            routers=tuple(size for size, names in groups.items() for _ in names),
            predicates={
                name: explicit(predicate, vocabulary.signals[predicate.signal], *sizes[0])
                for name, predicate in zip(self._program.atoms, predicates, strict=True)
            },
        )
        self._threshold = np.array([rule.threshold for rule in found], np.float32)
        self._risk = np.array([rule.kind == "risk" for rule in found], bool)

    def _signals(self, used: Sequence[str], record: Sequence[str] | str) -> list[str]:
        """All signals to compute, those that look back on others last."""
        signals = self._vocabulary.signals
        more = self._vocabulary.possible() if record == "all" else record
        wanted = dict.fromkeys([*self.layout.scalars, *self._vocabulary.recorded, *used, *more])
        for name in wanted:
            if what := self._vocabulary.missing(name):
                raise MissingSignalError(
                    f"the signal '{name}' is to be recorded, but the metrics of this step do not give it: "
                    f"pass {what}."
                )
        backward = {n: s for n in wanted if isinstance(s := signals[n], WindowSignal)}
        self._base = [name for name in wanted if name not in backward]
        self._base += dict.fromkeys(n for s in backward.values() for n in s.needs if n not in self._base)
        self._lookbacks = Lookbacks(
            [(signal.compute, signal.rows, self._base.index(signal.needs[0])) for signal in backward.values()]
        )
        return [*self._base, *backward]

    def _needs(self, name: str) -> tuple[str, ...]:
        """Statistics under a signal."""
        signal = self._vocabulary.signals[name]
        if not isinstance(signal, RouterSignal):
            return ()
        return (*signal.needs, "load") if "recent_load" in signal.needs else signal.needs

    def _info(self, name: str) -> SignalInfo:
        signals = self._vocabulary.signals
        signal = signals[name]
        source = signals[signal.needs[0]] if isinstance(signal, WindowSignal) else signal
        return SignalInfo(
            name, signal.long_name, signal.units, isinstance(source, RouterSignal | RecordedSignal)
        )

    @cached_property
    def metrics(self) -> frozenset[str]:
        """Keys of the metrics that are read; "*" stands for all of them."""
        signals = [self._vocabulary.signals[name] for name in self._base]
        needs = {need for signal in signals if not isinstance(signal, RouterSignal) for need in signal.needs}
        routers = set(ROUTER_METRICS) & self.layout.metrics
        if "router_probs" in routers and not self._statistics & NEED_LOGITS:
            routers.discard("router_logits")
        return frozenset(needs | routers)

    def init(self) -> AuditState:
        """State before the first row."""
        layers, rules = len(self.schema.layers), len(self.schema.rules)
        width = rules * layers * 2 + len(self._order) * (layers + 1) + layers * self.schema.experts
        recent = [
            jnp.full((RECENT, len(names) + 1, experts), jnp.nan, jnp.float32)
            for (experts, _), names in self.layout.groups.items()
            if self._recent
        ]
        empty = pack(jnp.int32(-1), jnp.full(rules, -1), jnp.full(width, jnp.nan, jnp.float32))
        return AuditState(
            step=jnp.int32(-1),
            row=jnp.int32(0),
            recent=tuple(recent),
            lookback=self._lookbacks.init(layers + 1),
            trends=self._judges.init(layers),
            program=self._program.init(layers),
            ring={self._mark: jnp.tile(empty, (self._ring, 1))},
        )

    def update(
        self,
        state: AuditState,
        metrics: Mapping[str, Any],
        routers: Sequence[Routers] | Sequence[Summary],
        step: Any,
    ) -> AuditState:
        """Take in one step: the state with one row more.

        Raises:
            MetricsError: the state is one of other rules.
        """
        if [*state.ring] != [self._mark]:
            raise MetricsError(
                "the state is one of another audit, with other rules, predicates or layers. Usual causes: "
                "two audits whose states were exchanged, or a checkpoint from before a rule was changed. "
                "Begin with a new state, audit.init(metrics)."
            )
        step = state.step + 1 if step is None else jnp.asarray(step, jnp.int32)
        with jax.named_scope("moe_rules.statistics"):
            groups = measure(routers, self._statistics)
        with jax.named_scope("moe_rules.signals"):
            recent = self._recall(state, groups)
            values = self._evaluate(groups, metrics)  # [base, layers + 1]
            lookback, more = self._lookbacks.update(state.lookback, values, state.row)
            values = jnp.concatenate([values, more])  # [signals, layers + 1]
            layered = values[:, :-1]
        with jax.named_scope("moe_rules.predicates"):
            trends, atoms, bad = self._judges.update(state.trends, layered, state.row)
        with jax.named_scope("moe_rules.rules"):
            program, truth = self._program.update(state.program, atoms, bad, state.row, step)
        with jax.named_scope("moe_rules.row"):
            # Being read here too, the truth is computed apart; else XLA fuses it with the writing of the row,
            # in a replay otherwise than in a step, and the last bit may differ.
            headline = jnp.where(self._risk[:, None], truth.max(1), truth.min(1))
            states = logic.classify(headline, self._threshold)
            told = [truth.ravel(), layered.ravel(), values[:, -1], self._shares(groups).ravel()]
            rows = put(state.rows, pack(step, states, jnp.concatenate(told)), state.row % self._ring)
        return AuditState(step, state.row + 1, tuple(recent), lookback, trends, program, {self._mark: rows})

    @cached_property
    def _mark(self) -> str:
        """What a state remembers, in a word."""
        schema = self.schema
        rules = [str(rule.formula) for rule in schema.rules]
        what = rules, sorted(schema.predicates.items()), self._order, schema.layers, schema.routers
        return f"of_{zlib.crc32(repr(what).encode()):08x}"

    def _recall(self, state: AuditState, groups: list[Statistics]) -> list[jax.Array]:
        """Take in the loads, and give the statistics their mean over the last rows."""
        recent = []
        for ring, group in zip(state.recent, groups, strict=False):
            ring = put(ring, group["load"], state.row % RECENT)
            mean = jnp.nanmean(ring, axis=0)
            group.values["recent_load"] = jnp.where(jnp.isfinite(group["load"]), mean, jnp.nan)
            recent.append(ring)
        return recent

    def _evaluate(self, groups: list[Statistics], metrics: Mapping[str, Any]) -> jax.Array:
        """float32 [base signals, layers + 1], pooled values last."""
        rows = []
        for name in self._base:
            signal = self._vocabulary.signals[name]
            if isinstance(signal, RouterSignal):
                parts = [signal.compute(group) for group in groups]
                pooled = parts[0][-1:] if len(parts) == 1 else jnp.full(1, jnp.nan)
                row = jnp.concatenate([*(part[:-1] for part in parts), pooled])
            else:
                try:
                    value = jnp.asarray(signal.compute(metrics), jnp.float32)
                except Exception as error:
                    error.add_note(f"This was raised by the signal '{name}', given {', '.join(metrics)}.")
                    raise
                if value.shape and not isinstance(signal, RecordedSignal):
                    raise MetricsError(
                        f"the signal '{name}' has shape {value.shape}; a signal is a single number. "
                        f"Reduce it first, for instance with jnp.mean."
                    )
                row = jnp.broadcast_to(value, len(self.schema.layers) + 1)
            rows.append(row)
        return jnp.stack(rows) if rows else jnp.zeros((0, len(self.schema.layers) + 1), jnp.float32)

    def _shares(self, groups: list[Statistics]) -> jax.Array:
        """float32 [layers, experts], NaN where a layer has fewer experts."""
        wide = self.schema.experts
        shares = [group[self._share][:-1, :wide] for group in groups]
        padded = [jnp.pad(x, ((0, 0), (0, wide - x.shape[1])), constant_values=jnp.nan) for x in shares]
        return jnp.concatenate(padded) if padded else jnp.zeros((1, 0), jnp.float32)
