"""Kills runs with SIGKILL, each of which resumes the one before, and looks at what is left.

    python tests/robustness/kill_a_run.py [--kills 100] [--kind callback] [--seed 1]

A quarter of the kills comes while a run starts, a quarter while it ends, the others during a flush or at any
moment.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import killed_run
import numpy as np
import xarray as xr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moe_rules_callback.history import open_history
from moe_rules_callback.sinks import scalars
from moe_rules_callback.stores import stores

HERE = Path(__file__).parent
MOMENTS = ("start", "flush", "any", "end")
LONGEST = 120.0  # seconds that only a failing run takes


@dataclass
class Said:
    """What a run has said before it ended."""

    lines: list[str] = field(default_factory=list)

    def last(self, what: str) -> int:
        """The last step of which it said this; -1 if of none."""
        return max((int(line.rsplit(" ", 1)[1]) for line in self.lines if line.startswith(what)), default=-1)

    def count(self, what: str) -> int:
        return sum(line.startswith(what) for line in self.lines)

    def inside(self) -> set[str]:
        """The hooks that had begun and not ended: "zarr on_records"."""
        left: Counter[str] = Counter()
        for line in self.lines:
            words = line.split()
            if len(words) == 4:
                left[" ".join(words[:2])] += {"begins": 1, "ends": -1}[words[2]]
        return {hook for hook, number in left.items() if number}


class Chain:
    """Runs in one log directory, each after the other.

    Attributes:
        lives: for each row of the history, which run has made it.
        missing: for each run that was killed, steps that it had taken and the history does not hold, and how
            many batches the history had been told of.
    """

    def __init__(self, kind: str, logdir: Path, seed: int) -> None:
        self.kind, self.logdir, self.chance = kind, logdir, random.Random(seed)
        self.lives = np.zeros(0, int)
        self.life = self.checked = 0
        self.missing: list[tuple[int, int]] = []
        self.hits: Counter[str] = Counter()
        self._runs = subprocess.Popen(
            [sys.executable, str(HERE / "killed_run.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Chain:
        return self

    def __exit__(self, *exception: object) -> None:
        self._runs.kill()
        self._runs.communicate()

    def kill(self, moment: str) -> None:
        """Let a run resume, kill it, and check what is left."""
        rows = len(self.lives)
        start = None if self.chance.random() < 0.5 else max(0, rows - self.chance.randrange(40))
        length = self.chance.randrange(1, 60) if moment == "end" else 900
        said = self._live(start, rows + length, moment)
        self.hits.update(said.inside() or {"between"})
        self._check(said, rows if start is None else start)

    def complete(self, stop: int) -> None:
        """Let a run resume and come to its end."""
        said = self._live(None, stop, "")
        assert said.last("closed") == stop - 1
        self._check(said, len(self.lives))
        assert len(self.lives) == stop

    def _live(self, start: int | None, stop: int, moment: str) -> Said:
        self.life += 1
        assert self._runs.stdin
        assert self._runs.stdout
        request = (self.kind, str(self.logdir), self.life, start, stop)
        self._runs.stdin.write(f"{json.dumps(request)}\n".encode())
        self._runs.stdin.flush()
        number, delay, awaited = 1, 0.0, "zarr on_records begins"
        if moment == "start":
            awaited, delay = "pid", self.chance.uniform(0, 0.15 if self.kind == "sinks" else 1.0)
        elif moment == "flush":
            number, delay = self.chance.randrange(1, 20), self.chance.uniform(0, 0.008)
        elif moment == "any":
            delay = self.chance.uniform(0, 0.3)
        elif moment == "end":
            awaited, delay = "zarr on_train_end begins", self.chance.uniform(0, 0.01)
        said, rest, kill_at, began = Said(), b"", np.inf, time.monotonic()
        while "ended" not in said.lines:
            now = time.monotonic()
            assert now < began + LONGEST, f"life {self.life} hangs after {said.lines[-5:]}"
            if moment and kill_at == np.inf and said.count(awaited) >= number:
                kill_at = now + delay
            if now >= kill_at:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(said.last("pid"), signal.SIGKILL)
                kill_at = began + 2 * LONGEST
            if select.select([self._runs.stdout], [], [], max(0.0, min(kill_at - now, 1.0)))[0]:
                *lines, rest = (rest + os.read(self._runs.stdout.fileno(), 65536)).split(b"\n")
                said.lines += [line.decode() for line in lines]
        return said

    def _check(self, said: Said, start: int) -> None:
        held, begun = said.last("zarr on_records ends"), said.last("zarr on_records begins")
        if not (found := stores(self.logdir / "audit.zarr")):
            assert held == -1
            assert not len(self.lives)
            return
        plain = xr.open_zarr(found[-1]).load()
        rows = int((plain.step >= 0).sum())
        assert (plain.step[rows:] == -1).all()
        history = open_history(self.logdir).load()
        for name, values in history.data_vars.items():
            np.testing.assert_array_equal(plain[name][:rows], values, err_msg=str(name))
        assert history.step.values.tolist() == list(range(rows))
        value = history.signal_pooled.values[:, 0]
        lives, steps = np.floor(value).astype(int), np.arange(rows)
        np.testing.assert_array_equal(value, killed_run.x(steps, lives))
        busy = killed_run.busy_expert(steps, lives)
        np.testing.assert_array_equal(history.expert_share[:, 0], np.eye(killed_run.EXPERTS)[busy])
        assert np.isfinite(history.wall_time).all()
        # Rows that were there stay, unless they are replaced: first they go, then the new ones come.
        np.testing.assert_array_equal(lives[:start], self.lives[:start])
        new = lives[start:]
        assert (new == self.life).all() or (new == self.lives[start:rows]).all()
        assert rows > max(held, said.last("flushed"))
        assert rows <= max(begun + 1, len(self.lives))
        if begun >= 0 and said.last("closed") < 0:
            missing = max(0, said.last("taken") + 1 - rows)
            self.missing.append((missing, said.count("zarr on_records begins")))
            assert self.kind == "callback" or missing <= killed_run.FLUSH_EVERY
        self.lives, self.checked = lives, self.checked + rows
        self._check_curves(said, start)

    def _check_curves(self, said: Said, start: int) -> None:
        """TensorBoard shows each step once, and all that the sink promised, as far as each row is a point."""
        curves = EventAccumulator(str(self.logdir), size_guidance={"scalars": 0, "tensors": 1, "images": 1})
        curves.Reload()
        if "signals/x" not in curves.Tags()["scalars"]:
            assert said.last("tensorboard on_records ends") < 0
            return
        points = curves.Scalars("signals/x")
        steps, values = (
            np.array([point.step for point in points]),
            np.array([point.value for point in points]),
        )
        assert (np.diff(steps) > 0).all()
        np.testing.assert_array_equal(values, killed_run.x(steps, np.floor(values)))
        promised = range(
            start, min(said.last("tensorboard on_records ends") + 1, start + scalars.ALL_ROWS_UNTIL)
        )
        assert set(promised) <= set(steps[values >= self.life].tolist())

    def __str__(self) -> str:
        missing, batch = np.array(self.missing or [(0, 0)]).T
        partial = len([*self.logdir.rglob("*.partial")])
        return (
            f"{self.life} lives, {self.checked:,} rows looked at, {len(self.lives):,} rows in the end; "
            f"missing at a kill: median {np.median(missing):.0f}, most {missing.max()}, "
            f"after the first batch {missing[batch > 1].max(initial=0)}; "
            f"killed in {dict(self.hits.most_common())}; {partial} partial files left"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--kind", choices=("callback", "sinks"), default="callback")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    warnings.simplefilter("error")
    for name in ("tensorboard", "moe_rules_callback"):  # each life tells what it replaces
        logging.getLogger(name).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        with Chain(options.kind, Path(folder) / "run", options.seed) as chain:
            for kill in range(options.kills):
                chain.kill(MOMENTS[kill % len(MOMENTS)])
            chain.complete(len(chain.lives) + 100)
        print(f"{options.kind}, seed {options.seed}: {chain}")


if __name__ == "__main__":
    main()
