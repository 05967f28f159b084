"""`moe-rules explain RUN`: why a rule says what it says."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..paths import as_path
from ..terminal import show
from .log_options import LOGS, add_log_options, open_log_options


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="why a rule says what it says at a step, and what would have changed it",
        description="Explain a rule at a step: the truth of its parts, the worst layer with its busiest and "
        "idlest expert, and the smallest change of a signal that would have given it another state.",
        epilog="example: moe-rules explain runs/demo --rule load_imbalance --step 120",
    )
    parser.add_argument("path", type=as_path, metavar="RUN", help=LOGS)
    parser.add_argument("--rule", metavar="R", help="its name (default: the first that fired)")
    parser.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="nearest recorded step (default: where it first fired, else the last)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_log_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..explain import explain

    told = explain(open_log_options(options, options.path), options.rule, options.step)
    show(json.dumps(told.to_dict(), indent=2, allow_nan=False) if options.json else told)
    return 0
