"""`moe-rules check LOG`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..formula import SEVERITIES
from ..paths import as_path
from ..terminal import show
from .log_options import (
    LOGS,
    add_log_options,
    describe,
    mapping_json,
    progress_bar,
    read_log_options,
    replay_log_options,
)

if TYPE_CHECKING:
    import xarray as xr

    from ..replay import Replay
    from ..runs import Recording
    from ..verdicts import Verdict

FIRED = 3


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "check",
        help="fail when a rule fired, for continuous integration",
        description="Evaluate rules over a log, or take those of a run of this package, and fail when one of "
        "them fired: a risk that was TRUE or a health rule that was FALSE, after its warm-up.",
        epilog=f"exit codes: 0 none fired, {FIRED} one of the severity of --fail-on or above did, 1 the "
        "log or the rules could not be read, 2 wrong usage. "
        "example: moe-rules check training_log.txt --rules my_rules.toml --fail-on warning --junit rules.xml",
    )
    parser.add_argument("log", type=as_path, metavar="LOG", help=LOGS)
    add_log_options(parser)
    parser.add_argument(
        "--fail-on",
        choices=SEVERITIES,
        default="error",
        help="lowest severity that fails (default: %(default)s)",
    )
    parser.add_argument(
        "--junit", type=Path, metavar="FILE", help="write JUnit XML, a test case for each rule"
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="add a summary in Markdown to the end of FILE, such as $GITHUB_STEP_SUMMARY",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from ..verdicts import by_role, summary, verdicts
    from .check_reports import Checked, junit, markdown

    recording = read_log_options(options, options.log)
    if not options.json:
        show(describe(recording, options))
    if recording.history is not None and options.rules is None:
        dataset = recording.history
    else:
        dataset = _evaluate(replay_log_options(recording, options))
    found = verdicts(dataset)
    checked = Checked(str(options.log), found, left_out(options.rules, recording, found), options.fail_on)
    if options.junit:
        options.junit.write_text(junit(checked), "utf-8")
    if options.markdown:
        with options.markdown.open("a", encoding="utf-8") as file:
            file.write(markdown(checked))
    if options.json:
        told = {
            "failed": bool(checked.failures),
            "fail_on": options.fail_on,
            "summary": summary(found),
            "columns": mapping_json(recording),
            "notes": recording.notes,
            "left_out": checked.left_out,
            "verdicts": [verdict.to_dict() for verdict in found],
        }
        show(json.dumps(told, indent=2))
    else:
        show(*by_role(found), "", summary(found))
    return FIRED if checked.failures else 0


def _evaluate(replay: Replay) -> xr.Dataset:
    from ..history import records_to_dataset

    batches = []
    with progress_bar(replay.rows) as bar:
        for records in replay:
            batches.append(records)
            bar.update(len(records))
    return records_to_dataset(batches)


def left_out(rules: str | None, recording: Recording, found: Sequence[Verdict]) -> tuple[str, ...]:
    """Names of the rules that were asked for and not evaluated, since the log lacks their signals."""
    from ..rulebook import load_rules

    if recording.history is not None and rules is None:
        return ()
    kept = {verdict.rule for verdict in found}
    return tuple(rule.name for rule in load_rules(rules).rules if rule.name not in kept)
