"""A rule file (TOML) -> rules and predicates; every fault is told with file, line and table.

    description = "what the file is for"

    [predicates.high_queue_length]     # defines a predicate, or overrides a known one
    signal = "queue_length"
    is = "high"                        # high | low | increasing | decreasing | stable
    offset = 40.0                      # optional: where truth is one half
    slope = 0.2                        # optional, like margin, window and sampling

    [rules.congestion]
    rule = "0.85 :: high_queue_length & ~high_routing_confidence"
    kind = "risk"                      # optional, like all that follows
    warmup = 100
    severity = "error"
    description = "what it means"
    cause = "why it happens"
    next = "what to do"

A rule that needs no more than its text may be written `congestion = "0.85 :: ..."` under `[rules]`.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, NamedTuple, get_args

from .errors import RulebookError, RuleSyntaxError, closest
from .formula import Rule, Severity
from .language import parse_rule
from .predicates import SENSES, Predicate
from .syntax_hints import TEMPORAL


class RuleFile(NamedTuple):
    """What a rule file holds."""

    description: str
    predicates: dict[str, Predicate]
    rules: tuple[Rule, ...]


def read_rule_file(text: str, origin: str) -> RuleFile:
    """Reads the text of a rule file.

    Args:
        text: TOML.
        origin: what messages call the file.

    Raises:
        RulebookError: it is no TOML, a key is unknown or missing, or a value is of no use.
        RuleSyntaxError: a rule in it cannot be read.
    """
    file = Reader(text, origin)
    return RuleFile(
        file.description,
        {name: file.predicate(name, table) for name, table in file.predicates.items()},
        tuple(file.rule(name, table) for name, table in file.rules.items()),
    )


class _Value(NamedTuple):
    """What a key takes."""

    wanted: str
    fits: Callable[[Any], bool]
    required: bool = False


def _one_of(*choices: str, required: bool = False) -> _Value:
    wanted = "one of " + ", ".join(f'"{choice}"' for choice in choices)
    return _Value(wanted, lambda value: value in choices, required)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_TEXT = _Value("a string", lambda value: isinstance(value, str))
_TABLES = _Value("a table", lambda value: isinstance(value, dict))
_TOP = {"description": _TEXT, "predicates": _TABLES, "rules": _TABLES}
_RULE = {
    "rule": _TEXT._replace(required=True),
    "kind": _one_of("health", "risk"),
    "warmup": _Value("a whole number of steps, 0 or more", lambda n: type(n) is int and n >= 0),
    "severity": _one_of(*get_args(Severity)),
    "description": _TEXT,
    "cause": _TEXT,
    "next": _TEXT,
}
_PREDICATE = {
    "signal": _TEXT._replace(required=True),
    "is": _one_of(*SENSES, required=True),
    "offset": _Value("a finite number", _is_number),
    "slope": _Value("a number above 0", lambda x: _is_number(x) and x > 0),
    "margin": _Value("a number, 0 or more", lambda x: _is_number(x) and x >= 0),
    "window": _Value("a whole number of rows, 2 or more", lambda n: type(n) is int and n >= 2),
    "sampling": _Value("a number, 0 or more", lambda x: _is_number(x) and x >= 0),
}


class Reader:
    """Turns tables of one file into rules and predicates, and knows where each key stands.

    Attributes:
        description: of the file.
        rules, predicates: their tables by name, as they were written.

    Raises:
        RulebookError: the text is no TOML, has an unknown table, or no rules.
    """

    def __init__(self, text: str, origin: str) -> None:
        self.text, self.origin = text, origin
        try:
            tables = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RulebookError(f"{origin} is not valid TOML: {error}.") from None
        self.check(tables, (), _TOP)
        self.description: str = tables.get("description", "")
        self.rules: dict[str, Any] = tables.get("rules", {})
        self.predicates: dict[str, Any] = tables.get("predicates", {})
        if not self.rules:
            raise RulebookError(f"{origin} has no rules. Write them as [rules.NAME] with a key `rule`.")

    def rule(self, name: str, table: Any) -> Rule:
        path, fields = ("rules", name), table
        if isinstance(table, str):
            fields = {"rule": table}
        else:
            self.check(table, path, _RULE)
            path = (*path, "rule")
        if not (name.isprintable() and name.strip()):
            raise self.fault(path, f"{name!r} cannot name a rule: a name is printable and not blank.")
        fields = {"next_step" if key == "next" else key: value for key, value in fields.items()}
        text = fields.pop("rule")
        try:
            return parse_rule(text, name, **fields)
        except RuleSyntaxError as error:
            raise located(error, f"{self.where(path)}, rule '{name}'") from None

    def predicate(self, name: str, table: Any) -> Predicate:
        path = ("predicates", name)
        self.check(table, path, _PREDICATE)
        fields = {"sense" if key == "is" else key: value for key, value in table.items()}
        predicate = Predicate(**fields)
        if reason := _unusable(name):
            raise self.fault(path, f"no rule can call a predicate '{name}': {reason}.")
        trend = predicate.sense not in ("high", "low")
        if trend and predicate.offset is not None and not 0 <= predicate.offset <= 1:
            message = (
                f"offset of [predicates.{name}] is a degree from 0 to 1, because it is {predicate.sense}."
            )
            raise self.fault((*path, "offset"), message)
        return predicate

    def check(self, table: Any, path: tuple[str, ...], values: Mapping[str, _Value]) -> None:
        title = f"[{'.'.join(path)}]" if path else "the file"
        if not isinstance(table, dict):
            message = f"{title} is {_shown(table)}; it must be a table with the keys {', '.join(values)}."
            raise self.fault(path, message)
        for key, value in table.items():
            if key not in values:
                advice = closest(key, values) or f" Known are {', '.join(values)}."
                raise self.fault((*path, key), f"{title} has an unknown key '{key}'.{advice}")
            if not values[key].fits(value):
                message = f"{key} of {title} is {_shown(value)}; it must be {values[key].wanted}."
                raise self.fault((*path, key), message)
        for key, value in values.items():
            if value.required and key not in table:
                raise self.fault(path, f"{title} lacks the key '{key}', {value.wanted}.")

    def fault(self, path: tuple[str, ...], message: str) -> RulebookError:
        return RulebookError(f"{self.where(path)}: {message}")

    def where(self, path: tuple[str, ...]) -> str:
        return f"{self.origin}, line {self.line(path)}"

    def line(self, path: tuple[str, ...]) -> int:
        """Number of the line that says most about a key: its own, else that of its table, else 1."""
        return _line(self.text, path)


def located(error: RuleSyntaxError, where: str) -> RuleSyntaxError:
    """The same error, told with the place of the rule."""
    details = {"text": error.text, "line": error.line, "column": error.column, "hint": error.hint}
    return RuleSyntaxError(f"{where}: {error}", **details)


def _shown(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:40]}..."


def _unusable(name: str) -> str:
    """Why no rule can mention a predicate of this name, or ''."""
    if name in TEMPORAL:
        return "it is a temporal operator"
    return "" if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) else "names are a-z, A-Z, 0-9 and _"


def _line(text: str, path: tuple[str, ...]) -> int:
    """See `Reader.line`."""
    table: tuple[str, ...] = ()
    best, best_line = 0, 1
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("["):
            here = table = _keys(line)
        else:
            here = (*table, *_keys(line.partition("=")[0] + "= 0")) if "=" in line else ()
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(path, here, strict=False))))
        if shared > best:
            best, best_line = shared, number
    return best_line


def _keys(statement: str) -> tuple[str, ...]:
    """The dotted key of a table header or an assignment: ('rules', 'x') for `[rules.x]`."""
    try:
        tables = tomllib.loads(statement)
    except tomllib.TOMLDecodeError:
        return ()
    keys = []
    while isinstance(tables, dict) and tables:
        ((key, tables),) = tables.items()
        keys.append(key)
    return tuple(keys)
