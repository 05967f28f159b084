"""All that `rules=` may be -> a Rulebook.

load_rules()                                             # the shipped book "router_health"
load_rules("nano_moe")                                   # another shipped book
load_rules("my_rules.toml")                              # a rule file, see `rulefile`
load_rules({"decisive": "0.85 :: high_routing_confidence"})
load_rules(["0.85 :: high_routing_confidence"])          # named from their content
load_rules([parse_rule("high_load_cv", "uneven", kind="risk")])
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from .errors import RulebookError, RuleSyntaxError, UnknownNameError, closest
from .formula import Rule
from .language import parse_rule
from .predicates import Predicate
from .rulefile import located, read_rule_file, read_text
from .rulekeys import shown, unnameable

DEFAULT_BOOK = "router_health"


@dataclass(frozen=True)
class Rulebook:
    """Rules that are watched together.

    Attributes:
        name: of a shipped book or of a file; "rules" where they came as objects.
        rules: each with a name of its own.
        predicates: those that the book defines or overrides, by name.
        shipped: whether it comes with this package; its rules over absent signals are skipped.
        description: what it is for.
        complete: whether rules of plugins are not added to it, as to those of a history.
    """

    name: str
    rules: tuple[Rule, ...]
    predicates: Mapping[str, Predicate] = field(default_factory=dict)
    shipped: bool = False
    description: str = ""
    complete: bool = False


Source = str | os.PathLike[str] | Mapping[str, str | Rule] | Sequence[str | Rule] | Rulebook | None


def book_names() -> tuple[str, ...]:
    """Names of the shipped rule books."""
    names = (file.name for file in _shelf().iterdir())
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def load_rules(source: Source = None) -> Rulebook:
    """Reads whatever stands for rules.

    Args:
        source: None (the book "router_health"), the name of a shipped book, the path of a TOML file, a
            mapping name -> text or Rule, a list or tuple of texts and Rules, or a Rulebook.

    Raises:
        RulebookError: it is none of these, two rules share a name, or a rule file is malformed.
        RuleSyntaxError: a rule cannot be read; the message shows where.
        UnknownNameError: no such book is shipped.
    """
    match source:
        case None:
            return _shipped(DEFAULT_BOOK)
        case Rulebook():
            return source
        case os.PathLike():
            return _from_file(Path(source))
        case str():
            return _from_str(source)
        case Mapping():
            return Rulebook("rules", tuple(_named(name, rule) for name, rule in source.items()))
        case list() | tuple():
            return Rulebook("rules", _distinct(_rule(rule, f"rules[{i}]") for i, rule in enumerate(source)))
        case _:
            raise RulebookError(
                f"rules= is of type {type(source).__name__}. It takes a mapping name -> text, a list of "
                f"texts, the name of a shipped book ({', '.join(book_names())}) or the path of a TOML file."
            )


def _from_str(source: str) -> Rulebook:
    if source in book_names():
        return _shipped(source)
    if source.endswith(".toml") or os.path.isfile(source):
        return _from_file(Path(source))
    if re.search(r"::|[~&|^()#\n]|->", source):
        text = shown(source)
        raise RulebookError(
            f"rules= is the text of one rule, {text}. One string names a book or a file: "
            f"give the text in a list, rules=[{text}], or under a name, rules={{'my_rule': {text}}}."
        )
    raise UnknownNameError(
        f"no rule book is called {source[:60]!r}.{closest(source, book_names())} Shipped are "
        f"{', '.join(book_names())}; a rule file ends in .toml; the text of a rule goes into a list."
    )


def _shipped(name: str) -> Rulebook:
    file = _shelf() / f"{name}.toml"
    content = read_rule_file(file.read_text("utf-8"), file.name)
    return Rulebook(name, content.rules, content.predicates, shipped=True, description=content.description)


def _shelf() -> Traversable:
    return resources.files("moe_rules_callback") / "rules"


def _from_file(path: Path) -> Rulebook:
    content = read_rule_file(read_text(path), str(path))
    return Rulebook(path.stem, content.rules, content.predicates, description=content.description)


def _named(name: Any, rule: Any) -> Rule:
    if reason := unnameable(name):
        raise RulebookError(reason)
    return replace(_rule(rule, f"rule '{name}'", name), name=name)


def _rule(rule: Any, where: str, name: str | None = None) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        raise RulebookError(
            f"{where} is of type {type(rule).__name__}, not the text of a rule. A rule with a kind or a "
            "description stands in a TOML file, or is moe_rules_callback.language.parse_rule(text, kind=...)."
        )
    try:
        return parse_rule(rule, name)
    except RuleSyntaxError as error:
        raise located(error, where) from None


def _distinct(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    seen: dict[str, int] = {}
    rules = tuple(rules)
    for i, rule in enumerate(rules):
        if (first := seen.setdefault(rule.name, i)) != i:
            raise RulebookError(
                f"rules[{first}] and rules[{i}] are both called '{rule.name}': the same rule twice? "
                "Take one away, or name them: rules={'first': ..., 'second': ...}."
            )
    return rules
