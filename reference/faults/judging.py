"""What rules, and what simpler detectors, say about the recorded runs.

    judged = judge(load(runs, directory), "router_health")     # alarms of each run, in seconds

Runs of one shape and length are replayed together, as one vectorised program.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import xarray as xr

from moe_rules_callback import Audit
from moe_rules_callback.alerts import Watch
from moe_rules_callback.records import Records
from moe_rules_callback.replay import metrics_of
from moe_rules_callback.rulebook import Source, load_rules

from .catalogue import FAULTS
from .record import open_run
from .runs import WARM, Run


class Alarm(NamedTuple):
    """A detector speaks: at which step, and which illness or rule it names."""

    step: int
    name: str


class Judged(NamedTuple):
    """A run and the alarms of a detector, in their order."""

    run: Run
    alarms: tuple[Alarm, ...]

    @property
    def onset(self) -> int:
        """Step from which an alarm is right; 0 for a run without a fault."""
        return _onset(self.run)


Loaded = Sequence[tuple[Run, xr.Dataset]]


def load(runs: Iterable[Run], directory: Path) -> Loaded:
    """The recorded runs."""
    return [(run, open_run(directory, run)) for run in runs]


def judge(loaded: Loaded, rules: Source) -> list[Judged]:
    """The alarms of a rule book. What a rule watches before its warm-up is over raises none."""
    found: dict[str, Judged] = {}
    for group in _alike(loaded):
        for (run, _), records in zip(group, _replayed([history for _, history in group], rules), strict=True):
            alerts = (alert for alert in Watch(records.schema)(records) if alert.ended is None)
            found[run.name] = Judged(run, tuple(Alarm(alert.step, alert.rule.name) for alert in alerts))
    return [found[run.name] for run, _ in loaded]


def _alike(loaded: Loaded) -> Iterator[Loaded]:
    groups: dict[tuple[int, int, int], list[tuple[Run, xr.Dataset]]] = defaultdict(list)
    for run, history in loaded:
        groups[run.experts, run.top_k, run.steps].append((run, history))
    yield from groups.values()


def _replayed(histories: Sequence[xr.Dataset], rules: Source) -> Iterator[Records]:
    """`replay_history` of several, all with the same signals, layers and rows."""
    metrics = jax.tree.map(lambda *arrays: np.stack(arrays), *map(metrics_of, histories))
    steps = np.stack([history["step"].values for history in histories]).astype(np.int32)
    signals = tuple(histories[0]["signal"].values.tolist())
    audit = Audit(load_rules(rules), rows=steps.shape[1], signals=signals)
    start = audit.init(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[2:], x.dtype), metrics))

    def scan(metrics: Any, steps: jax.Array) -> Any:
        def update(state: Any, row: Any) -> tuple[Any, None]:
            return audit.update(state, *row), None

        return jax.lax.scan(update, start, (metrics, steps))[0].rows

    rows = jax.device_get(jax.jit(jax.vmap(scan))(audit.select(metrics), steps))
    for i in range(len(histories)):
        numbers = np.arange(steps.shape[1])
        one = jax.tree.map(partial(lambda i, x: x[i], i), rows)
        yield audit.records(one, numbers, np.full(len(numbers), np.nan))


# Detectors to compare with.

HELD = 50  # rows that a threshold of the battery must hold


def fixed_thresholds(loaded: Loaded) -> list[Judged]:
    """The usual thresholds of routers' dashboards, each held for 50 rows after the warm-up."""
    return [Judged(run, _sorted(_thresholds(history))) for run, history in loaded]


def _thresholds(history: xr.Dataset) -> Iterator[Alarm]:
    def worst(signal: str, of: str = "max") -> np.ndarray:
        return getattr(history["signal_value"].sel(signal=signal), of)("layer").values

    share = history["expert_share"].values  # [step, layer, E]
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum(-1).min(-1) / np.log(share.shape[-1])
    broken = {
        "dead_expert": worst("dead_expert_fraction") > 0,
        "router_collapse": worst("max_violation") > 1,
        "weak_balancing": entropy < 0.95,
        "starved_router": worst("router_gradient_share", "min") < 0.01,
        "aux_dominated": worst("router_mutual_information", "min") < 0.1,
        "duplicated_experts": worst("expert_weight_cosine") > 0.3,
        "router_saturation": worst("router_logit_rms") > 8,
        "capacity_overflow": worst("dropped_token_fraction") > 0.03,
    }
    steps = history["step"].values
    for name, rows in broken.items():
        rows = rows & (steps >= WARM)
        held = np.convolve(rows, np.ones(HELD), "valid") >= HELD
        if held.any():
            yield Alarm(int(steps[held.argmax() + HELD - 1]), name)


def loss_spikes(loaded: Loaded) -> list[Judged]:
    """A loss more than 6 standard deviations above its last 128 rows, after the warm-up."""
    found = []
    for run, history in loaded:
        score = history["signal_value"].sel(signal="loss_spike_score").isel(layer=0).values
        at = np.flatnonzero((score > 6) & (history["step"].values >= WARM))
        alarms = (Alarm(int(i), "loss_spike") for i in at[np.diff(at, prepend=-100) > 32])
        found.append(Judged(run, tuple(alarms)))
    return found


SMOOTH = 16  # rows over which a loss is averaged before it is compared


def leaves_band(loaded: Loaded) -> list[Judged]:
    """The mean loss of 16 rows beyond what other, healthy runs of the same shape and text had at that step,
    by more than the width of their band: a dashboard with healthy runs to compare with."""
    window = np.full(SMOOTH, 1 / SMOOTH)
    smooth = {run.name: np.convolve(history["loss"].values, window, "valid") for run, history in loaded}
    healthy: dict[Any, list[str]] = defaultdict(list)
    for run, _ in loaded:
        if not run.illness:
            healthy[_shape(run)].append(run.name)
    found = []
    for run, _ in loaded:
        others = [smooth[name] for name in healthy[_shape(run)] if name != run.name]
        alarms: tuple[Alarm, ...] = ()
        if len(others) > 1:
            length = min(map(len, [*others, smooth[run.name]]))
            band, mine = np.stack([other[:length] for other in others]), smooth[run.name][:length]
            low, high = band.min(0), band.max(0)
            out = (mine > 2 * high - low) | (mine < 2 * low - high)
            at = np.flatnonzero(out & (np.arange(length) + SMOOTH - 1 >= max(WARM, _onset(run))))
            alarms = tuple(Alarm(int(i) + SMOOTH - 1, "loss") for i in at[:1])
        found.append(Judged(run, alarms))
    return found


def _shape(run: Run) -> tuple[Any, ...]:
    return run.experts, run.top_k, run.gate, run.dataset


def _onset(run: Run) -> int:
    return FAULTS[run.fault].onset if run.fault else 0


def _sorted(alarms: Iterable[Alarm]) -> tuple[Alarm, ...]:
    return tuple(sorted(alarms))
