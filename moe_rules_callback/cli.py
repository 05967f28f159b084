"""The command `moe-rules`.

    moe-rules plot runs/demo                 draws runs/demo/audit.png from the history there
    moe-rules rules router_health            prints the rules of a book or a rule file

Exit codes: 0 done, 1 it could not be done (one line on stderr says why), 2 wrong usage.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version

from .commands import COMMANDS
from .errors import MoeRulesError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return options.run(options)
    except BrokenPipeError:  # `moe-rules .. | head` has what it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (MoeRulesError, OSError) as error:
        print(f"moe-rules: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"moe-rules: {error}. Install it: pip install 'moe-rules-callback[plot]'", file=sys.stderr)
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
