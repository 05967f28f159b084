"""The audit of a history, stopped before one row: what does it say of other values there?"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import logic
from ..audit import Audit
from ..records import State
from ..replay import metrics_of
from ..rulebook import Rulebook
from ..state import AuditState

if TYPE_CHECKING:
    import xarray as xr

BATCH = 64  # candidates that are judged together


class Moment:
    """The last row of a history, judged anew.

    Args:
        history: of `open_history`, up to this row.
        rules: R of them, and their predicates.
        layer: number of the layer whose past is kept.

    Attributes:
        history, rules: as given.
        layers, sizes: names of the Y layers, and their (E, k).
        past: float32 [rows before, R, 2], truth in `layer`.
        now: float32 [R, Y, 2], truth in this row.
    """

    def __init__(self, history: xr.Dataset, rules: Rulebook, layer: int) -> None:
        self.history, self.rules = history, rules
        self.layers: list[str] = history["layer"].values.tolist()
        self.sizes: list[tuple[int, int | None]] = json.loads(history.attrs["routers"]) or [(1, 1)]
        shape = (len(rules.rules), len(self.layers), 2)
        audit, metrics = Audit(rules, rows=1), metrics_of(history)
        start = audit.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), metrics))
        chosen, steps = audit.select(metrics), history["step"].values.astype(np.int32)

        def update(state: AuditState, metrics: Any, step: Any) -> tuple[AuditState, jax.Array]:
            state = audit.update(state, metrics, step)
            first = 1 + len(rules.rules)
            bits = state.rows[0, first : first + np.prod(shape)]
            return state, jax.lax.bitcast_convert_type(bits, jnp.float32).reshape(shape)

        @jax.jit
        def follow(state: AuditState, rows: tuple[Any, jax.Array]) -> tuple[AuditState, jax.Array]:
            def row(state: AuditState, row: tuple[Any, jax.Array]) -> tuple[AuditState, jax.Array]:
                state, truth = update(state, *row)
                return state, truth[:, layer]

            return jax.lax.scan(row, state, rows)

        before, past = follow(start, jax.tree.map(lambda x: x[:-1], (chosen, steps)))
        self.past = np.asarray(past)
        self._metrics = jax.tree.map(lambda x: x[-1], chosen)
        self._judge = jax.jit(lambda batch: jax.lax.map(lambda row: update(before, row, steps[-1])[1], batch))
        self.now = self._of(self._repeated())[0]

    def layered(self, signal: str) -> bool:
        """Whether each layer has a value of its own."""
        return signal not in self._metrics

    def value(self, signal: str) -> np.ndarray:
        """float32 [Y], in this row."""
        if self.layered(signal):
            return self._metrics["recorded"].values[signal][:-1]
        return np.full(len(self.layers), self._metrics[signal], np.float32)

    def supposing(self, rule: int, signal: str, values: np.ndarray) -> np.ndarray:
        """Truth of a rule, had a signal other values in this row.

        Args:
            rule: its number.
            signal: its name.
            values: float32 [n, Y], n at most `BATCH`; of a signal of the whole model the first column counts.

        Returns:
            float32 [n, Y, 2].
        """
        rows = np.resize(values.astype(np.float32), (BATCH, len(self.layers)))
        batch = self._repeated()
        if self.layered(signal):
            known = batch["recorded"].values
            changed = np.concatenate([rows, known[signal][:, -1:]], axis=1)
            batch["recorded"] = replace(batch["recorded"], values=known | {signal: changed})
        else:
            batch[signal] = rows[:, 0]
        return self._of(batch)[: len(values), rule]

    def states(self, rule: int, truth: np.ndarray) -> np.ndarray:
        """int8 [..], what the rule's threshold makes of intervals [.., 2]."""
        return np.asarray(logic.classify(jnp.asarray(truth), self.rules.rules[rule].threshold))

    def verdict(self, rule: int, truth: np.ndarray) -> tuple[State, tuple[float, float]]:
        """State and truth of the whole model, of the truth [Y, 2] in its layers."""
        whole = truth.max(0) if self.rules.rules[rule].kind == "risk" else truth.min(0)
        return State(int(self.states(rule, whole))), (float(whole[0]), float(whole[1]))

    def _repeated(self) -> dict[str, Any]:
        """The metrics of this row, `BATCH` times."""
        return jax.tree.map(lambda x: np.broadcast_to(x, (BATCH, *np.shape(x))), self._metrics)

    def _of(self, batch: dict[str, Any]) -> np.ndarray:
        return np.asarray(self._judge(batch))
