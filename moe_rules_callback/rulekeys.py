"""The keys of a rule file, and the values that they take; limits that nobody sane meets.

Numbers that are larger, windows that are longer and names without end would not be evaluated as they are
written: they overflow float32 or int32, or take all memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

from .formula import Severity
from .predicates import SENSES
from .productions import MAX_ROWS

MAX_NAME = 200  # characters
MAX_STEP = 2**31 - 1  # steps are counted in int32
MAX_NUMBER = 1e12  # of an offset, slope or margin: products of two are finite in float32, and sharp enough


class Value(NamedTuple):
    """What a key takes."""

    wanted: str
    fits: Callable[[Any], bool]
    required: bool = False


def _one_of(*choices: str, required: bool = False) -> Value:
    wanted = "one of " + ", ".join(f'"{choice}"' for choice in choices)
    return Value(wanted, lambda value: value in choices, required)


def _number(wanted: str, least: float, most: float = MAX_NUMBER) -> Value:
    return Value(wanted, lambda value: type(value) in (int, float) and least <= value <= most)


def _whole(of: str, least: int, most: int) -> Value:
    return Value(
        f"a whole number of {of}, {least} to {most:,}", lambda n: type(n) is int and least <= n <= most
    )


_TEXT = Value("a string", lambda value: isinstance(value, str))
_TABLES = Value("a table", lambda value: isinstance(value, dict))
TOP = {"description": _TEXT, "predicates": _TABLES, "rules": _TABLES}
RULE = {
    "rule": _TEXT._replace(required=True),
    "kind": _one_of("health", "risk"),
    "warmup": _whole("steps", 0, MAX_STEP),
    "severity": _one_of(*get_args(Severity)),
    "description": _TEXT,
    "cause": _TEXT,
    "next": _TEXT,
}
PREDICATE = {
    "signal": _TEXT._replace(required=True),
    "is": _one_of(*SENSES, required=True),
    "offset": _number(f"a number from -{MAX_NUMBER:g} to {MAX_NUMBER:g}", -MAX_NUMBER),
    "slope": _number(f"a number above 0, from {1 / MAX_NUMBER:g} to {MAX_NUMBER:g}", 1 / MAX_NUMBER),
    "margin": _number(f"a number from 0 to {MAX_NUMBER:g}", 0),
    "window": _whole("rows", 2, MAX_ROWS),
    "sampling": _number(f"a number from 0 to {MAX_NUMBER:g}", 0),
}


def unnameable(name: Any) -> str:
    """Why this cannot name a rule, or ''."""
    if isinstance(name, str) and name.isprintable() and name.strip() and len(name) <= MAX_NAME:
        return ""
    return (
        f"{shown(name)} cannot name a rule: a name is a string of at most {MAX_NAME} characters, printable "
        "and not blank."
    )


def unfit(told: Any) -> str:
    """Why the fields of a predicate, as a history tells them, are none, or ''."""
    if not isinstance(told, dict):
        return f"it is {shown(told)}"
    for field, value in told.items():
        key = "is" if field == "sense" else field
        if key not in PREDICATE or field == "is":
            return f"it has a field {shown(field)}"
        if not (PREDICATE[key].fits(value) or (key == "offset" and value is None)):
            return f"{field} is {shown(value)}; it must be {PREDICATE[key].wanted}"
    return "" if {"signal", "sense"} <= told.keys() else "it has no signal or no sense"


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list hundreds deep
        return f"{type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:80]}..."
