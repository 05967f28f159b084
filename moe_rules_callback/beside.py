"""The audit beside the step: one jitted function, dispatched once a step or once for a block of steps."""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Mapping, Sequence
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
Step = tuple[Mapping[str, Any], Any]  # metrics, and the step's number or None


def step_number(step: Any) -> int:
    """A step's number, a Python int; looking at that of an array waits for the device.

    Raises:
        MetricsError: it is no whole number, or out of range.
    """
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if not 0 <= number < 2**31:
        raise MetricsError(f"step is {step!r}; it is a whole number, at least 0 and below 2**31.")
    return number


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
        named = (s for s in shardings if isinstance(s, jax.sharding.NamedSharding))
        mesh = next((s.mesh for s in named), None)
        whole = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        # Not device_put: over several processes it compares the values, and NaN is not equal to NaN.
        self._state = state if whole is None else jax.jit(lambda s: s, out_shardings=whole)(state)
        self._row = jax.jit(audit.row, donate_argnums=0, out_shardings=whole)
        self._update = jax.jit(audit.update, donate_argnums=0, out_shardings=whole)
        self._block = jax.jit(self._scanned, donate_argnums=0, out_shardings=whole)
        self._audit = audit
        self._shown = set(metrics)  # metrics of the first step, and later ones that were reported
        self._last_step, self._told = last_step, False

    def due(self, steps: Sequence[Step]) -> list[Step]:
        """Those steps that `every_n` does not leave out, with their numbers checked. The number of an array
        is not looked at, since that would wait for the device, which decides itself then."""
        found = []
        for metrics, step in steps:
            number = self._checked(step)
            if number is None and (self._audit.every_n > 1 or len(steps) > 1):
                number = np.int32(self._last_step)
            if not isinstance(number, np.integer) or number % self._audit.every_n == 0:
                found.append((metrics, number))
        return found

    def step(self, metrics: Mapping[str, Any], number: Any) -> AuditState:
        """Take in a step that is due; returns the new state before the device has computed it."""
        update = self._update if isinstance(number, jax.Array) else self._row
        self._state = update(self._state, self._complete(metrics), number)
        return self._state

    def block(self, rows: Sequence[Step]) -> AuditState:
        """Take in steps that are due and whose metrics are on the host, as `step` would one by one."""
        chosen, numbers = [self._complete(metrics) for metrics, _ in rows], [number for _, number in rows]
        if len({jax.tree.structure(metrics) for metrics in chosen}) == 1:
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *chosen)
            self._state = self._block(self._state, stacked, np.stack(numbers))
        else:
            for metrics, number in zip(chosen, numbers, strict=True):
                self._state = self._row(self._state, metrics, number)
        return self._state

    def _scanned(self, state: AuditState, metrics: Mapping[str, Any], numbers: jax.Array) -> AuditState:
        """`Audit.row` over a leading axis."""
        rows = metrics, numbers
        return jax.lax.scan(lambda state, row: (self._audit.row(state, *row), None), state, rows)[0]

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

    def _checked(self, step: Any) -> np.int32 | jax.Array | None:
        """A step's number; None stands for one more than the last."""
        if step is None or isinstance(step, jax.Array):
            self._last_step += 1
            return step
        number = step_number(step)
        if number <= self._last_step and not self._told:
            self._told = True
            log.warning(
                "step %d comes after step %d: rows are kept in the order in which they came, but warm-ups "
                "and plots go by the number. Count steps over the whole run, not over an epoch.",
                number, self._last_step,
            )  # fmt: skip
        self._last_step = number
        return np.int32(number)
