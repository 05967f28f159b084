"""Rules compiled for one layout of metrics: the pure function from a step's metrics to a row.

    metrics -> statistics -> signals -> predicates -> rules -> row

What can be known from shapes is decided here once: which rules have their signals, which statistics and
windows they need, where each ramp turns for E experts of which k are used. `Plan.update` is then a
straight run of array operations.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import logic
from .errors import MetricsError, MissingSignalError, UnknownNameError
from .formula import Rule, variables
from .metrics import ROUTER_METRICS, Routers, collect, scalars
from .predicates import Predicate, resolve
from .program import Program, States
from .records import Schema, SignalInfo
from .signals import Signal, scalar, shipped
from .statistics import Statistics, measure
from .temporal import UNKNOWN
from .trends import Lookbacks, rising, spike_score, steadiness

log = logging.getLogger("moe_rules_callback")
RECENT = 32  # rows over which an expert must be idle to be dead


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """A ring of finished rows: row i stands at i % R.

    `values` holds, one after the other, truth_layer [rules, layers, 2], signal_value [signals, layers],
    signal_pooled [signals] and expert_share [layers, experts]: one array is one write a step.
    """

    step: jax.Array  # int32 [R]
    state: jax.Array  # int8 [R, rules]
    values: jax.Array  # float32 [R, all of the above]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AuditState:
    """Everything that the audit remembers: a pytree of arrays, to be carried, donated and checkpointed.

    Attributes:
        step: int32 [], number of the last step, -1 before the first.
        row: int32 [], rows so far.
        recent: loads of the last 32 rows, for each (E, k).
        lookback, trend: windows of signals that signals, then predicates, look back on.
        program: what the past operators of the rules remember.
        rows: finished rows, until they are drained.
    """

    step: jax.Array
    row: jax.Array
    recent: tuple[jax.Array, ...]
    lookback: tuple[jax.Array, ...]
    trend: tuple[jax.Array, ...]
    program: States
    rows: Rows


@dataclass(frozen=True)
class Layout:
    """What the shapes of a step's metrics say."""

    routers: tuple[tuple[tuple[str, ...], int, int | None], ...]  # names of layers, E, k
    scalars: tuple[str, ...]
    metrics: frozenset[str]

    @classmethod
    def of(cls, metrics: Mapping[str, Any], routers: Sequence[Routers]) -> Layout:
        shapes = tuple((each.names, each.experts, each.k) for each in routers)
        return cls(shapes, tuple(scalars(metrics)), frozenset(metrics))


class Plan:
    """See the module.

    Args:
        layout: of the metrics.
        rules: the user's own; one without its signals is an error.
        optional: rules of shipped books and plugins; those without their signals are left out, with
            one warning.
        predicates: of rule files and plugins, by name.
        signals: of plugins, by name.
        record: further signals to record; "all" for every one that the metrics allow.
        max_experts: columns of expert_share at most.
        top_k, layer_axis: see `Audit`.
        ring: rows that the state holds.

    Raises:
        UnknownNameError, MissingSignalError: a rule cannot be evaluated on these metrics.
    """

    def __init__(
        self,
        layout: Layout,
        *,
        rules: Sequence[Rule],
        optional: Sequence[Rule],
        predicates: Mapping[str, Predicate],
        signals: Mapping[str, Signal],
        record: Sequence[str] | str,
        max_experts: int,
        ring: int,
    ) -> None:
        self.layout, self._ring = layout, ring
        own = {name: scalar(name) for name in ("loss", *layout.scalars)}
        self._known = shipped() | dict(signals) | own
        # Layers stand in the order of the statistics: grouped by (E, k).
        groups: dict[tuple[int, int | None], list[str]] = {}
        for names, experts, k in layout.routers:
            groups.setdefault((experts, k), []).extend(names)
        self._groups = {key: len(names) for key, names in groups.items()}
        self._experts = [key for key, names in groups.items() for _ in names]  # (E, k) of each layer
        layers = tuple(name for names in groups.values() for name in names) or ("model",)

        self._k_known = bool(groups) and all(k is not None for _, k in groups)
        found = self._with_signals(rules, optional, predicates)
        self._program = Program([rule.formula for rule in found])
        atoms = [resolve(name, predicates, self._known) for name in self._program.atoms]
        self._order = self._signals([atom.signal for atom in atoms], record)
        self._compile_predicates(atoms, len(layers))

        self._statistics = {n for name in self._base for n in self._needs(name)} - {"recent_load"}
        self._share = "load" if self._k_known else "first"
        if groups:
            self._statistics.add(self._share)
        width = max((experts for experts, _ in groups), default=0)
        if width > max_experts:
            log.warning(
                "expert_share keeps %d of %d experts; raise max_experts to keep them all",
                max_experts, width,
            )  # fmt: skip
        self.schema = Schema(
            rules=tuple(found),
            signals=tuple(self._info(name) for name in self._order),
            layers=layers,
            experts=min(width, max_experts),
        )
        self._threshold = np.array([rule.threshold for rule in found], np.float32)
        self._risk = np.array([rule.kind == "risk" for rule in found], bool)

    # Set-up.

    def _with_signals(
        self, rules: Sequence[Rule], optional: Sequence[Rule], predicates: Mapping[str, Predicate]
    ) -> list[Rule]:
        """The rules whose signals the metrics give, the user's own first."""
        for rule in rules:
            if problem := self._missing(rule, predicates):
                signal, what = problem
                raise MissingSignalError(
                    f"rule '{rule.name}' needs the signal '{signal}', which the metrics of this step do not "
                    f"give: pass {what}. They are: {', '.join(sorted(self.layout.metrics)) or 'none'}."
                )
        skipped: dict[str, list[str]] = {}
        kept = list(rules)
        for rule in optional:
            try:
                problem = self._missing(rule, predicates)
            except UnknownNameError as error:
                problem = "", f"what is named here ({error})"
            if problem:
                skipped.setdefault(problem[1], []).append(rule.name)
            else:
                kept.append(rule)
        if skipped:
            advice = "; ".join(f"pass {what} for {', '.join(names)}" for what, names in skipped.items())
            log.warning("rules without their signals are left out: %s", advice)
        return kept

    def _missing(self, rule: Rule, predicates: Mapping[str, Predicate]) -> tuple[str, str] | None:
        """(signal, what to pass) for the first signal of a rule that cannot be computed."""
        for name in dict.fromkeys(variables(rule.formula)):
            try:
                predicate = resolve(name, predicates, self._known)
            except UnknownNameError as error:
                raise UnknownNameError(f"rule '{rule.name}': {error}") from None
            signal = self._known.get(predicate.signal)
            if signal is None:  # a rule file's predicate over a scalar that is not passed
                return predicate.signal, f"'{predicate.signal}'"
            if what := signal.missing(self.layout.metrics, self._k_known):
                return predicate.signal, what
        return None

    def _signals(self, used: Sequence[str], record: Sequence[str] | str) -> list[str]:
        """All signals to compute, those that look back on others last."""
        possible = [n for n, s in self._known.items() if not s.missing(self.layout.metrics, self._k_known)]
        wanted = dict.fromkeys([n for n in self.layout.scalars if n in possible])
        wanted |= dict.fromkeys(used)
        wanted |= dict.fromkeys(possible if record == "all" else record)
        for name in wanted:
            if name not in possible:
                what = self._known[name].missing(self.layout.metrics, self._k_known) if name in self._known else ""
                raise MissingSignalError(
                    f"the signal '{name}' was asked for but cannot be computed from the metrics of this step"
                    + (f": pass {what}." if what else ": no such signal is known.")
                )
        self._base = [n for n in wanted if self._known[n].source != "window"]
        backward = [n for n in wanted if self._known[n].source == "window"]
        self._base += [s for n in backward for s in self._known[n].needs if s not in self._base]
        self._lookbacks = Lookbacks(
            [
                (self._known[n].compute, self._known[n].window, self._base.index(self._known[n].needs[0]))
                for n in backward
            ]
        )
        return self._base + backward

    def _compile_predicates(self, atoms: Sequence[Predicate], layers: int) -> None:
        """Which feature each predicate reads, and its ramp in every layer."""
        size = [(experts, k or 1) for experts, k in self._experts] or [(1, 1)]
        self._sources = np.array([self._order.index(p.signal) for p in atoms], int)
        self._features = self._sources.copy()
        trends: dict[tuple[Any, int, int], int] = {}
        ramp = np.zeros((3, len(atoms), layers), np.float32)  # slope with its sign, offset, margin
        for i, predicate in enumerate(atoms):
            sign = -1.0 if predicate.sense in ("low", "decreasing") else 1.0
            ramps, trend = self._known[predicate.signal].ramps, None
            for layer in range(layers):
                offset, slope, margin = predicate.offset, predicate.slope, predicate.margin
                if predicate.sense in ("increasing", "decreasing", "stable"):
                    trend = (steadiness if predicate.sense == "stable" else rising), predicate.window
                    offset = 0.5 if offset is None else offset
                    offset = 1 - offset if predicate.sense == "decreasing" else offset
                elif offset is None and ramps is not None:
                    offset, scale = ramps(*size[layer])[predicate.sense]
                    slope, margin = slope / scale, margin * scale
                elif offset is None:  # 3 standard deviations on a range of 6
                    trend = spike_score, predicate.window + 1
                    offset, slope, margin = 3.0 * sign, slope / 6, margin * 6
                ramp[:, i, layer] = sign * slope, offset, margin
            if trend is not None:
                key = (*trend, int(self._sources[i]))
                self._features[i] = len(self._order) + trends.setdefault(key, len(trends))
        self._slope, self._offset, self._margin = ramp
        self._trends = Lookbacks(list(trends))

    def _needs(self, name: str) -> tuple[str, ...]:
        signal = self._known[name]
        needs = signal.needs if signal.source == "statistics" else ()
        return (*needs, "load") if "recent_load" in needs else needs

    def _info(self, name: str) -> SignalInfo:
        signal = self._known[name]
        source = self._known[signal.needs[0]] if signal.source == "window" else signal
        return SignalInfo(name, signal.long_name, signal.units, source.source == "statistics")

    @property
    def metrics(self) -> frozenset[str]:
        """Keys of the metrics that are read; "*" stands for all of them."""
        needs = {n for name in self._base if self._known[name].source == "metrics" for n in self._known[name].needs}
        routers = set(ROUTER_METRICS) & self.layout.metrics
        if "router_probs" in routers and not self._statistics & {"logit_square", "log_partition_square"}:
            routers.discard("router_logits")
        return frozenset(needs | routers)

    # The pure pair.

    def init(self) -> AuditState:
        """State before the first row."""
        layers, rules = len(self.schema.layers), len(self.schema.rules)
        width = rules * layers * 2 + len(self._order) * (layers + 1) + layers * self.schema.experts
        recent = [
            jnp.full((RECENT, count + 1, experts), jnp.nan, jnp.float32)
            for (experts, _), count in self._groups.items()
            if any("recent_load" in self._known[name].needs for name in self._base)
        ]
        return AuditState(
            step=jnp.int32(-1),
            row=jnp.int32(0),
            recent=tuple(recent),
            lookback=self._lookbacks.init(layers + 1),
            trend=self._trends.init(layers),
            program=self._program.init(layers),
            rows=Rows(
                step=jnp.full(self._ring, -1, jnp.int32),
                state=jnp.full((self._ring, rules), -1, jnp.int8),
                values=jnp.full((self._ring, width), jnp.nan, jnp.float32),
            ),
        )

    def update(self, state: AuditState, metrics: Mapping[str, Any], routers: list[Routers], step: Any) -> AuditState:
        """Take in one step: the state with one row more."""
        step = state.step + 1 if step is None else jnp.asarray(step, jnp.int32)
        groups = measure(routers, self._statistics)
        recent = []
        for ring, group in zip(state.recent, groups, strict=False):
            ring = ring.at[state.row % RECENT].set(group["load"])
            mean = jnp.nanmean(ring, axis=0)
            group.values["recent_load"] = jnp.where(jnp.isfinite(group["load"]), mean, jnp.nan)
            recent.append(ring)

        values = self._evaluate(groups, metrics)  # [base, layers + 1]
        lookback, more = self._lookbacks.update(state.lookback, values, state.row)
        values = jnp.concatenate([values, more])  # [signals, layers + 1]
        layered = values[:, :-1]
        trend, degrees = self._trends.update(state.trend, layered, state.row)

        x = jnp.concatenate([layered, degrees])[self._features]  # [atoms, layers]
        centre = self._slope * (x - self._offset)
        width = np.abs(self._slope) * self._margin
        atoms = jax.nn.sigmoid(jnp.stack([centre - width, centre + width], axis=-1))
        atoms = jnp.where(jnp.isfinite(x)[..., None], atoms, UNKNOWN)
        bad = ~jnp.isfinite(layered[self._sources])
        program, truth = self._program.update(state.program, atoms, bad, state.row, step)

        risk = self._risk[:, None]
        headline = jnp.where(risk, truth.max(1), truth.min(1))
        packed = [truth.ravel(), layered.ravel(), values[:, -1], self._shares(groups).ravel()]
        slot = state.row % self._ring
        rows = Rows(
            step=state.rows.step.at[slot].set(step),
            state=state.rows.state.at[slot].set(logic.classify(headline, self._threshold)),
            values=state.rows.values.at[slot].set(jnp.concatenate(packed)),
        )
        return AuditState(step, state.row + 1, tuple(recent), lookback, trend, program, rows)

    def _evaluate(self, groups: list[Statistics], metrics: Mapping[str, Any]) -> jax.Array:
        """float32 [base signals, layers + 1], pooled values last."""
        rows = []
        for name in self._base:
            signal = self._known[name]
            if signal.source == "statistics":
                parts = [signal.compute(group) for group in groups]
                pooled = parts[0][-1:] if len(parts) == 1 else jnp.full(1, jnp.nan)
                row = jnp.concatenate([*(part[:-1] for part in parts), pooled])
            else:
                value = jnp.asarray(signal.compute(metrics), jnp.float32)
                if value.shape:
                    raise MetricsError(
                        f"the signal '{name}' has shape {value.shape}; a signal is a single number. "
                        f"Reduce it first, for instance with jnp.mean."
                    )
                row = jnp.full(len(self.schema.layers) + 1, value)
            rows.append(row)
        return jnp.stack(rows) if rows else jnp.zeros((0, len(self.schema.layers) + 1))

    def _shares(self, groups: list[Statistics]) -> jax.Array:
        """float32 [layers, experts], NaN where a layer has fewer experts."""
        wide = self.schema.experts
        shares = [group[self._share][:-1, :wide] for group in groups]
        padded = [jnp.pad(x, ((0, 0), (0, wide - x.shape[1])), constant_values=jnp.nan) for x in shares]
        return jnp.concatenate(padded) if padded else jnp.zeros((1, 0))


def layout_of(metrics: Mapping[str, Any], top_k: int | None, layer_axis: int | None) -> Layout:
    """The layout of real or abstract metrics; nothing is computed."""
    found: list[Routers] = []
    arrays = {key: metrics[key] for key in ROUTER_METRICS if key in metrics}
    jax.eval_shape(lambda given: found.extend(collect(given, top_k, layer_axis)), arrays)
    return Layout.of(metrics, found)
