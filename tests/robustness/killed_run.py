"""Runs that are killed, and say on a pipe what they have done: see `kill_a_run`.

    python tests/robustness/killed_run.py       # a line of JSON on stdin: the arguments of `run`

Each is forked from this process, which has imported everything. What they say on stdout:

    pid 4711
    taken 41                       the trainer has taken step 41
    zarr on_records begins 47      a sink was told of the rows up to step 47
    zarr on_records ends 47        and has returned: it promises to hold them
    flushed 47                     `flush` has returned
    closed 99                      `close` has returned
    ended                          the process is no more

What a row holds tells its step and which run of a chain, its life, has made it.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr  # noqa: F401  before any fork

from moe_rules_callback import Predicate, Records, Rule, RuleAuditCallback, Rulebook, Run, hookimpl
from moe_rules_callback.events import Events
from moe_rules_callback.formula import Var
from moe_rules_callback.plugins import get_plugin_manager
from moe_rules_callback.records import Schema, SignalInfo, State
from moe_rules_callback.sinks import TensorBoardSink, ZarrSink, new_store, record_writers  # noqa: F401

EXPERTS, FLUSH_EVERY = 4, 8
STEP_SECONDS = 0.005  # of the whole callback
FRACTION = 1024  # steps after which values come again: all are exact in float32
HOT = Rule("hot", Var("is_hot"), text="is_hot", kind="risk")
RULES = Rulebook("killed", (HOT,), {"is_hot": Predicate("x", "low", -0.5)})
SCHEMA = Schema((HOT,), (SignalInfo("x", per_layer=False),), ("model",), EXPERTS)


def x(step: Any, life: Any) -> Any:
    """The scalar of a step: between `life` and `life + 1`."""
    return life + step % FRACTION / FRACTION


def busy_expert(step: Any, life: Any) -> Any:
    """The expert that gets all tokens of a step."""
    return (step + life) % EXPERTS


class Told:
    """A sink that says what it does."""

    name = ""

    @contextmanager
    def _telling(self, hook: str, step: int) -> Iterator[None]:
        say(f"{self.name} {hook} begins {step}")
        yield
        say(f"{self.name} {hook} ends {step}")

    @hookimpl
    def on_train_start(self, run: Run) -> None:
        with self._telling("on_train_start", -1):
            super().on_train_start(run)  # type: ignore[misc]

    @hookimpl
    def on_records(self, records: Records) -> None:
        with self._telling("on_records", int(records.step[-1])):
            super().on_records(records)  # type: ignore[misc]

    @hookimpl
    def on_train_end(self, run: Run) -> None:
        with self._telling("on_train_end", -1):
            super().on_train_end(run)  # type: ignore[misc]


class ToldZarr(Told, ZarrSink):
    name = "zarr"


class ToldTensorBoard(Told, TensorBoardSink):
    name = "tensorboard"


def say(line: str) -> None:
    """In one piece, from any thread; it is in the pipe when this returns."""
    os.write(1, f"{line}\n".encode())


def run(kind: str, logdir: str, life: int, start: int | None, stop: int) -> None:
    """Steps from `start` (None: where the history ends) up to `stop`."""
    # Few rows to a chunk, and few declared ahead, so that a short run crosses all borders.
    new_store.DECLARED_ROWS, new_store.STEP_CHUNK, new_store.CHUNK_BYTES = 512, 64, 256
    {"sinks": _sinks, "callback": _callback}[kind](Path(logdir), life, start, stop)
    say(f"closed {stop - 1}")


def _callback(logdir: Path, life: int, start: int | None, stop: int) -> None:
    """All of it."""
    audit = RuleAuditCallback(
        RULES, logdir=logdir, sinks=[ToldZarr(), ToldTensorBoard()], flush_every=FLUSH_EVERY, resume=True,
        top_k=1,
    )  # fmt: skip
    first = ZarrSink().last_step(logdir) + 1 if start is None else start
    with audit:
        for step in range(first, stop):
            probs = np.eye(EXPERTS, dtype=np.float32)[[busy_expert(step, life)] * 2]
            audit.on_step({"x": x(step, life), "router_probs": probs}, start if step == first else None)
            say(f"taken {step}")
            time.sleep(STEP_SECONDS)
            if step % 100 == 99:
                audit.flush()
                say(f"flushed {step}")


def _sinks(logdir: Path, life: int, start: int | None, stop: int) -> None:
    """The sinks and their threads, without JAX."""
    events = Events(get_plugin_manager([ToldZarr(), ToldTensorBoard()]))
    first = ZarrSink().last_step(logdir) + 1 if start is None else start
    settings = Run(SCHEMA, logdir, flush_every=FLUSH_EVERY, resume=True)
    events.start(settings)
    for begin in range(first, stop, FLUSH_EVERY):
        batch = _rows(np.arange(begin, min(begin + FLUSH_EVERY, stop)), life)
        events.wait(time.monotonic() + 60)  # training is no faster than the disk: one batch is on its way
        say(f"taken {batch.step[-1]}")
        events.tell("on_records", records=batch)
    events.close(settings, time.monotonic() + 60)


def _rows(step: np.ndarray, life: int) -> Records:
    rows, value = len(step), x(step, life).astype(np.float32)
    return Records(
        SCHEMA,
        step=step.astype(np.int64),
        state=np.full((rows, 1), State.FALSE, np.int8),
        truth_layer=np.zeros((rows, 1, 1, 2), np.float32),
        signal_value=value[:, None, None],
        signal_pooled=value[:, None],
        expert_share=np.eye(EXPERTS, dtype=np.float32)[busy_expert(step, life)][:, None, :],
        wall_time=time.time() + np.arange(rows) / 1000,
    )


def main() -> None:
    for request in sys.stdin:
        if (pid := os.fork()) == 0:
            try:
                run(*json.loads(request))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        say(f"pid {pid}")
        os.waitpid(pid, 0)
        say("ended")


if __name__ == "__main__":
    main()
