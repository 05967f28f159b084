"""Closing what nobody closed when Python ends."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  registers its shutdown before ours, see below
import threading
import weakref
from typing import Any


def close_at_exit(thing: Any) -> None:
    """Call `thing.close()` when Python ends, unless it is gone by then.

    Functions of `atexit` run when threads have been joined and every executor refuses work, which zarr
    writes with. `threading` has a list of its own, last in first out, that the executors' shutdown stands
    in, too; it is private, so `atexit` stands in for it.
    """
    register = atexit.register
    if threading.current_thread() is threading.main_thread():  # other threads may still be training by then
        register = getattr(threading, "_register_atexit", register)
    reference = weakref.ref(thing)

    def close() -> None:
        if (alive := reference()) is not None:
            alive.close()

    register(close)
