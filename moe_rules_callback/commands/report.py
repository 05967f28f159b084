"""`moe-rules report RUN`: a run on one page of HTML."""

from __future__ import annotations

import argparse
from typing import Any

from ..paths import AnyPath, as_path
from ..terminal import show
from .log_options import LOGS, add_log_options, open_log_options
from .plot import AFFINITY_FILE, folder_of


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="write a page about a run: verdict, why, what to do next",
        description="Write one HTML file that needs nothing else: what fired, why, and what to do next; the "
        f"pictures of the run; its configuration. A {AFFINITY_FILE} beside the run is drawn too.",
        epilog="example: moe-rules report runs/demo --out demo.html",
    )
    parser.add_argument("path", type=as_path, metavar="RUN", help=LOGS)
    parser.add_argument(
        "--out", type=as_path, metavar="FILE", help="the page (default: report.html in the folder of the run)"
    )
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..plots import read_affinity
    from ..report import render_report
    from ..rulebook import load_rules
    from ..runs import is_history

    path: AnyPath = options.path
    folder = folder_of(path)
    table = folder / AFFINITY_FILE
    history = open_log_options(options, path)
    asked = () if options.rules is None and is_history(path) else load_rules(options.rules).rules
    judged = set(history["rule"].values.tolist())
    page = render_report(
        history,
        (path if path.is_file() else folder).resolve().name,
        read_affinity(table) if table.exists() else None,
        unjudged=[rule.name for rule in asked if rule.name not in judged],
    )
    out: AnyPath = options.out or folder / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, "utf-8")
    show(out)
    return 0
