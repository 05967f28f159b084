"""What rules can speak of, given the metrics that a step hands over."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np

from .conclusions import concluded, is_axiom
from .errors import MissingSignalError, RulebookError, UnknownNameError, closest
from .formula import Rule, Var, variables
from .metrics import ROUTER_METRICS, TREES, collect, scalars
from .predicates import Predicate, is_measured, resolve
from .routers import Routers
from .signals import (
    SCALAR_RAMPS,
    RecordedSignal,
    RouterSignal,
    Signal,
    WindowSignal,
    recorded,
    scalar,
    shipped,
)  # fmt: skip
from .statistics import TOKENS
from .summaries import Recorded, Summary, summaries

log = logging.getLogger("moe_rules_callback")


@dataclass(frozen=True)
class Layout:
    """What the shapes of a step's metrics say.

    Attributes:
        routers: (names of layers, E, k) of each router array.
        scalars: names of the metrics that are single numbers.
        metrics: names of all metrics.
        loads: the statistics that are there although no probabilities are.
    """

    routers: tuple[tuple[tuple[str, ...], int, int | None], ...]
    scalars: tuple[str, ...]
    metrics: frozenset[str]
    loads: frozenset[str]

    @classmethod
    def of(cls, metrics: Mapping[str, Any], routers: Sequence[Routers] | Sequence[Summary]) -> Layout:
        shapes = tuple((each.names, each.experts, each.k) for each in routers)
        known = [each.values.keys() for each in routers if isinstance(each, Summary)]
        loads = frozenset.intersection(*map(frozenset, known)) if known else frozenset()
        loads |= {"recent_load"} if "load" in loads else set()
        return cls(shapes, tuple(scalars(metrics)), frozenset(metrics), loads)

    @classmethod
    def of_metrics(cls, metrics: Mapping[str, Any], top_k: int | None, layer_axis: int | None) -> Layout:
        """The layout of real or abstract metrics; nothing is computed."""
        found: list[Layout] = []

        def look(arrays: Mapping[str, Any]) -> None:
            found.append(
                cls.of(metrics, summaries(arrays, top_k, layer_axis) or collect(arrays, top_k, layer_axis))
            )

        jax.eval_shape(look, {key: metrics[key] for key in ROUTER_METRICS if key in metrics})
        return found[0]

    @property
    def groups(self) -> dict[tuple[int, int | None], tuple[str, ...]]:
        """Names of the layers by (E, k), in the order in which `statistics.measure` returns them."""
        groups: dict[tuple[int, int | None], tuple[str, ...]] = {}
        for names, experts, k in self.routers:
            groups[experts, k] = groups.get((experts, k), ()) + names
        return groups

    @property
    def k_known(self) -> bool:
        """Whether every router tells how many experts a token uses."""
        return bool(self.routers) and all(k is not None for _, _, k in self.routers)


class Vocabulary:
    """The signals and predicates of one layout.

    Args:
        layout: of the metrics.
        metrics: real or abstract.
        signals: of plugins, by name.
        predicates: of rule files and plugins, by name.

    Attributes:
        signals: all known ones by name: shipped, of plugins, and the scalars of the step, which win.
    """

    def __init__(
        self,
        layout: Layout,
        metrics: Mapping[str, Any],
        signals: Mapping[str, Signal],
        predicates: Mapping[str, Predicate],
    ) -> None:
        self.layout, self._predicates = layout, predicates
        self._metrics = jax.tree.map(_abstract, dict(metrics))  # so that no array is kept alive
        own: dict[str, Signal] = {name: scalar(name) for name in ("loss", *layout.scalars)}
        if isinstance(given := metrics.get("recorded"), Recorded):
            own |= {name: recorded(name) for name in given.values}
        self.recorded = [name for name, signal in own.items() if isinstance(signal, RecordedSignal)]
        self.signals: dict[str, Signal] = shipped() | dict(signals) | own

    def predicate(self, name: str) -> Predicate:
        """See `predicates.resolve`."""
        return resolve(name, self._predicates, self.signals)

    def missing(self, signal: str) -> str:
        """What to pass so that a signal can be computed, or "" when it can."""
        if signal in SCALAR_RAMPS and signal not in self.signals:
            return f"'{signal}'"
        if signal not in self.signals and signal in self.layout.metrics:
            return f"'{signal}' as a single real number, which it is not now"
        if signal not in self.signals:
            return f"'{signal}', which is no shipped signal.{closest(signal, self.signals)}".rstrip(".")
        found = self.signals[signal]
        if isinstance(found, RouterSignal) and set(found.needs) <= self.layout.loads:
            return ""
        return found.missing(self.layout.metrics, self.layout.k_known)

    def possible(self) -> list[str]:
        """All signals that can be computed."""
        return [name for name in self.signals if not self.missing(name) and self._computes(name)]

    def statistics(self, rules: Sequence[Rule], record: Sequence[str] | str) -> set[str]:
        """The statistics of routers that rules and recorded signals can need, whatever scalars will come."""
        names = list(self.signals if record == "all" else record)
        for atom in dict.fromkeys(atom for rule in rules for atom in variables(rule.formula)):
            with contextlib.suppress(UnknownNameError):  # it may be the name of a scalar
                names.append(self.predicate(atom).signal)
        needs = {"load" if self.layout.k_known else "first"}
        for name in names:
            signal = self.signals.get(name)
            if isinstance(signal, WindowSignal):
                signal = self.signals.get(signal.needs[0])
            if isinstance(signal, RouterSignal) and not signal.missing(
                self.layout.metrics, self.layout.k_known
            ):
                needs |= set(signal.needs)
        return needs - {"recent_load", TOKENS}

    def _computes(self, name: str) -> bool:
        """Whether a signal over parameters or gradients finds in them what it is about."""
        signal = self.signals[name]
        if set(signal.needs) & set(TREES):
            read = {k: v for k, v in self._metrics.items() if k in ROUTER_METRICS or k in signal.needs}
            leaves, tree = jax.tree.flatten(read)
            arrays = {i: leaf for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")}

            def compute(arrays: dict[int, Any]) -> Any:
                return signal.compute(tree.unflatten([arrays.get(i, leaf) for i, leaf in enumerate(leaves)]))

            try:
                jax.eval_shape(compute, arrays)
            except MissingSignalError:
                return False
        return True

    def concluded(self, rules: Sequence[Rule]) -> tuple[str, ...]:
        """The names that rules conclude, see `conclusions`."""
        return concluded(rules, partial(is_measured, own=self._predicates))

    def choose(self, rules: Sequence[Rule], optional: Sequence[Rule]) -> list[Rule]:
        """The rules that can be evaluated: all of `rules`, and of `optional` those with their signals.

        A rule over each concluded name that has none is added, so that it has a row.

        Raises:
            UnknownNameError, MissingSignalError: one of `rules` cannot be. Of `optional` such rules are
                left out, with one warning that says what to pass.
            RulebookError: a rule has the name of a conclusion, and is not about it.
        """
        given = ", ".join(sorted(self.layout.metrics)) or "none"
        left_out: dict[str, list[str]] = {}
        kept, every = [*rules, *optional], self.concluded([*rules, *optional])
        while True:  # until no rule rests on a conclusion whose axioms were left out
            names, before = self.concluded(kept), kept
            kept = []
            for rule in before:
                own = any(rule is mine for mine in rules)
                try:
                    signal, what = self._gap(rule, names)
                    if what and not own and signal not in self.signals.keys() | self.layout.metrics:
                        what = f"'{signal}' as a scalar"  # whoever wrote the book did not misspell it
                    advice = f"pass {what} for "
                except UnknownNameError as error:
                    if own:
                        raise
                    if not set(every).isdisjoint(variables(rule.formula)):
                        continue  # its axioms are told of
                    signal, what, advice = "", str(error), f"{error} Hence without "
                if not what and not own and (signal := self._not_found(rule, names)):
                    what = f"'{signal}' as a scalar"
                    advice = f"the parameters' paths do not show what {signal} is about, so pass {what} for "
                if what and own:
                    raise MissingSignalError(
                        f"rule '{rule.name}' needs the signal '{signal}', which the metrics of this step do "
                        f"not give: pass {what}. They are: {given}."
                    )
                if what:
                    left_out.setdefault(advice, []).append(rule.name)
                else:
                    kept.append(rule)
            if len(kept) == len(before):
                break
        if left_out:
            told = [advice + ", ".join(names) for advice, names in left_out.items()]
            log.warning(
                "rules without their signals are left out:%s", "".join(f"\n  {each}" for each in told)
            )
        return [*kept, *_rows_of(names, kept)]

    def _gap(self, rule: Rule, names: Sequence[str]) -> tuple[str, str]:
        """(signal, what to pass) for the first signal of a rule that cannot be computed, else empty."""
        for name in dict.fromkeys(variables(rule.formula)):
            if name in names:
                continue
            try:
                signal = self.predicate(name).signal
            except UnknownNameError as error:
                raise UnknownNameError(f"rule '{rule.name}': {error}") from None
            if what := self.missing(signal):
                return signal, what
        return "", ""

    def _not_found(self, rule: Rule, names: Sequence[str]) -> str:
        """The first signal of a rule over parameters or gradients that finds in them nothing it is about."""
        atoms = (name for name in variables(rule.formula) if name not in names)
        signals = dict.fromkeys(self.predicate(name).signal for name in atoms)
        return next((name for name in signals if not self._computes(name)), "")


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array | np.ndarray) else leaf


def _rows_of(names: Sequence[str], rules: Sequence[Rule]) -> list[Rule]:
    """A rule, without a kind, over each concluded name that no rule is called by."""
    by_name = {rule.name: rule for rule in rules}
    for name in names:
        if (same := by_name.get(name)) and (is_axiom(same, names) or name not in variables(same.formula)):
            raise RulebookError(
                f"'{name}' is what a rule concludes, and the name of another thing: {same.formula}. The "
                f"conclusion has a row of its own under this name. Rename the rule; a rule '{name}' may only "
                f"say how the conclusion is judged, for instance {name} = '0.8 :: {name}' with its kind."
            )
    return [Rule(name, Var(name)) for name in names if name not in by_name]
