"""The plugin manager: what takes part in an audit besides the audit itself.

    manager = get_plugin_manager()
    manager.register(MyPlugin())
    RuleAuditCallback(rules, plugins=[MyOther()])       # makes its own manager and registers MyOther

A manager is made anew each time, never shared. It holds the plugins of installed distributions (entry
points of the group `moe_rules_callback`) and, for each training framework that the program has already
imported, the adapter that recognises its objects.
"""

from __future__ import annotations

import importlib
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from . import hookspecs
from .errors import PluginError
from .formula import Rule
from .predicates import Predicate
from .signals import Signal

log = logging.getLogger("moe_rules_callback")
VALUES = {
    "provide_signals": ((Signal, Callable), "a Signal or a function of the metrics"),
    "provide_predicates": ((Predicate,), "a Predicate"),
    "provide_rules": ((Rule, str), "a Rule or its text"),
}
ADAPTERS = {  # framework -> module of integrations
    "flax.nnx": "flax_nnx",
    "flax.linen": "flax_linen",
    "equinox": "equinox",
    "penzai": "penzai",
    "haiku": "haiku",
}


def get_plugin_manager(plugins: Iterable[Any] = ()) -> pluggy.PluginManager:
    """A new manager with the entry points' plugins and `plugins`.

    Raises:
        PluginError: a method marked with `hookimpl` is no hook, or takes arguments that its hook lacks; or
            no method is marked.
    """
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    try:
        for entry in entry_points(group=hookspecs.PROJECT):
            if (plugin := _loaded(entry)) is not None:
                manager.register(plugin, entry.name)
        for plugin in plugins:
            manager.register(plugin, name := _free_name(manager, plugin))
            if not manager.get_hookcallers(plugin):
                raise PluginError(
                    f"plugin '{name}' has no method marked with moe_rules_callback.hookimpl, so nothing "
                    f"would ever call it. Mark those that are hooks; moe_rules_callback.hookspecs lists them."
                )
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(
            f"plugin {_name(manager, error.plugin)} does not fit the hooks: {error}. "
            f"moe_rules_callback.hookspecs lists them with their arguments."
        ) from error
    return manager


def contributions(manager: pluggy.PluginManager, hook: str) -> dict[str, Any]:
    """What all plugins return for `provide_signals`, `provide_predicates` or `provide_rules`, merged.

    Raises:
        PluginError: two plugins give the same name, or one raises or returns something else.
    """
    merged: dict[str, Any] = {}
    giver: dict[str, str] = {}
    for implementation in reversed(getattr(manager.hook, hook).get_hookimpls()):
        plugin = implementation.plugin_name
        try:
            given = implementation.function()
        except Exception as error:
            raise PluginError(
                f"{hook} of plugin '{plugin}' raised {error!r}. Mend the plugin, or leave it out."
            ) from error
        if not isinstance(given, Mapping):
            raise PluginError(
                f"{hook} of plugin '{plugin}' returned a {type(given).__name__}; it must return a mapping "
                f"from names to what they stand for."
            )
        kinds, called = VALUES[hook]
        for name, value in given.items():
            if not isinstance(value, kinds):
                raise PluginError(
                    f"{hook} of plugin '{plugin}' gives a {type(value).__name__} for '{name}'; "
                    f"it takes {called}."
                )
            if name in merged:
                raise PluginError(
                    f"plugins '{giver[name]}' and '{plugin}' both {hook.replace('_', ' ')} called '{name}'. "
                    f"Rename one, or leave one of the plugins out."
                )
            merged[name], giver[name] = value, plugin
    return merged


def find_router_probs(manager: pluggy.PluginManager, source: Any) -> Any:
    """Ask the adapters of the frameworks in use, then the plugins, for the probabilities in `source`.

    Raises:
        PluginError: nobody recognises the object.
    """
    for framework, adapter in ADAPTERS.items():
        if framework in sys.modules:
            module = importlib.import_module(f"moe_rules_callback.integrations.{adapter}")
            if not manager.is_registered(module):
                manager.register(module)
    if (found := manager.hook.find_router_probs(source=source)) is None:
        raise PluginError(
            f"no adapter recognises a {type(source).__module__}.{type(source).__qualname__} as a source of "
            f"router probabilities. Pass an array or a mapping layer -> array as 'router_probs', or write a "
            f"plugin with the hook find_router_probs."
        )
    return found


def _loaded(entry: EntryPoint) -> Any:
    """The plugin of an installed distribution; one that cannot be imported is reported and left out."""
    try:
        return entry.load()
    except Exception:
        log.exception("plugin '%s' (%s) cannot be imported and is left out", entry.name, entry.value)
        return None


def _free_name(manager: pluggy.PluginManager, plugin: object) -> str:
    """Name of a module or class, also for an object of it; with a number if it is taken."""
    name = getattr(plugin, "__name__", type(plugin).__qualname__)
    numbered = (f"{name}-{i}" for i in itertools.count(2))
    return next(each for each in itertools.chain([name], numbered) if not manager.has_plugin(each))


def _name(manager: pluggy.PluginManager, plugin: object) -> str:
    return f"'{manager.get_name(plugin) or type(plugin).__name__}'"
