"""The command `moe-rules`.

    moe-rules plot runs/demo                 draws runs/demo/audit.png from the history there
    moe-rules rules router_health            prints the rules of a book or a rule file

Exit codes: 0 done, 1 it could not be done (one line on stderr says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from .errors import MoeRulesError
from .formula import Rule
from .rulebook import DEFAULT_BOOK, book_names, load_rules


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (MoeRulesError, OSError) as error:
        print(f"moe-rules: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"moe-rules: {error}. Install it: pip install 'moe-rules-callback[plot]'", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-rules",
        description="Look at what rules said about a Mixture-of-Experts router.",
        epilog="example: moe-rules plot runs/demo",
    )
    parser.add_argument("--version", action="version", version=version("moe-rules-callback"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    plot = commands.add_parser(
        "plot",
        help="draw the loss and the truth intervals of all rules",
        description="Draw the history of a run: its loss above, the truth interval of every rule below.",
        epilog="example: moe-rules plot runs/demo --out demo.svg",
    )
    plot.add_argument("history", type=Path, help="log directory of a run, or the path of its audit.zarr")
    plot.add_argument(
        "--out", type=_picture, help="picture, .png or .svg (default: audit.png beside the history)"
    )
    plot.set_defaults(run=_plot)

    rules = commands.add_parser(
        "rules",
        help="print the rules of a book or a rule file",
        description=f"Print rules with what they mean. Shipped books: {', '.join(book_names())}.",
        epilog="example: moe-rules rules nano_moe",
    )
    rules.add_argument("book", nargs="?", default=DEFAULT_BOOK, help="name of a shipped book, or a TOML file")
    rules.set_defaults(run=_rules)
    return parser


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .png nor in .svg")
    return path


def _plot(options: argparse.Namespace) -> None:
    from .history import open_history
    from .plots import plot_audit

    history: Path = options.history
    out = options.out or (history.parent if history.suffix == ".zarr" else history) / "audit.png"
    plot_audit(open_history(history), out)
    print(out)


def _rules(options: argparse.Namespace) -> None:
    book = load_rules(options.book)
    print("\n\n".join([" ".join(book.description.split()), *map(_describe, book.rules)]).strip())


def _describe(rule: Rule) -> str:
    kind = f" ({rule.kind}, {rule.severity}, from step {rule.warmup})" if rule.kind else ""
    told = [("", rule.description), ("cause: ", rule.cause), ("next: ", rule.next_step)]
    return "\n".join(
        [f"{rule.name}{kind}", f"    {rule.text}", *(f"    {label}{text}" for label, text in told if text)]
    )
