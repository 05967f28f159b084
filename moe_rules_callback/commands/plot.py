"""`moe-rules plot RUN`: every picture that a run can give."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import HistoryError, closest
from ..paths import AnyPath, as_path
from ..terminal import show
from .log_options import LOGS, add_log_options, open_log_options

FORMATS = ("png", "svg")
AFFINITY_FILE = "router_affinity_matrix.csv"


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw the pictures of a run",
        description="Draw a run: the loss and the truth of its rules, their states over time, the shares of "
        "the experts, the signals of the routers. What the run does not hold is left out, and named.",
        epilog="example: moe-rules plot runs/demo --only audit rule_timeline --format png,svg",
    )
    parser.add_argument("path", type=as_path, metavar="RUN", help=LOGS)
    parser.add_argument(
        "--out",
        type=_folder_or_picture,
        metavar="DIR|FILE",
        help="folder of the pictures (default: that of the run); or one .png or .svg, for --only or audit",
    )
    parser.add_argument("--format", type=_formats, metavar="png|svg", help="png (default), svg, or png,svg")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="these pictures, by the names of their files"
    )
    parser.add_argument(
        "--affinity",
        type=as_path,
        metavar="CSV",
        help=f"table of domains or samples by experts (default: {AFFINITY_FILE} beside the run, if any)",
    )
    add_log_options(parser)
    parser.set_defaults(run=run, wrong_usage=parser.error)


def run(options: argparse.Namespace) -> int:
    from ..plots import AFFINITY, FIGURES, plot_affinity, read_affinity, save

    known = [*FIGURES, AFFINITY]
    names: list[str] = options.only or known
    if unknown := [name for name in names if name not in known]:
        near = closest(unknown[0], known)
        options.wrong_usage(f"no picture is called {unknown[0]!r}.{near} There are: {', '.join(known)}.")
    folder = folder_of(options.path)
    out: AnyPath = options.out or folder
    if picture := out.suffix[1:] in FORMATS:
        names = options.only or ["audit"]
        if len(names) > 1 or options.format:
            options.wrong_usage(f"--out {out} is one picture in one format. Name a folder for more.")
    history = open_log_options(options, options.path)
    table: AnyPath = options.affinity or folder / AFFINITY_FILE
    affinity = read_affinity(table) if options.affinity or table.exists() else None
    left_out = []
    for name in names:
        try:
            if name != AFFINITY:
                figure = FIGURES[name](history)
            elif affinity is not None:
                figure = plot_affinity(affinity)
            else:
                raise HistoryError(
                    "No history holds a table of domains by experts: pass one as --affinity CSV."
                )
        except HistoryError as error:
            left_out.append(f"{name}: {error}")
            if options.only or len(left_out) == len(names):
                raise
            continue
        for path in [out] if picture else [out / f"{name}.{kind}" for kind in options.format or FORMATS[:1]]:
            save(figure, path)
            show(path)
    if left_out:
        show(f"left out: {' '.join(left_out)}", to=sys.stderr)
    return 0


def folder_of(run: AnyPath) -> AnyPath:
    """Where the pictures of a run go: into its log directory, or beside its history or log."""
    return run if run.is_dir() and not (run / "zarr.json").exists() else run.parent


def _folder_or_picture(text: str) -> AnyPath:
    path = as_path(text)
    if path.suffix in (".jpg", ".jpeg", ".pdf", ".eps", ".gif", ".webp"):
        raise argparse.ArgumentTypeError(f"{text!r} ends neither in .png nor in .svg")
    return path


def _formats(text: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(text.split(",")))
    if not set(kinds) <= set(FORMATS):
        raise argparse.ArgumentTypeError(f"{text!r} is none of png, svg, and png,svg")
    return kinds
