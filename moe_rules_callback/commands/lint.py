"""`moe-rules lint RULES`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from ..terminal import show


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "lint",
        help="find faults of rules before a run does",
        description="Find rules that cannot be read, speak of unknown names, can never be TRUE or FALSE, "
        "contradict each other, or say nothing that another rule does not say. Decided, not sampled.",
        epilog="exit codes: 0 at most notes, 1 there is no such file, 2 wrong usage, 3 warnings or errors. "
        "example: moe-rules lint my_rules.toml",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "rules", nargs="?", metavar="RULES", help="a TOML file, or the name of a shipped book"
    )
    source.add_argument(
        "-e",
        dest="texts",
        metavar="RULE",
        action="append",
        help="the text of a rule, instead of a file; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON list of findings")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..lint import lint

    found = lint(options.rules or options.texts)
    if options.json:
        show(json.dumps([dataclasses.asdict(finding) for finding in found], indent=2))
    else:
        for finding in found:
            show(finding)
        if not found:
            show("no findings", to=sys.stderr)
    return 3 if any(finding.level != "note" for finding in found) else 0
