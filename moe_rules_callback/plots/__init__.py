"""The pictures of a run: `FIGURES` by the names of their files, each a function dataset -> `Figure`.

    history = open_history("runs/demo")
    save(plot_timeline(history), "rule_timeline.png")
    plot_audit(history, "audit.svg")                  the tutorial's picture; also history.moe_rules.plot(..)

One raises `HistoryError` where the history does not hold what it draws. `plot_affinity` draws a table that
no history holds.
"""

from __future__ import annotations

from collections.abc import Callable

import xarray as xr
from matplotlib.figure import Figure

from .affinity import Affinity, plot_affinity, read_affinity
from .audit import plot_audit
from .experts import plot_expert_totals, plot_experts
from .signals import plot_accuracy, plot_coactivation, plot_entropy, plot_layers
from .style import save
from .timeline import plot_timeline

FIGURES: dict[str, Callable[[xr.Dataset], Figure]] = {
    "audit": plot_audit,
    "rule_timeline": plot_timeline,
    "expert_utilization": plot_experts,
    "expert_utilization_total": plot_expert_totals,
    "router_entropy": plot_entropy,
    "routing_accuracy": plot_accuracy,
    "expert_coactivation": plot_coactivation,
    "layer_signals": plot_layers,
}
AFFINITY = "router_affinity_matrix_heatmap"

__all__ = [
    "AFFINITY",
    "FIGURES",
    "Affinity",
    "plot_accuracy",
    "plot_affinity",
    "plot_audit",
    "plot_coactivation",
    "plot_entropy",
    "plot_expert_totals",
    "plot_experts",
    "plot_layers",
    "plot_timeline",
    "read_affinity",
    "save",
]
