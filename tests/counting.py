"""What Python does, counted rather than timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def instructions(work: Callable[[], Any]) -> int:
    """How many instructions Python interprets on this thread."""
    count, before = 0, sys.gettrace()

    def note(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return note

    sys.settrace(note)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
