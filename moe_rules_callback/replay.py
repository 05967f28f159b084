"""Rules over steps that are past: the evaluator of a training run, over a table of metrics.

    records = replay({"loss": losses, "router_entropy": entropies}, {"sure": "low_router_entropy"})
    records = replay_history(open_history("runs/demo"), "nano_moe")

Every array has the rows on its first axis. Rows are scanned in blocks, so that a million of them take
seconds and not a dispatch each.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .audit import Audit
from .checks import narrow
from .errors import HistoryError, MetricsError
from .formula import Rule
from .language import parse_rule
from .predicates import Predicate
from .records import Records
from .rulebook import Rulebook, Source
from .signals import WINDOW_SIGNALS
from .state import AuditState
from .summaries import Recorded, Summary

if TYPE_CHECKING:
    import xarray as xr

BLOCK = 4096  # rows that are scanned together


def replay(metrics: Mapping[str, Any], rules: Source = None, **options: Any) -> Records:
    """All rows at once, see `Replay`."""
    return Records.joined(Replay(metrics, rules, **options))


def replay_history(history: xr.Dataset, rules: Source = None) -> Records:
    """Judge a recorded run again, by other rules or by its own; see `Replay.of_history`."""
    return Records.joined(Replay.of_history(history, rules))


class Replay:
    """Rules over a table; iterating gives the records in blocks.

    Args:
        metrics: as `RuleAuditCallback.on_step` takes them, each array with a first axis of n rows; NumPy
            arrays, NaN where a row has no value. Signals may come by name, `expert_load` [n, E] in the
            place of probabilities.
        rules, top_k, layer_axis, signals: see `Audit`; `layer_axis` does not count the axis of rows.
        steps: int [n], rising; None: 0, 1, ..
        wall_time: float [n], seconds since the epoch; None: NaN.

    Raises:
        MetricsError: arrays of different length, or none; and what `Audit.init` raises.

    Attributes:
        audit: knows the schema of the records.
        rows: n.
    """

    def __init__(
        self,
        metrics: Mapping[str, Any],
        rules: Source = None,
        *,
        steps: Any = None,
        wall_time: Any = None,
        **options: Any,
    ) -> None:
        self._metrics = {
            key: jax.tree.map(_as_index if key == "expert_index" else _as_array, value, is_leaf=_is_numbers)
            for key, value in metrics.items()
        }
        lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(self._metrics)}
        (self.rows,) = lengths.pop() or (0,) if len(lengths) == 1 else (0,)
        if not self.rows:
            raise MetricsError(
                "there is nothing to replay, or the metrics have different numbers of rows. Every array has "
                "the rows on its first axis; NaN stands for what a row does not have."
            )
        self._steps = np.arange(self.rows) if steps is None else np.asarray(steps)
        if self._steps.dtype.kind not in "iu" or not (self._steps.min() >= 0 and self._steps.max() < 2**31):
            raise MetricsError("steps are not all whole numbers, at least 0 and below 2**31.")
        self._times = np.full(self.rows, np.nan) if wall_time is None else np.asarray(wall_time, np.float64)
        for name, given in (("steps", self._steps), ("wall_time", self._times)):
            if given.shape != (self.rows,):
                raise MetricsError(
                    f"{name} has shape {given.shape}; expected one for each of {self.rows} rows."
                )
        block = min(BLOCK, self.rows)
        self.audit = Audit(rules, rows=block, **options)
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self._metrics)
        self._state, self._block = self.audit.init(row), block
        self._chosen = self.audit.select(self._metrics)

    @classmethod
    def of_history(cls, history: xr.Dataset, rules: Source = None) -> Replay:
        """Over the signals that a history holds.

        Args:
            history: of `open_history`, or of this package's records.
            rules: other rules; None: those of the history, which give the same records bit by bit.

        Raises:
            HistoryError: it has no rows, or does not say what its layers are.
        """
        if not history.sizes["step"]:
            raise HistoryError("there is nothing to replay: the history has no rows.")
        return cls(
            metrics_of(history),
            own_rules(history) if rules is None else rules,
            steps=history["step"].values,
            wall_time=history["wall_time"].values,
            signals=tuple(history["signal"].values.tolist()),
        )

    def __iter__(self) -> Iterator[Records]:
        state, run = self._state, jax.jit(partial(_scan, self.audit))
        for begin in range(0, self.rows, self._block):
            # The last block is filled up with its last row, and so needs no program of its own.
            taken = np.minimum(np.arange(begin, begin + self._block), self.rows - 1)
            block = jax.tree.map(lambda x, taken=taken: x[taken], self._chosen)
            state = run(state, block, self._steps[taken].astype(np.int32))
            numbers = np.arange(begin, min(begin + self._block, self.rows))
            yield self.audit.records(jax.device_get(state.rows), numbers, self._times[numbers])


def own_rules(history: xr.Dataset) -> Rulebook:
    """The rules that a history was recorded with, and the predicates they rest on."""
    rules = json.loads(history.attrs["rules"])
    predicates = json.loads(history.attrs.get("predicates", "{}"))
    return Rulebook(
        "history",
        tuple(_rule(name, told) for name, told in rules.items()),
        {name: Predicate(**told) for name, told in predicates.items()},
        complete=True,
    )


def _rule(name: str, told: Mapping[str, Any]) -> Rule:
    text = told["text"] or f"{told['threshold']} :: {told['formula']}"
    return parse_rule(text, name, **{key: told[key] for key in _TOLD})


_TOLD = ("kind", "warmup", "severity", "description", "cause", "next_step")


def _scan(audit: Audit, state: AuditState, block: Any, steps: jax.Array) -> AuditState:
    def update(state: AuditState, row: tuple[Any, jax.Array]) -> tuple[AuditState, None]:
        return audit.update(state, *row), None

    return jax.lax.scan(update, state, (block, steps))[0]


def _is_numbers(value: Any) -> bool:
    """Whether a list is an array in disguise, and no list of layers."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], int | float | list)


def _as_array(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind == "c":
        raise MetricsError(
            "a metric of the table is complex; pass what is meant of it, such as its absolute value."
        )
    with np.errstate(over="ignore"):  # inf marks what does not fit
        return array if array.dtype == bool else array.astype(np.float32)


def _as_index(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return narrow(array) if array.dtype.kind in "iu" else array


def metrics_of(history: xr.Dataset) -> dict[str, Any]:
    """What a history holds, as metrics: scalars of the model, signals by layer, loads of experts."""
    told = json.loads(history.attrs["signals"])
    # What looks back on others is computed again: its windows are a part of the state.
    names = [name for name in history["signal"].values.tolist() if name not in WINDOW_SIGNALS]
    # Read first: xarray would look up each value of a transposed variable on disk by its own index.
    read = history[["signal_value", "signal_pooled"]].compute().sel(signal=names)
    layered = read["signal_value"].transpose("signal", "step", "layer").values
    pooled = read["signal_pooled"].transpose("signal", "step").values
    found: dict[str, Any] = {}
    recorded: dict[str, Any] = {}
    for name, by_layer, overall in zip(names, layered, pooled, strict=True):
        if told[name]["per_layer"]:
            recorded[name] = np.concatenate([by_layer, overall[:, None]], axis=1)
        else:
            found[name] = overall
    if recorded:
        found["recorded"] = Recorded(recorded)
    if loads := _loads(history):
        found["expert_load"] = loads
    return found


def _loads(history: xr.Dataset) -> list[Summary]:
    """The share of each expert, one summary for each (E, k); NaN beyond the experts that were recorded."""
    layers = history["layer"].values.tolist()
    sizes = [tuple(size) for size in json.loads(history.attrs.get("routers", "[]"))]
    if len(sizes) != len(layers) and layers != ["model"]:
        raise HistoryError(
            f"this history has {len(layers)} layers and does not say how many experts each has (attribute "
            "'routers'): an older version wrote it, or it was changed. Look at it without other rules."
        )
    found = []
    shares = history["expert_share"].transpose("step", "layer", "expert").values if sizes else np.empty(0)
    for experts, k in dict.fromkeys(sizes):
        of = [i for i, size in enumerate(sizes) if size == (experts, k)]
        share = shares[:, of, :experts]
        share = np.pad(share, ((0, 0), (0, 0), (0, experts - share.shape[2])), constant_values=np.nan)
        # Where k is not known, the share is that of first choices; where it is 1, they are the same.
        statistics = (*(("load",) if k else ()), *(("first",) if k in (None, 1) else ()))
        tokens = np.ones(share.shape[:2], np.float32)
        names = tuple(layers[i] for i in of)
        found.append(Summary(names, experts, k, tokens, dict.fromkeys(statistics, share)))
    return found
