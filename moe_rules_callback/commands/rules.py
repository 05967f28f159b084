"""`moe-rules rules BOOK`."""

from __future__ import annotations

import argparse
from typing import Any

from ..formula import Rule
from ..rulebook import DEFAULT_BOOK, book_names, load_rules
from ..terminal import show


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "rules",
        help="print the rules of a book or a rule file",
        description=f"Print rules with what they mean. Shipped books: {', '.join(book_names())}.",
        epilog="example: moe-rules rules nano_moe",
    )
    parser.add_argument(
        "book", nargs="?", default=DEFAULT_BOOK, help="name of a shipped book, or a TOML file"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    book = load_rules(options.book)
    show("\n\n".join([" ".join(book.description.split()), *map(_describe, book.rules)]).strip())
    return 0


def _describe(rule: Rule) -> str:
    kind = f" ({rule.kind}, {rule.severity}, from step {rule.warmup})" if rule.kind else ""
    told = [("", rule.description), ("cause: ", rule.cause), ("next: ", rule.next_step)]
    return "\n".join(
        [f"{rule.name}{kind}", f"    {rule.text}", *(f"    {label}{text}" for label, text in told if text)]
    )
