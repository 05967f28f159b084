"""Rules compiled into a pure pair, for use inside a jitted training step.

    audit = Audit({"specialised": "0.85 :: high_routing_confidence & low_activation_entropy"})
    state = audit.init(metrics)                       # real metrics, or jax.ShapeDtypeStruct

    @jax.jit
    def train_step(params, state, batch):
        ...
        return params, audit.update(state, {"loss": loss, "router_probs": probs})

`update` never waits for the host. Finished rows stay in a ring inside the state until somebody drains
them; `RuleAuditCallback` does, and does all of this by itself when it is called beside the step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pluggy

from . import plugins
from .checks import check_dtypes, named, step_number
from .errors import MetricsError, PluginError
from .metrics import collect
from .plan import Plan
from .records import Records, Schema
from .rulebook import Source, load_rules
from .signals import Signal
from .state import AuditState, unpack
from .summaries import summaries
from .vocabulary import Layout, Vocabulary

__all__ = ["Audit", "AuditState"]


class Audit:
    """Rules, compiled for the metrics that `init` is shown.

    Args:
        rules: a mapping name -> text, a list of texts, the name of a shipped book ("nano_moe",
            "router_health"), the path of a TOML rule file, or None for the book "router_health".
        top_k: experts that a token uses, where the metrics have no `expert_index`.
        layer_axis: axis of the router arrays that counts layers, when they are stacked. None: all axes
            but the last are tokens.
        signals: signals to record besides those that the rules use, or "all".
        max_experts: experts whose share of the load is recorded.
        rows: rows that the state holds until they are drained.
        every_n: audit the steps whose number is a multiple of this, and pass over the others. Windows count
            rows, warm-ups count steps.
        plugin_manager: of `get_plugin_manager`; None: a new one.

    Raises:
        RuleSyntaxError, RulebookError, UnknownNameError: the rules cannot be read.
        PluginError: plugins contradict each other.
        ValueError: `every_n` is less than 1.
    """

    def __init__(
        self,
        rules: Source = None,
        *,
        top_k: int | None = None,
        layer_axis: int | None = None,
        signals: Sequence[str] | str = (),
        max_experts: int = 256,
        rows: int = 256,
        every_n: int = 1,
        plugin_manager: pluggy.PluginManager | None = None,
    ) -> None:
        if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
            raise MetricsError(f"top_k is {top_k!r}; it counts the experts that a token uses: 1, 2, ..")
        if every_n < 1:
            raise ValueError(f"every_n is {every_n}; it counts steps: 1 audits all, 10 every tenth.")
        self._manager = plugin_manager or plugins.get_plugin_manager()
        self.top_k, self._layer_axis, self.every_n = top_k, layer_axis, every_n
        book = load_rules(rules)
        given = {} if book.complete else plugins.contributions(self._manager, "provide_rules")
        added = load_rules(given).rules
        if twice := {rule.name for rule in book.rules} & given.keys():
            raise PluginError(f"a plugin and the rules both name a rule '{twice.pop()}'. Rename yours.")
        self._predicates = plugins.contributions(self._manager, "provide_predicates") | dict(book.predicates)
        self._signals = {
            name: signal if isinstance(signal, Signal) else Signal(signal, ("*",))
            for name, signal in plugins.contributions(self._manager, "provide_signals").items()
        }
        self._settings: dict[str, Any] = {
            "rules": () if book.shipped else book.rules,
            "optional": (*(book.rules if book.shipped else ()), *added),
            "record": signals if signals == "all" or not isinstance(signals, str) else (signals,),
            "max_experts": max_experts,
            "ring": rows,
        }
        self._plan: Plan | None = None

    @property
    def plan(self) -> Plan:
        """What `init` compiled."""
        if self._plan is None:
            raise MetricsError(
                "the audit has not seen any metrics yet: call init(metrics) first, with real metrics or with "
                "jax.ShapeDtypeStruct, so that it knows the layers and experts."
            )
        return self._plan

    @property
    def schema(self) -> Schema:
        """What the columns of a record mean. Known after `init`."""
        return self.plan.schema

    def init(self, metrics: Mapping[str, Any]) -> AuditState:
        """State before the first step.

        Args:
            metrics: those of a step, or arrays' shapes and dtypes only; values are not looked at.

        Raises:
            UnknownNameError: a rule names a predicate that nobody defines.
            MissingSignalError: a rule of the user's own needs a metric that is not there.
            MetricsError: shapes that do not belong together.
        """
        metrics = self._adapted(metrics)
        layout = Layout.of_metrics(metrics, self.top_k, self._layer_axis)
        vocabulary = Vocabulary(layout, metrics, self._signals, self._predicates)
        self._plan = Plan(vocabulary, **self._settings)
        return self._plan.init()

    def update(self, state: AuditState, metrics: Mapping[str, Any], step: Any = None) -> AuditState:
        """Take in a step whose number is a multiple of `every_n`. Pure; may be jitted, scanned and sharded.

        Args:
            state: of `init` or of the step before.
            metrics: as those given to `init`; token axes may have any length.
            step: number of the step, an integer []; None, or an array's number that is below 0 or not below
                2**31: one more than the last.

        Raises:
            MetricsError: layers, experts or scalars differ from those given to `init`; a step that is no
                whole number.
        """
        if step is not None:
            step = _counted(step, state.step)
        if self.every_n == 1:
            return self.row(state, metrics, step)
        step = state.step + 1 if step is None else step
        return jax.lax.cond(
            step % self.every_n == 0,
            lambda: self.row(state, metrics, step),
            lambda: replace(state, step=step),
        )

    def row(self, state: AuditState, metrics: Mapping[str, Any], step: Any = None) -> AuditState:
        """`update`, whatever the number of the step."""
        # A training step may have been made strict about promotion; this is not its code.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            metrics = self._adapted(metrics)
            routers = summaries(metrics, self.top_k, self._layer_axis) or collect(
                metrics, self.top_k, self._layer_axis
            )
            self._compare(Layout.of(metrics, routers))
            return self.plan.update(state, metrics, routers, step)

    def select(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics that the rules and signals read; the others need not enter a jitted function."""
        metrics = named(metrics)
        if "*" in (needed := self.plan.metrics):
            return metrics
        return {key: value for key, value in metrics.items() if key in needed or key == "intermediates"}

    def statistics(self, metrics: Mapping[str, Any]) -> list[str]:
        """The statistics that a `Summary` must hold to stand for these router metrics.

        Args:
            metrics: arrays, or summaries without values; what scalars the steps will bring need not be known.
        """
        layout = Layout.of_metrics(metrics, self.top_k, self._layer_axis)
        vocabulary = Vocabulary(layout, metrics, self._signals, self._predicates)
        rules = [*self._settings["rules"], *self._settings["optional"]]
        return sorted(vocabulary.statistics(rules, self._settings["record"]))

    def records(self, rows: np.ndarray, numbers: np.ndarray, wall_time: np.ndarray) -> Records:
        """Rows of a drained ring, unpacked on the host.

        Args:
            rows: the ring, int32 [R, ..].
            numbers: int [n], which rows of the run, oldest first.
            wall_time: float64 [n], seconds since the epoch.
        """
        schema = self.schema
        r, s, y, e = len(schema.rules), len(schema.signals), len(schema.layers), schema.experts
        shapes = {
            "truth_layer": (r, y, 2), "signal_value": (s, y), "signal_pooled": (s,), "expert_share": (y, e),
        }  # fmt: skip
        step, state, values = unpack(rows[numbers % len(rows)], r)
        arrays, begin = {}, 0
        for name, shape in shapes.items():
            end = begin + math.prod(shape)
            arrays[name], begin = values[:, begin:end].reshape(len(numbers), *shape), end
        return Records(schema, step=step, state=state, wall_time=wall_time, **arrays)

    def _adapted(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics with a trainer's own object replaced by the probabilities that an adapter finds in it."""
        metrics = named(metrics)
        source = metrics.pop("intermediates", None)
        probs = metrics.get("router_probs")
        if probs is not None and not isinstance(probs, Mapping | Sequence) and not hasattr(probs, "shape"):
            source = probs
        if source is not None:
            metrics["router_probs"] = plugins.find_router_probs(self._manager, source)
        check_dtypes(metrics)
        return metrics

    def _compare(self, layout: Layout) -> None:
        before = self.plan.layout
        if layout.routers != before.routers:
            raise MetricsError(
                f"the routers differ from those of the first step: (layers, experts, experts per token) are "
                f"{layout.routers or 'none'}, and were {before.routers or 'none'}. Pass the same layers at "
                f"every step, and make a new audit for another model."
            )
        if absent := self.plan.metrics - layout.metrics - {"*"}:
            raise MetricsError(
                f"the metrics of this step lack {', '.join(sorted(absent))}, which the first step had. "
                f"Pass every metric at every step; float('nan') stands for a scalar that has no value now."
            )


def _counted(step: Any, last: jax.Array) -> jax.Array:
    """int32 [], the number of a step; a number of an array that is none counts as none: a row of a negative
    step would pass for one that is not written."""
    step = step_number(step)
    if isinstance(step, int):
        return jnp.int32(step)
    number = step.astype(jnp.int32)
    return jnp.where((number >= 0) & (number.astype(step.dtype) == step), number, last + 1)
