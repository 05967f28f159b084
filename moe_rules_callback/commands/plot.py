"""`moe-rules plot RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw the loss and the truth intervals of all rules",
        description="Draw the history of a run: its loss above, the truth interval of every rule below.",
        epilog="example: moe-rules plot runs/demo --out demo.svg",
    )
    parser.add_argument("history", type=Path, help="log directory of a run, or the path of its audit.zarr")
    parser.add_argument(
        "--out", type=_picture, help="picture, .png or .svg (default: audit.png beside the history)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..history import open_history
    from ..plots import plot_audit

    history: Path = options.history
    out = options.out or (history.parent if history.suffix == ".zarr" else history) / "audit.png"
    plot_audit(open_history(history), out)
    print(out)
    return 0


def _picture(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .png nor in .svg")
    return path
