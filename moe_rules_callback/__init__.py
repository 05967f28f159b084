"""Logical rules over the router of a Mixture-of-Experts model, evaluated while it trains.

from moe_rules_callback import RuleAuditCallback

with RuleAuditCallback(rules, logdir="runs/demo") as audit:
    for x, y in batches:
        loss, router_probs = train_step(model, optimizer, x, y)
        audit.on_step({"loss": loss, "router_probs": router_probs})
"""

from typing import TYPE_CHECKING

from .alerts import Alert
from .audit import Audit, AuditState
from .callback import RuleAuditCallback
from .errors import (
    HistoryError,
    MetricsError,
    MissingSignalError,
    MoeRulesError,
    PluginError,
    RulebookError,
    RuleSyntaxError,
    TryAgain,
    UnknownNameError,
)
from .evaluation import Evaluation, Interval, evaluate
from .formula import Rule
from .hookspecs import hookimpl
from .language import parse_rule
from .plugins import get_plugin_manager
from .predicates import Predicate
from .probes import ProbeState, RouterProbe
from .records import Records, Run, Schema, SignalInfo, State
from .rulebook import Rulebook, load_rules
from .signals import Signal

if TYPE_CHECKING:
    from .history import open_history

__all__ = [
    "Alert",
    "Audit",
    "AuditState",
    "Evaluation",
    "HistoryError",
    "Interval",
    "MetricsError",
    "MissingSignalError",
    "MoeRulesError",
    "PluginError",
    "Predicate",
    "ProbeState",
    "Records",
    "RouterProbe",
    "Rule",
    "RuleAuditCallback",
    "RuleSyntaxError",
    "Rulebook",
    "RulebookError",
    "Run",
    "Schema",
    "Signal",
    "SignalInfo",
    "State",
    "TryAgain",
    "UnknownNameError",
    "evaluate",
    "get_plugin_manager",
    "hookimpl",
    "load_rules",
    "open_history",
    "parse_rule",
]


def __getattr__(name: str):
    if name == "open_history":  # brings in xarray
        from .history import open_history

        return open_history
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
