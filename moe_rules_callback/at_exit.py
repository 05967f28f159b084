"""Closing what nobody closed: when Python ends, and when the process is asked to (SIGTERM)."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  registers its shutdown before ours, see below
import os
import re
import signal
import threading
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

GRACE = 20.0  # seconds; who sends SIGTERM sends SIGKILL later, Kubernetes and Slurm after 30
HURRY = 2.0  # seconds that somebody who pressed Ctrl-C twice still waits
_terminating = False
_process = 0  # which SIGTERM ends like this
_held: set[Any] = set()  # things that have something to close


def close_at_exit(thing: Any) -> None:
    """Call `thing.close()` when Python ends, unless it is gone by then.

    Functions of `atexit` run when threads have been joined and every executor refuses work, which zarr
    writes with. `threading` has a list of its own, last in first out, that the executors' shutdown stands
    in, too; it is private, so `atexit` stands in for it.
    """
    register = atexit.register
    if threading.current_thread() is threading.main_thread():  # other threads may still be training by then
        register = getattr(threading, "_register_atexit", register)
        end_on_sigterm()
    reference, process = weakref.ref(thing), os.getpid()

    def close() -> None:
        if (alive := reference()) is not None and os.getpid() == process:  # a fork has none of its threads
            alive.close()

    register(close)


def hold(thing: Any) -> None:
    """Keep a thing until it is released, so that it is closed although nobody else knows of it."""
    _held.add(thing)


def release(thing: Any) -> None:
    """It is closed."""
    _held.discard(thing)


def end_on_sigterm() -> None:
    """Let SIGTERM end Python as `sys.exit` does, so that what is open is closed; from the main thread.

    Nothing changes where somebody handles it: in Python, or below it as `jax.distributed` does. A fork, which
    has nothing open, dies of it as before.
    """
    global _process
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and not _caught(signal.SIGTERM):
        signal.signal(signal.SIGTERM, _end)
        _process = os.getpid()


def hurry(interrupt: BaseException) -> float:
    """Seconds that are left to whoever waits, when the user or SIGTERM interrupts it."""
    return HURRY if isinstance(interrupt, KeyboardInterrupt) else GRACE


def patience(seconds: float) -> float:
    """How long to wait, which is not long when the process is about to be killed."""
    return min(seconds, GRACE) if _terminating else seconds


def _end(number: int, frame: FrameType | None) -> None:
    global _terminating
    if os.getpid() != _process:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    _terminating = True
    raise SystemExit(128 + number)  # what a shell reports of a process that the signal has killed


def _caught(number: int) -> bool:
    """Whether the process has a handler, of which Python need not know. Only Linux tells."""
    try:
        told = Path("/proc/self/status").read_text()
    except OSError:
        return False
    mask = re.search(r"^SigCgt:\s*([0-9a-f]+)$", told, re.MULTILINE)
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)
