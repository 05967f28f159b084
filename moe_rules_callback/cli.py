"""The command `moe-rules`.

    moe-rules plot runs/demo                           pictures of a run
    moe-rules report runs/demo                         one page: verdict, why, what to do next
    moe-rules explain runs/demo --rule R --step 500    why a rule says what it says
    moe-rules compare runs/a runs/b                    the first rule that parts ways
    moe-rules replay old.jsonl --rules my.toml         rules over the log of any trainer
    moe-rules check old.jsonl --fail-on error          for continuous integration
    moe-rules lint my.toml                             faults of rules
    moe-rules calibrate runs/healthy-* --out my.toml   ramps from healthy runs
    moe-rules fit runs/* --labels labels.csv           weights and ramps from labelled runs
    moe-rules rules router_health                      what a book holds

Exit codes: 0 done, 1 it could not be done (one line on stderr says why), 2 wrong usage, 3 `check` found a
rule that fired, `lint` a fault, or `fit` nothing better.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from .commands import COMMANDS
from .errors import MoeRulesError
from .terminal import show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    try:
        options = _parser().parse_args(arguments)
        return options.run(options)
    except BrokenPipeError:  # `moe-rules .. | head` has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MoeRulesError, OSError) as error:
        show(f"moe-rules: {error}", to=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        show(f"moe-rules: {error}. Install it: pip install 'moe-rules-callback[plot]'", to=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moe-rules",
        description="Look at what rules said about a Mixture-of-Experts router.",
        epilog="example: moe-rules plot runs/demo",
    )
    parser.add_argument("--version", action="version", version=version("moe-rules-callback"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser
