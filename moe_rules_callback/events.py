"""Who is told what: each hook of each plugin, at once or on the plugin's own thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import pluggy

from .at_exit import hurry
from .outbox import Outbox, report_off
from .records import Run

log = logging.getLogger("moe_rules_callback")
ASIDE = ("on_train_start", "on_records", "on_rewind", "on_alert", "on_alert_end", "on_train_end")
FURTHER_ATTEMPTS = 10.0  # seconds at the end of a run in which a plugin that fails is tried again


class Events:
    """Calls the hooks of a run.

    `on_step` is called at once. The others are called on a thread for each plugin, see `outbox`, with one
    exception: `on_train_start` of a plugin with `on_step` is called at once too, so that it comes first.

    Args:
        manager: whose plugins are called; they must not change once the run has started.
    """

    def __init__(self, manager: pluggy.PluginManager) -> None:
        self._manager = manager
        self._off: set[str] = set()  # plugins that are switched off
        self._boxes: dict[str, Outbox] = {}

    @property
    def on_own_thread(self) -> bool:
        """Whether this is asked by a plugin on its own thread."""
        return any(box.is_current for box in self._boxes.values())

    def start(self, run: Run) -> None:
        """Make the threads, and call `on_train_start`."""
        for name, _ in reversed(self._manager.list_name_plugin()):
            found = {hook: function for hook in ASIDE if (function := self._function(hook, name))}
            if not found:
                continue
            box = self._boxes[name] = Outbox(name, found, self._off)
            if "on_train_start" in found and self._function("on_step", name):
                self._call(name, "on_train_start", found["on_train_start"], run=run)
            else:
                box.put("on_train_start", run=run)

    def step(self, **arguments: Any) -> None:
        """Call `on_step` of each plugin now."""
        for implementation in reversed(self._manager.hook.on_step.get_hookimpls()):
            if implementation.plugin_name not in self._off:
                self._call(implementation.plugin_name, "on_step", _by_name(implementation), **arguments)

    def tell(self, hook: str, **arguments: Any) -> None:
        """Call a hook of each plugin on its own thread, in the order in which they are told."""
        for box in self._boxes.values():
            box.put(hook, **arguments)

    def wait_for(self, plugin: object, deadline: float) -> None:
        """Wait until one plugin has all that it was told; not from its own thread."""
        box = self._boxes.get(str(self._manager.get_name(plugin)))
        if box is not None and not box.is_current:
            box.wait(deadline)

    def wait(self, deadline: float) -> None:
        """Wait until all plugins have all that they were told, and report those that do not."""
        late = [box for box in self._boxes.values() if not box.wait(deadline)]
        for complaint in filter(None, (box.complaint() for box in late)):
            log.warning("not everything is written yet: %s", complaint)

    def close(self, run: Run, deadline: float) -> None:
        """Call `on_train_end`, wait until all is done, and report what is not."""
        attempts_until = min(deadline, time.monotonic() + FURTHER_ATTEMPTS)
        self.tell("on_train_end", run=run)
        interrupt: BaseException | None = None
        for box in self._boxes.values():
            try:
                box.wait(deadline, attempts_until)
            except BaseException as error:  # Ctrl-C or SIGTERM; once more, and it is not waited for
                interrupt = error
                deadline = min(deadline, time.monotonic() + hurry(error))
                box.wait(deadline, attempts_until)
            box.end()
        for complaint in filter(None, (box.complaint() for box in self._boxes.values())):
            log.warning("the run has ended and not everything is written: %s", complaint)
        if interrupt is not None:
            raise interrupt

    def _function(self, hook: str, plugin: str) -> Callable[..., Any] | None:
        """A plugin's implementation of a hook."""
        implementations = getattr(self._manager.hook, hook).get_hookimpls()
        return next((_by_name(each) for each in implementations if each.plugin_name == plugin), None)

    def _call(self, plugin: str, hook: str, function: Callable[..., Any], **arguments: Any) -> None:
        try:
            function(**arguments)
        except (Exception, SystemExit):  # a plugin that calls sys.exit must not end the training
            report_off(plugin, hook, self._off)


def _by_name(implementation: pluggy.HookImpl) -> Callable[..., Any]:
    """The function, called with keywords of which it takes those that it names."""

    def call(**arguments: Any) -> Any:
        return implementation.function(*(arguments[name] for name in implementation.argnames))

    return call
