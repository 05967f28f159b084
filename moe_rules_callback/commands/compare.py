"""`moe-rules compare RUN RUN`: which rule parts ways first."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..paths import AnyPath, as_path
from ..terminal import show
from .log_options import LOGS, add_log_options, open_log_options


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="the same rules of two runs side by side",
        description="Compare two runs: how often each rule was in which state, where its states part ways, "
        "which of its signals had parted by then, and which rule is the first.",
        epilog="example: moe-rules compare runs/old runs/new --by fraction",
    )
    for name in ("a", "b"):
        parser.add_argument(name, type=as_path, metavar="RUN", help=LOGS)
    parser.add_argument(
        "--by",
        choices=("step", "fraction"),
        default="step",
        help="align by step, or by the fraction of either run's last step (default: %(default)s)",
    )
    parser.add_argument(
        "--patience",
        type=_rows,
        default=32,
        metavar="ROWS",
        help="rows for which a difference must last (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument(
        "--out", type=_picture, metavar="FILE", help="draw the rules that part ways, as .png or .svg"
    )
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..compare import compare

    a, b = (open_log_options(options, path) for path in (options.a, options.b))
    names = (str(options.a), str(options.b))
    found = compare(a, b, options.by, patience=options.patience, names=names)
    show(json.dumps(found.to_dict(), indent=2, allow_nan=False) if options.json else found)
    if options.out:
        from ..compare.plot import plot_comparison

        plot_comparison(a, b, found, options.out)
    return 0


def _picture(text: str) -> AnyPath:
    path = as_path(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .png nor in .svg")
    return path


def _rows(text: str) -> int:
    if not (text.isdecimal() and int(text) > 1):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 1")
    return int(text)
