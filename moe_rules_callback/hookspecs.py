"""The hook specification: everything that a plugin can take part in.

A plugin is any object or module whose methods carry `hookimpl`:

    from moe_rules_callback import hookimpl

    class PrintFirings:
        @hookimpl
        def on_alert(self, alert):
            print(alert)

    RuleAuditCallback(rules, plugins=[PrintFirings()])

or a distribution with an entry point in the group `moe_rules_callback`. A method may take any subset
of a hook's arguments, without defaults: pluggy passes nothing to an argument that has one. A plugin
that raises in an event is reported once, with its name, and switched off; one that raises `TryAgain` is given
the same again until it has taken it. One that raises in a contribution is an error before training begins.
Training goes on.

Hooks run on the host. `on_step` runs on the thread that calls the callback. The other events run on a thread
of the plugin's own, one after the other in the order of the run, so that nobody waits for a plugin that is
slow; 64 MiB of rows are kept for it, then newer ones are dropped. There a plugin may read `callback.history`
but not call `flush` or `close`, which wait for that thread. (`on_train_start` of a plugin that has `on_step`,
too, runs on the callback's thread.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .alerts import Alert
    from .formula import Rule
    from .predicates import Predicate
    from .records import Records, Run
    from .signals import Signal

PROJECT = "moe_rules_callback"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


# Events that a trainer raises.


@hookspec
def on_train_start(run: Run) -> None:
    """Before the first row is delivered: open files, remember the schema.

    :param run: schema, log directory and settings of this run.
    """


@hookspec
def on_step(metrics: Mapping[str, Any], step: int | None) -> None:
    """After a training step, on the trainer's thread. Do not wait for the device here.

    :param metrics: what the step handed over: `loss`, `router_probs`, ... (see `metrics`).
    :param step: number of the step; None: one more than the last.
    """


@hookspec
def on_train_end(run: Run) -> None:
    """After the last row was delivered: close files.

    :param run: the object that `on_train_start` got.
    """


# Events that the audit raises.


@hookspec
def on_records(records: Records) -> None:
    """A batch of finished rows, in the order in which they were made.

    :param records: the rows as NumPy arrays; shared between plugins, so do not write into them.
    """


@hookspec
def on_rewind(step: int) -> None:
    """Training went on from an older state: rows from `step` on, as far as there are any, are void.

    Rows that replace them follow.

    :param step: of the first row that is void.
    """


@hookspec
def on_alert(alert: Alert) -> None:
    """A rule began to fire: a risk became TRUE or a health rule FALSE, after its warm-up.

    :param alert: rule, step, layer and the verdict in words.
    """


@hookspec
def on_alert_end(alert: Alert) -> None:
    """A rule that fired has not for 32 rows. An alert that lasts to the end of the run does not end.

    :param alert: as `on_alert` got it, with `ended`, the step of the first of these rows.
    """


# Contributions, asked once when the callback is made.


@hookspec
def provide_signals() -> Mapping[str, Signal | Callable[[Mapping[str, Any]], Any]]:
    """Signals by name: a `Signal`, or a function of the metrics that gives a scalar.

    Mappings of all plugins are merged; a name given twice is an error naming both plugins.
    """
    ...


@hookspec
def provide_predicates() -> Mapping[str, Predicate]:
    """Predicates by name. A name given twice is an error naming both plugins."""
    ...


@hookspec
def provide_rules() -> Mapping[str, Rule | str]:
    """Rules by name, as `Rule` objects or as text. They are evaluated beside the user's own."""
    ...


# Adapters.


@hookspec(firstresult=True)
def find_router_probs(source: Any) -> Any:
    """Router probabilities in a trainer's own object, or None if the object is not yours.

    Called for a metric `router_probs` or `intermediates` that is neither an array nor a mapping of
    arrays, when its structure is first seen. Stops at the first result that is not None.

    :param source: the object, for instance an NNX state or Linen's `intermediates`.
    :return: one array [.., tokens, experts] or a mapping layer -> array.
    """
