"""The audit beside the step: one jitted function, dispatched once a step or once for a block of steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .audit import Audit
from .checks import check_alive, check_dtypes, narrow, real, step_number
from .errors import MetricsError
from .state import AuditState, restored

log = logging.getLogger("moe_rules_callback")
Step = tuple[Mapping[str, Any], Any]  # metrics, and the step's number or None
TRACED = (
    "on_step was called inside a function that JAX traces, where it would run once and never again. Return "
    "the metrics from the step and call on_step in the loop; or carry a state through it, state = "
    "audit.update(state, metrics), and call audit.drain(state) in the loop."
)


class Beside:
    """An audit's update, compiled for the metrics of the first step and the devices that they are on.

    Args:
        audit: whose update is called.
        metrics: those of the first step.
        last_step: number of the step before it; -1 if there was none.

    Attributes:
        state: after the last step that was dispatched.

    Raises:
        MetricsError: called inside a function that JAX traces, or with metrics that make no sense.
    """

    def __init__(self, audit: Audit, metrics: Mapping[str, Any], last_step: int = -1) -> None:
        state = replace(audit.init(metrics), step=jnp.int32(last_step))
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((metrics, state))):
            raise MetricsError(TRACED)
        # Small and read by one process, the state is replicated over the devices of sharded metrics.
        leaves = jax.tree.leaves(audit.select(metrics))
        shardings = (getattr(leaf, "sharding", None) for leaf in leaves)
        named = (s for s in shardings if isinstance(s, jax.sharding.NamedSharding))
        mesh = next((s.mesh for s in named), None)
        whole = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        # Not device_put: over several processes it compares the values, and NaN is not equal to NaN.
        self._placed = jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=whole)
        self.state = state if whole is None else self._placed(state)
        self._row = jax.jit(audit.row, donate_argnums=0, out_shardings=whole)
        self._update = jax.jit(audit.update, donate_argnums=0, out_shardings=whole)
        self._block = jax.jit(self._scanned, donate_argnums=0, out_shardings=whole)
        self._audit = audit
        index = jax.tree.leaves(metrics.get("expert_index"))
        self._wide = any(isinstance(leaf, np.ndarray) and leaf.itemsize > 4 for leaf in index)
        self._shown = set(metrics)  # metrics of the first step, and later ones that were reported
        self._last_step, self._told = last_step, False
        self._counted = False  # whether a step had a number: the first may be before the end of a resumed run

    def copy(self) -> AuditState:
        """The state, in arrays that no later step donates."""
        return self._placed(self.state)

    def restore(self, saved: Any) -> None:
        """Go on from a state that was saved, see `state.restored`."""
        state = restored(saved, self.state)
        self.state, self._last_step = self._placed(state), int(state.step)

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
        try:
            state = update(self.state, self._complete(metrics), number)
        except (RuntimeError, TypeError):
            check_dtypes(metrics)
            check_alive({**metrics, "step": number})
            raise
        if isinstance(state.row, Tracer):
            raise MetricsError(TRACED)
        self.state = state
        return state

    def block(self, rows: Sequence[Step]) -> AuditState:
        """Take in steps that are due and whose metrics are on the host, as `step` would one by one."""
        chosen, numbers = [self._complete(metrics) for metrics, _ in rows], [number for _, number in rows]
        if len({jax.tree.structure(metrics) for metrics in chosen}) == 1:
            stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *chosen)
            self.state = self._block(self.state, stacked, np.stack(numbers))
        else:
            for metrics, number in zip(chosen, numbers, strict=True):
                self.state = self._row(self.state, metrics, number)
        return self.state

    def _scanned(self, state: AuditState, metrics: Mapping[str, Any], numbers: jax.Array) -> AuditState:
        """`Audit.row` over a leading axis."""
        rows = metrics, numbers
        return jax.lax.scan(lambda state, row: (self._audit.row(state, *row), None), state, rows)[0]

    def _complete(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What the rules read; a scalar that this step does not have is NaN."""
        chosen = self._audit.select(metrics)
        for name in self._audit.plan.layout.scalars:
            value = chosen.get(name, math.nan)
            if not isinstance(value, jax.Array):
                # One dtype: 1, 0.5 and an absent scalar share a compilation, and 2**31 fits.
                chosen[name] = real(value, name)
        if self._wide and "expert_index" in chosen:  # JAX would cut them to 32 bits
            chosen["expert_index"] = jax.tree.map(narrow, chosen["expert_index"])
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
        number = None if step is None else step_number(step)
        if not isinstance(number, int):
            self._last_step += 1
            return number
        if self._counted and number <= self._last_step and not self._told:
            self._told = True
            log.warning(
                "step %d comes after step %d: rows are kept in the order in which they came, but warm-ups "
                "and plots go by the number. Count steps over the whole run, not over an epoch.",
                number, self._last_step,
            )  # fmt: skip
        self._last_step, self._counted = number, True
        return np.int32(number)
