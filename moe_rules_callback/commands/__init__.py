"""The commands of `moe-rules`, one module each.

A module has `add(commands)`, which adds its parser and sets `run`: parsed options -> exit code. What a
command needs beyond this package is imported when it runs.
"""

from __future__ import annotations

from . import calibrate, check, compare, explain, fit, lint, plot, replay, report, rules

COMMANDS = (plot, report, rules, replay, check, lint, compare, explain, calibrate, fit)
