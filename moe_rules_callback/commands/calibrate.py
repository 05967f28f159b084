"""`moe-rules calibrate RUN..`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..paths import as_path
from ..terminal import show
from .log_options import LOGS


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "calibrate",
        help="set the ramps of rules by healthy runs",
        description="Set where high_ and low_ predicates turn by runs that were healthy, with the "
        "uncertainty of that as the width of their intervals, and tell how often the rules then fire on "
        "runs left out.",
        epilog="example: moe-rules calibrate runs/healthy-* --rules router_health --out mine.toml",
    )
    parser.add_argument("runs", type=as_path, nargs="+", metavar="RUN", help=LOGS)
    parser.add_argument("--rules", help="a shipped book or a TOML file (default: router_health)")
    parser.add_argument("--after", type=int, default=100, metavar="STEP", help="first step that counts (100)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the rule file to write")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..calibration import calibrate
    from ..rulewriter import write_rules
    from ..runs import open_run

    calibration = calibrate([open_run(path) for path in options.runs], options.rules, after=options.after)
    show(calibration)
    if options.out:
        write_rules(calibration.rules, options.out)
        show(f"wrote {options.out}")
    return 0
