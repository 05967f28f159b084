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

import re
import tomllib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from .errors import RulebookError, RuleSyntaxError, closest
from .formula import Rule
from .language import parse_rule
from .predicates import Predicate
from .rulekeys import MAX_NAME, PREDICATE, RULE, TOP, Value, shown, unnameable
from .syntax_hints import TEMPORAL

MAX_BYTES = 2**20  # of a file; the longest shipped book has 20 thousand
MAXRULES = 1_000
# TOML's dotted keys take time that grows with the square of their parts.
_DOTTED = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"[^"\n]*+"|'[^'\n]*+')[ \t]*+\.[ \t]*+){32}""")


class RuleFile(NamedTuple):
    """What a rule file holds."""

    description: str
    predicates: dict[str, Predicate]
    rules: tuple[Rule, ...]


def read_text(path: Path) -> str:
    """The text of a rule file.

    Raises:
        RulebookError: it is no file, is too large, or is not UTF-8.
    """
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # to open a pipe waits for its writer
            raise RulebookError(f"the rule file {str(path)!r} is a pipe or a device. Name a file on disk.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RulebookError(
                f"the rule file {str(path)!r} has more than {MAX_BYTES:,} bytes, the most that one may have. "
                "Split it into several, or name the file that was meant."
            )
        return data.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        if isinstance(error, RulebookError):
            raise
        raise RulebookError(f"the rule file {str(path)!r} cannot be read: {error}.") from None


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
        if deep := _DOTTED.search(text):
            number = text.count("\n", 0, deep.start()) + 1
            raise RulebookError(
                f"{origin}, line {number}: a key of more than 32 parts. Quote names with dots."
            )
        try:
            tables = tomllib.loads(text)
        except ValueError as error:  # TOMLDecodeError, and a number of thousands of digits
            raise RulebookError(f"{origin} is not valid TOML: {str(error).split(';')[0]}.") from None
        except RecursionError:
            raise RulebookError(
                f"{origin} holds arrays or tables hundreds deep inside each other, which no rule file needs."
            ) from None
        self.check(tables, (), TOP)
        self.description: str = tables.get("description", "")
        self.rules: dict[str, Any] = tables.get("rules", {})
        self.predicates: dict[str, Any] = tables.get("predicates", {})
        if not self.rules:
            raise RulebookError(f"{origin} has no rules. Write them as [rules.NAME] with a key `rule`.")
        if len(self.rules) > MAXRULES:
            raise RulebookError(
                f"{origin} has {len(self.rules):,} rules; a file holds at most {MAXRULES:,}. Split it into "
                "several, each for a run of its own."
            )

    def rule(self, name: str, table: Any) -> Rule:
        path, fields = ("rules", name), table
        if isinstance(table, str):
            fields = {"rule": table}
        else:
            self.check(table, path, RULE)
            path = (*path, "rule")
        if reason := unnameable(name):
            raise self.fault(path, reason)
        fields = {"next_step" if key == "next" else key: value for key, value in fields.items()}
        text = fields.pop("rule")
        try:
            return parse_rule(text, name, **fields)
        except RuleSyntaxError as error:
            raise located(error, f"{self.where(path)}, rule '{name}'") from None

    def predicate(self, name: str, table: Any) -> Predicate:
        path = ("predicates", name)
        self.check(table, path, PREDICATE)
        fields = {"sense" if key == "is" else key: value for key, value in table.items()}
        predicate = Predicate(**fields)
        if reason := _unusable(name):
            raise self.fault(path, f"no rule can call a predicate {shown(name)}: {reason}.")
        trend = predicate.sense not in ("high", "low")
        if trend and predicate.offset is not None and not 0 <= predicate.offset <= 1:
            message = (
                f"offset of [predicates.{name}] is a degree from 0 to 1, because it is {predicate.sense}."
            )
            raise self.fault((*path, "offset"), message)
        return predicate

    def check(self, table: Any, path: tuple[str, ...], values: Mapping[str, Value]) -> None:
        title = f"[{'.'.join(part[:MAX_NAME] for part in path)}]" if path else "the file"
        if not isinstance(table, dict):
            message = f"{title} is {shown(table)}; it must be a table with the keys {', '.join(values)}."
            raise self.fault(path, message)
        for key, value in table.items():
            if key not in values:
                advice = closest(key, values) or f" Known are {', '.join(values)}."
                raise self.fault((*path, key), f"{title} has an unknown key {shown(key)}.{advice}")
            if not values[key].fits(value):
                message = f"{key} of {title} is {shown(value)}; it must be {values[key].wanted}."
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
        known = (path[:parts] for parts in range(len(path), 0, -1) if path[:parts] in self._places)
        return self._places[next(known, ())]

    @cached_property
    def _places(self) -> dict[tuple[str, ...], int]:
        """For each key and each begin of one the first line that it stands in."""
        table: tuple[str, ...] = ()
        places: dict[tuple[str, ...], int] = {(): 1}
        for number, line in enumerate(self.text.splitlines(), 1):
            if line.lstrip().startswith("["):
                here = table = _keys(line)
            else:
                here = (*table, *_keys(line.partition("=")[0] + "= 0")) if "=" in line else ()
            for parts in range(1, len(here) + 1):
                places.setdefault(here[:parts], number)
        return places


def located(error: RuleSyntaxError, where: str) -> RuleSyntaxError:
    """The same error, told with the place of the rule."""
    details = {"text": error.text, "line": error.line, "column": error.column, "hint": error.hint}
    return RuleSyntaxError(f"{where}: {error}", **details)


def _unusable(name: str) -> str:
    """Why no rule can mention a predicate of this name, or ''."""
    if name in TEMPORAL:
        return "it is a temporal operator"
    return "" if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) else "names are a-z, A-Z, 0-9 and _"


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
