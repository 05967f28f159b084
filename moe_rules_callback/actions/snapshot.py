"""The raw routing around an alert, in a file.

    with np.load("runs/demo/snapshots/step-320.npz") as file:
        file["rule"], file["alert_step"], file["step"]    # what fired, in which step, the steps that are here
        file["312/router_probs/block_0"]                  # as on_step got it in step 312

`on_step` hands over arrays on the device. The last of them are kept alive, no more; only for an alert are
they brought to the host, on the audit's own thread.
"""

from __future__ import annotations

import logging
import threading
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from ..alerts import Alert
from ..errors import PluginError
from ..formula import Severity
from ..hookspecs import hookimpl
from ..paths import AnyPath, as_path
from ..records import Records, Run
from .action import Action

log = logging.getLogger("moe_rules_callback")
ROUTING = ("router_probs", "router_logits", "expert_index", "expert_load", "intermediates")
KEPT = (*ROUTING, "token_mask", "loss")


@dataclass(frozen=True)
class _Call:
    """What one call of `on_step` brought: its arrays, and its number since the run began."""

    number: int
    step: Any
    leaves: dict[str, Any]


class SnapshotRouting(Action):
    """Writes probabilities, chosen experts and loss of the steps around an alert to `logdir`/snapshots.

    The steps are those before and after the alert was noticed, which is up to `flush_every` steps or 10
    seconds after its own: with a small `flush_every`, or a rule that keeps firing, they show it. Up to
    3 x `rows` steps are held on the devices. With several processes there is what process 0 can see.

    An audit inside the step has no `on_step`: there call `keep(metrics, step)` after each step. A function
    that is watched gives no arrays away, so that there is nothing to write.

    Args:
        on: the least severity of the rules that it acts on, or their names.
        rows: steps to write before it was noticed, and as many after.
        after: rows in a row that one of them must have fired in. It writes once in each such stretch.
        cooldown: rows in which it does not write again.
    """

    deed = "write a snapshot of the routing"

    def __init__(
        self,
        on: Severity | Sequence[str] = "warning",
        *,
        rows: int = 8,
        after: int = 1,
        cooldown: int = 1000,
    ) -> None:
        super().__init__(on, after=after, cooldown=cooldown)
        if rows < 1:
            raise ValueError(f"rows is {rows}; it counts steps before and after an alert, from 1 on.")
        self._rows = rows

    def start(self, run: Run) -> None:
        super().start(run)
        if run.logdir is None:
            raise PluginError(
                "SnapshotRouting writes files, and this callback has no place for them: pass logdir=."
            )
        self._folder = as_path(run.logdir) / "snapshots"
        self._first_step: int | None = None

    def bind(self, requests: Any, dry_run: bool) -> None:
        super().bind(requests, dry_run)
        self._lock = threading.Lock()
        self._count = 0
        self._recent: deque[_Call] = deque(maxlen=self._rows)
        self._alert: Alert | None = None  # whose snapshot is being collected
        self._calls: list[_Call] = []
        self._wanted = 0
        self._told_deleted = False

    @hookimpl(specname="on_step")
    def keep(self, metrics: Mapping[str, Any], step: Any) -> None:
        """Keep the arrays of a step for a while.

        Args:
            metrics: as for `RuleAuditCallback.on_step`.
            step: its number; None: one more than the last.
        """
        if self.dry_run or jax.process_index():
            return
        call = _Call(self._count, step, dict(_leaves(metrics)))
        if self._count == 0:
            _tell_memory(call, self._rows)
        self._count += 1
        with self._lock:
            self._recent.append(call)
            if self._alert is not None and len(self._calls) < self._wanted:
                self._calls.append(call)

    @hookimpl
    def on_records(self, records: Records) -> None:
        if self._first_step is None and len(records):
            self._first_step = int(records.step[0])
        if self._alert is not None and len(self._calls) >= self._wanted:
            self._write()
        super().on_records(records)

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        if self._alert is not None:
            self._write()
        self._recent.clear()

    def act(self, alert: Alert) -> None:
        with self._lock:
            if self._alert is None:
                self._alert, self._calls = alert, list(self._recent)
                self._wanted = len(self._calls) + self._rows

    def _write(self) -> None:
        with self._lock:
            alert, calls = self._alert, self._calls
            self._alert, self._calls = None, []
        assert alert is not None
        if not any(name.startswith(ROUTING) for call in calls for name in call.leaves):
            log.warning(
                "no snapshot of the routing %s: on_step was given no router arrays. A watched function gives "
                "none away; inside the step hand them to SnapshotRouting.keep(metrics, step).",
                self.why(alert),
            )
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        path = _free(self._folder / f"step-{alert.step}.npz")
        steps = [self._step(call) for call in calls]
        part = path.with_suffix(".part")  # a file that is there is whole
        with part.open("wb") as written, zipfile.ZipFile(written, "w") as file:
            _add(file, "rule", np.array(alert.rule.name))
            _add(file, "alert_step", np.array(alert.step))
            _add(file, "step", np.array(steps, np.int64))
            gone = [
                f"{step}/{name}"
                for step, call in zip(steps, calls, strict=True)
                for name, leaf in call.leaves.items()
                if not _add_leaf(file, f"{step}/{name}", leaf)
            ]
        part.rename(str(path))
        log.warning("routing of steps %d to %d is in %s, %s", steps[0], steps[-1], path, self.why(alert))
        if gone and not self._told_deleted:
            self._told_deleted = True
            log.warning(
                "%d arrays are missing in it, such as %s: they were donated to a later step. Hand over "
                "arrays that the step returns and does not take in again.",
                len(gone), gone[0],
            )  # fmt: skip

    def _step(self, call: _Call) -> int:
        """A step's number; those that the trainer did not number follow the first row."""
        return int(call.step) if call.step is not None else (self._first_step or 0) + call.number


def _leaves(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The arrays worth keeping, by name."""
    for name in KEPT:
        for path, leaf in jax.tree_util.tree_leaves_with_path(metrics.get(name)):
            dtype = getattr(leaf, "dtype", np.dtype(float))
            if not jnp.issubdtype(dtype, jax.dtypes.extended):  # random keys
                yield (
                    jax.tree_util.keystr((jax.tree_util.DictKey(name), *path), simple=True, separator="/"),
                    leaf,
                )


def _tell_memory(call: _Call, rows: int) -> None:
    held = rows * sum(getattr(leaf, "nbytes", 0) for leaf in call.leaves.values()) / 2**20
    log.info(
        "SnapshotRouting keeps the routing of %d steps: %.1f MiB, and up to %.1f MiB around an alert",
        rows, held, 3 * held,
    )  # fmt: skip


def _add_leaf(file: zipfile.ZipFile, name: str, leaf: Any) -> bool:
    """Add an array, or what of it lies on this process; False if it was deleted."""
    try:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            _add(file, name, np.asarray(leaf))
            return True
        parts = {_slices(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
        for where, data in parts.items():
            _add(file, f"{name}{where}", np.asarray(data))
        return True
    except RuntimeError:
        if leaf.is_deleted():
            return False
        raise


def _slices(index: Sequence[slice], shape: Sequence[int]) -> str:
    """[0:512, 0:64]"""
    ranges = (each.indices(size) for each, size in zip(index, shape, strict=True))
    return f"[{', '.join(f'{start}:{stop}' for start, stop, _ in ranges)}]"


def _add(file: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """One array in the format of `np.savez`; bfloat16 and its like, which NumPy does not know, as float32."""
    if array.dtype.kind == "V":
        array = array.astype(np.float32)
    with file.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(cast(IO[bytes], member), array, allow_pickle=False)


def _free(path: AnyPath) -> AnyPath:
    """The path, with a number if there is such a file."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free
