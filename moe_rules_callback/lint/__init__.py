"""Faults of rules that can be known before a run: `moe-rules lint`.

    for finding in lint("my_rules.toml"):
        print(finding)        # my_rules.toml:7: warning: rule 'a' can never be TRUE: ...

`reading` finds faults of syntax and names, `checks` asks what is wrong with rules and pairs of rules,
`concluding` what is wrong with axioms and conclusions together, and `decide` answers, exactly: a rule that is
said never to be TRUE is never TRUE, wherever these hold:

- every predicate has 0 <= L <= U <= 1 and its signal is known, and axioms do not contradict each other, so
  no interval is CONTRADICTORY or missing;
- predicates over one signal lie on their ramps at one value of it, see `features`; shares and
  probabilities lie in 0..1.

Not taken into account, so that a fault may go unseen but none is made up: relations between different
signals; between a signal and its own trend, or windows of different lengths; between rows; ramps whose
place against each other depends on the number of experts; what a name that axioms conclude has to do with
their evidence: it may have any truth, only on a side on which no axiom speaks it has none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from .. import plugins
from ..signals import Signal
from .findings import LEVELS, Finding

__all__ = ["LEVELS", "Finding", "lint"]


def lint(source: str | os.PathLike[str] | Sequence[str]) -> list[Finding]:
    """Faults of rules, by line, the worst of a line first.

    Args:
        source: the name of a shipped book, the path of a TOML file, or a list of texts of rules.
            Predicates and signals of installed plugins are known.

    Raises:
        RulebookError, UnknownNameError: there is no such file or book.
    """
    from .checks import Checks
    from .reading import read

    manager = plugins.get_plugin_manager()
    signals = {
        name: signal if isinstance(signal, Signal) else Signal(signal, ("*",))
        for name, signal in plugins.contributions(manager, "provide_signals").items()
    }
    reading = read(source, plugins.contributions(manager, "provide_predicates"), signals)
    found = [*reading.findings, *Checks(reading).findings()]
    return sorted(found, key=lambda finding: (finding.line, LEVELS.index(finding.level)))
