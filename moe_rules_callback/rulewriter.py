"""A Rulebook -> a rule file (TOML), the way back of `rulefile`.

write_rules(load_rules("nano_moe"), "mine.toml")     # load_rules("mine.toml") reads the same rules

Keys at their defaults are left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RuleSyntaxError
from .formula import Rule
from .language import parse_rule
from .predicates import Predicate
from .rulebook import Rulebook

KEYS = {"sense": "is", "next_step": "next", "text": "rule"}  # fields that files call otherwise


def write_rules(book: Rulebook, path: str | os.PathLike[str]) -> None:
    """Writes a book to a rule file, replacing it.

    Raises:
        OSError: it cannot be written.
    """
    Path(path).write_text(rule_file_text(book), "utf-8")


def rule_file_text(book: Rulebook) -> str:
    """TOML that `rulefile.read_rule_file` reads as the same description, predicates and rules."""
    tables = [f"description = {_value(book.description)}\n"] if book.description else []
    tables += [_table("predicates", name, _told(each)) for name, each in book.predicates.items()]
    tables += [
        _table(
            "rules", rule.name, {"rule": _text(rule)} | _told(rule, "name", "formula", "threshold", "text")
        )
        for rule in book.rules
    ]
    return "\n".join(tables)


def _text(rule: Rule) -> str:
    """The rule as its writer wrote it, comments included; anew where its formula has been changed since."""
    try:
        written = parse_rule(rule.text, rule.name)
    except RuleSyntaxError:
        written = None
    if written is not None and (written.formula, written.threshold) == (rule.formula, rule.threshold):
        return rule.text
    return f"{float(rule.threshold)!r} :: {rule.formula}"


def _told(of: Rule | Predicate, *apart: str) -> dict[str, Any]:
    """The fields that are not at their defaults, by their keys."""
    fields = [field for field in dataclasses.fields(of) if field.name not in apart]
    told = {field: getattr(of, field.name) for field in fields}
    return {
        KEYS.get(field.name, field.name): value for field, value in told.items() if value != field.default
    }


def _table(kind: str, name: str, fields: Mapping[str, Any]) -> str:
    title = name if re.fullmatch("[A-Za-z0-9_-]+", name) else json.dumps(name, ensure_ascii=False)
    lines = [f"{key} = {_value(value)}" for key, value in fields.items()]
    return "\n".join([f"[{kind}.{title}]", *lines, ""])


def _value(value: Any) -> str:
    """A string, number or truth value in TOML, which writes them as JSON does, DEL excepted."""
    lines = isinstance(value, str) and "\n" in value and value.replace("\n", "").isprintable()
    if lines and "'''" not in value and not value.endswith("'"):
        return f"'''\n{value}'''"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
