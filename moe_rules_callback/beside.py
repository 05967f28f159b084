"""The audit beside the step: one jitted function, dispatched once a step from the training thread."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .audit import Audit
from .errors import MetricsError
from .state import AuditState

log = logging.getLogger("moe_rules_callback")


class Beside:
    """An audit's update, compiled for the metrics of the first step and the devices that they are on.

    Args:
        audit: whose update is called.
        metrics: those of the first step.
        last_step: number of the step before it; -1 if there was none.

    Raises:
        MetricsError: called inside a function that JAX traces, or with metrics that make no sense.
    """

    def __init__(self, audit: Audit, metrics: Mapping[str, Any], last_step: int = -1) -> None:
        state = replace(audit.init(metrics), step=jnp.int32(last_step))
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(metrics)):
            raise MetricsError(
                "on_step was called inside a function that JAX traces, where it would run once and never "
                "again. Return the metrics from the step and call on_step in the loop; or carry a state "
                "through it, state = audit.update(state, metrics), and call audit.drain(state) in the loop."
            )
        # Small and read by one process, the state is replicated over the devices of sharded metrics.
        leaves = jax.tree.leaves(audit.select(metrics))
        shardings = (getattr(leaf, "sharding", None) for leaf in leaves)
        named = (s for s in shardings if isinstance(s, jax.sharding.NamedSharding) and s.num_devices > 1)
        mesh = next((s.mesh for s in named), None)
        whole = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._state = state if whole is None else jax.device_put(state, whole)
        self._update = jax.jit(audit.update, donate_argnums=0, out_shardings=whole)
        self._audit = audit
        self._shown = set(metrics)  # metrics of the first step, and later ones that were reported
        self._last_step, self._told = last_step, False

    def step(self, metrics: Mapping[str, Any], step: Any) -> AuditState:
        """Take in a step; returns the new state before the device has computed it."""
        self._state = self._update(self._state, self._complete(metrics), self._checked(step))
        return self._state

    def _complete(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What the rules read; a scalar that this step does not have is NaN."""
        chosen = self._audit.select(metrics)
        for name in self._audit.plan.layout.scalars:
            value = chosen.get(name, math.nan)
            if isinstance(value, int | float | np.generic | np.ndarray):
                # One dtype: 1, 0.5 and an absent scalar share a compilation, and 2**31 fits.
                chosen[name] = np.float32(value)
        if late := metrics.keys() - self._shown:
            self._shown |= late
            log.warning(
                "not recorded, because the first step did not have it: %s. Pass float('nan') for what has no "
                "value yet.",
                ", ".join(sorted(late)),
            )
        return chosen

    def _checked(self, step: Any) -> Any:
        """A step's number; that of an array is taken as it is, since looking would wait for the device."""
        if step is None or isinstance(step, jax.Array):
            self._last_step += 1
            return step
        try:
            number = operator.index(step)
        except TypeError:
            number = -1
        if not 0 <= number < 2**31:
            raise MetricsError(f"step is {step!r}; it is a whole number, at least 0 and below 2**31.")
        if number <= self._last_step and not self._told:
            self._told = True
            log.warning(
                "step %d comes after step %d: rows are kept in the order in which they came, but warm-ups "
                "and plots go by the number. Count steps over the whole run, not over an epoch.",
                number, self._last_step,
            )  # fmt: skip
        self._last_step = number
        return np.int32(number)
