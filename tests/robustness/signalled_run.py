"""Runs that get signals: see `test_signals_of_the_system`. Each is forked from this process.

    python tests/robustness/signalled_run.py       # a line on stdin: the name of a case and a folder

What they say on stdout: their pid, `took 7` after each step, `now` when the signal may come, and `ended 143`.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType

import jax
import numpy as np
import zarr  # noqa: F401  before any fork

from moe_rules_callback import Predicate, Rule, RuleAuditCallback, Rulebook, at_exit, callback, hookimpl
from moe_rules_callback.formula import Var

HOT = Rule("hot", Var("is_hot"), text="is_hot", kind="risk")
RULES = Rulebook("signalled", (HOT,), {"is_hot": Predicate("x", "low", -0.5)})
STEPS = 30


class Slow:
    """Takes a while, and says so."""

    @hookimpl
    def on_records(self) -> None:
        say("now")
        time.sleep(0.5)


class Hangs:
    @hookimpl
    def on_records(self) -> None:
        threading.Event().wait()


def say(line: str) -> None:
    os.write(1, f"{line}\n".encode())


def idle() -> None:
    """A minute, in which Python looks after signals: one that comes just before a sleep does not end it."""
    for _ in range(3000):
        time.sleep(0.02)


def start(logdir: Path, *plugins: object) -> RuleAuditCallback:
    return RuleAuditCallback(RULES, logdir=logdir, sinks=["zarr", "tensorboard"], plugins=plugins)


def train(audit: RuleAuditCallback, steps: int = STEPS) -> None:
    for step in range(steps):
        audit.on_step({"x": float(step)})
        say(f"took {step}")


def plain(logdir: Path) -> None:
    audit = start(logdir)
    train(audit)
    say("now")
    idle()


def with_block(logdir: Path) -> None:
    with start(logdir) as audit:
        train(audit)
        say("now")
        idle()


def compiling(logdir: Path) -> None:
    """The signal comes while XLA compiles or computes: Python acts on it when that is over."""
    with start(logdir) as audit:
        train(audit)
        slow = jax.jit(lambda x: jax.lax.fori_loop(0, 300, lambda _, y: jax.numpy.tanh(y @ y), x))
        compiled = slow.lower(np.eye(400, dtype=np.float32)).compile()
        say("now")
        jax.block_until_ready(compiled(np.eye(400, dtype=np.float32)))
        idle()


def flushing(logdir: Path) -> None:
    with start(logdir, Slow()) as audit:
        train(audit)
        audit.flush()
        idle()


def closing(logdir: Path) -> None:
    audit = start(logdir, Slow())
    train(audit)
    audit.close()


def hung(logdir: Path) -> None:
    at_exit.GRACE = callback.PATIENCE = 1.0
    with start(logdir, Hangs()) as audit:
        train(audit)
        say("now")
        idle()


def own_handler(logdir: Path) -> None:
    """The trainer asks for SIGTERM itself, ends its loop, and gives a status of its own."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, handle)
    with start(logdir) as audit:
        train(audit)
        say("now")
        while not stop.is_set():
            time.sleep(0.02)
    sys.exit(7)


def distributed(logdir: Path) -> None:
    """JAX notes SIGTERM below Python, for checkpoints, and the trainer goes on."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    jax.distributed.initialize(f"localhost:{port}", 1, 0)
    with start(logdir) as audit:
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        train(audit, STEPS // 2)
        say("now")
        time.sleep(0.5)
        train(audit, STEPS - STEPS // 2)


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is started without it
    for request in sys.stdin:
        if (pid := os.fork()) == 0:
            case, folder = request.split()
            globals()[case](Path(folder))
            return  # as any program ends
        say(f"pid {pid}")
        say(f"ended {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


if __name__ == "__main__":
    main()
