"""Everything that this package raises on purpose.

    MoeRulesError
    ├── RuleSyntaxError (ValueError)     the text of a rule cannot be read
    ├── RulebookError (ValueError)       a rule file is malformed
    ├── UnknownNameError (LookupError)   a predicate, signal or book that nobody defines
    ├── MissingSignalError (LookupError) a rule needs a metric that the step does not pass
    ├── MetricsError (ValueError)        a metric has a shape or type that makes no sense
    ├── PluginError (RuntimeError)       two plugins disagree, or one is unusable
    ├── HistoryError (RuntimeError)      a history cannot be written or read
    ├── LogError (ValueError)            a training log cannot be read, or not be understood
    ├── FitError (ValueError)            labels are too few, or say nothing about the runs
    ├── TracingError (ValueError)        a function cannot be traced, queried or changed as asked
    └── TryAgain (OSError)               raised by a plugin: the same call may succeed later

Each message says what is wrong, the usual cause, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoeRulesError(Exception):
    """Base of all errors of this package."""


class RuleSyntaxError(MoeRulesError, ValueError):
    """The text of a rule cannot be read.

    Attributes:
        text: the rule as it was given.
        line, column: where reading stopped, both counted from 1.
        hint: what was probably meant, or "".
    """

    def __init__(self, message: str, *, text: str, line: int, column: int, hint: str = "") -> None:
        self.text, self.line, self.column, self.hint = text, line, column, hint
        super().__init__(message)


class RulebookError(MoeRulesError, ValueError):
    """A rule file, or a mapping given in its place, is malformed."""


class UnknownNameError(MoeRulesError, LookupError):
    """A name that no signal, predicate or rule book goes by."""


class MissingSignalError(MoeRulesError, LookupError):
    """A rule needs a signal that the metrics of this step cannot give."""


class MetricsError(MoeRulesError, ValueError):
    """A metric has a shape, type or value that cannot be what was meant."""


class PluginError(MoeRulesError, RuntimeError):
    """A plugin cannot be used as it is."""


class HistoryError(MoeRulesError, RuntimeError):
    """A history on disk cannot be written or read."""


class LogError(MoeRulesError, ValueError):
    """A training log cannot be read, or it does not say which of its columns means what."""


class FitError(MoeRulesError, ValueError):
    """Rules cannot be fitted to these runs and labels."""


class TracingError(MoeRulesError, ValueError):
    """A function cannot be traced, queried, tapped or changed as it was asked."""


class TryAgain(MoeRulesError, OSError):
    """Raised by a plugin in a hook: nothing is lost, and the same call may succeed later.

    A disk that is full, a network that is away. The plugin is called again with the same arguments, and with
    what comes after them only when it has taken them. What it did before it raised must do no harm when it
    is done again.
    """


def closest(name: str, known: Iterable[str]) -> str:
    """' Did you mean x, y?' for the names in `known` nearest to `name`, or ''."""
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
    return f" Did you mean {', '.join(near)}?" if near else ""
