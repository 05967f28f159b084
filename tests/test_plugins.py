"""Plugins: how they are found and named, and what is said of those that do not fit."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from collector import HOT, RULES

from moe_rules_callback import (
    Audit,
    MissingSignalError,
    PluginError,
    Predicate,
    RuleSyntaxError,
    Signal,
    get_plugin_manager,
    hookimpl,
)
from moe_rules_callback.plugins import contributions, find_router_probs

ROOT = Path(__file__).parents[1]
USE_SAMPLE = """
from moe_rules_callback import RuleAuditCallback, get_plugin_manager

with RuleAuditCallback({"mine": "high_loss"}) as audit:
    for queue in (0.0, 9.0):
        audit.on_step({"loss": 1.0, "queue": [queue, queue + 2]})
history = audit.history
print(get_plugin_manager().has_plugin("sample"))
print(history.signal_value.sel(signal="mean_queue", layer="model").values.tolist())
print(history.state.sel(rule="jam").values.tolist())
"""


class Gives:
    """A plugin that contributes."""

    def __init__(self, signals: Any = None, predicates: Any = None, rules: Any = None) -> None:
        self.signals, self.predicates, self.rules = signals, predicates, rules

    @hookimpl
    def provide_signals(self) -> Any:
        return {} if self.signals is None else self.signals

    @hookimpl
    def provide_predicates(self) -> Any:
        return {} if self.predicates is None else self.predicates

    @hookimpl
    def provide_rules(self) -> Any:
        return {} if self.rules is None else self.rules


class Other(Gives):
    pass


def audit_with(*plugins: Any, rules: Any = RULES) -> Audit:
    return Audit(rules, plugin_manager=get_plugin_manager(plugins))


def refusal(*plugins: Any, **options: Any) -> str:
    with pytest.raises(PluginError) as error:
        audit_with(*plugins, **options)
    return str(error.value)


# Registration.


def test_each_manager_is_its_own():
    plugin = Gives()
    assert get_plugin_manager([plugin]).is_registered(plugin)
    assert not get_plugin_manager().is_registered(plugin)


def test_plugins_are_named_after_their_class_or_module():
    module = ModuleType("my.module")
    module.__dict__["on_step"] = hookimpl(lambda: None)
    plugins = [Gives(), Gives(), Other(), Gives(), module]
    names = [get_plugin_manager(plugins).get_name(plugin) for plugin in plugins]
    assert names == ["Gives", "Gives-2", "Other", "Gives-3", "my.module"]


def test_a_plugin_whose_methods_are_not_marked():
    class Plugin:
        def on_alert(self, alert): ...

    assert refusal(Plugin()) == (
        "plugin 'test_a_plugin_whose_methods_are_not_marked.<locals>.Plugin' has no method marked with "
        "moe_rules_callback.hookimpl, so nothing would ever call it. Mark those that are hooks; "
        "moe_rules_callback.hookspecs lists them."
    )


def test_a_misspelt_hook():
    class Plugin:
        @hookimpl
        def on_alrt(self, alert): ...

    assert refusal(Plugin()).startswith(
        "plugin 'test_a_misspelt_hook.<locals>.Plugin' does not fit the hooks: unknown hook 'on_alrt'"
    )


def test_an_installed_plugin_that_cannot_be_imported_is_left_out(monkeypatch, caplog):
    broken = SimpleNamespace(
        name="broken", value="broken:Plugin", load=lambda: import_module("no_such_module")
    )
    monkeypatch.setattr("moe_rules_callback.plugins.entry_points", lambda group: [broken])
    get_plugin_manager()
    assert caplog.messages == ["plugin 'broken' (broken:Plugin) cannot be imported and is left out"]
    assert "No module named 'no_such_module'" in caplog.text


def test_an_argument_that_the_hook_does_not_have():
    class Plugin:
        @hookimpl
        def on_alert(self, alarm): ...

    message = refusal(Plugin())
    assert "Plugin' does not fit the hooks: " in message
    assert "{'alarm'} are declared in the hookimpl but can not be found in the hookspec" in message
    assert message.endswith("moe_rules_callback.hookspecs lists them with their arguments.")


def test_a_class_instead_of_its_instance():
    assert "{'self'} are declared in the hookimpl but can not be found" in refusal(type("Sub", (), {
        "on_alert": hookimpl(lambda self, alert: None),
    }))  # fmt: skip


# Contributions.

PREDICATE, SIGNAL = Predicate("x", "high", 1.0), Signal(lambda metrics: metrics["x"], ("x",))


GIVEN = {"signals": SIGNAL, "predicates": PREDICATE, "rules": "is_hot"}


@pytest.mark.parametrize("kind", GIVEN)
def test_a_name_given_by_two_plugins(kind):
    given = {kind: {"same": GIVEN[kind]}}
    assert refusal(Gives(**given), Other(**given)) == (
        f"plugins 'Other' and 'Gives' both provide {kind} called 'same'. "
        "Rename one, or leave one of the plugins out."
    )


def test_a_rule_of_a_plugin_that_the_user_has_too():
    assert (
        refusal(Gives(rules={"hot": "is_hot"}))
        == "a plugin and the rules both name a rule 'hot'. Rename yours."
    )


@pytest.mark.parametrize("given", [[HOT], 0])
def test_a_contribution_that_is_no_mapping(given):
    assert refusal(Gives(rules=given)) == (
        f"provide_rules of plugin 'Gives' returned a {type(given).__name__}; it must return a mapping from "
        "names to what they stand for."
    )


@pytest.mark.parametrize(("kind", "value", "called"), [
    ("signals", 3, "a Signal or a function of the metrics"),
    ("predicates", "high_x", "a Predicate"),
    ("rules", PREDICATE, "a Rule or its text"),
])  # fmt: skip
def test_a_contribution_of_the_wrong_kind(kind, value, called):
    assert refusal(Gives(**{kind: {"odd": value}})) == (
        f"provide_{kind} of plugin 'Gives' gives a {type(value).__name__} for 'odd'; it takes {called}."
    )


def test_a_contribution_that_raises():
    class Plugin:
        @hookimpl
        def provide_rules(self):
            raise KeyError("threshold")

    assert refusal(Plugin()) == (
        "provide_rules of plugin 'test_a_contribution_that_raises.<locals>.Plugin' raised "
        "KeyError('threshold'). Mend the plugin, or leave it out."
    )


def test_a_rule_of_a_plugin_that_cannot_be_read():
    with pytest.raises(RuleSyntaxError, match="rule 'odd': "):
        audit_with(Gives(rules={"odd": "a &"}))


def test_contributions_of_several_plugins_are_merged():
    manager = get_plugin_manager([Gives(rules={"a": "is_hot"}), Other(rules={"b": "is_hot"})])
    assert contributions(manager, "provide_rules") == {"a": "is_hot", "b": "is_hot"}


def test_rules_of_plugins_without_their_signals_are_left_out(caplog):
    plugin = Gives(
        rules={"works": "~is_hot", "queueing": "high_queue", "odd": "foo", "calm": "stable_queue"},
        signals={"queue": Signal(lambda metrics: metrics["queue_length"], ("queue_length",))},
    )
    audit = audit_with(plugin)
    audit.init({"x": 0.0})
    assert audit.schema.rule_names == ("hot", "works")
    (message,) = caplog.messages
    assert message.startswith(
        "rules without their signals are left out:\n  pass 'queue_length' for queueing, calm\n  "
    )
    assert "no predicate is called 'foo'" in message
    assert message.endswith(" Hence without odd")


def test_a_rule_of_the_user_over_a_plugins_absent_signal_is_an_error():
    plugin = Gives(signals={"queue": Signal(lambda metrics: metrics["queue_length"], ("queue_length",))})
    with pytest.raises(MissingSignalError, match=r"'full' needs the signal 'queue'.* pass 'queue_length'"):
        audit_with(plugin, rules={"full": "high_queue"}).init({"x": 0.0})


def test_a_signal_that_raises_is_named():
    def broken(metrics):
        return metrics["queue"]

    audit = audit_with(Gives(signals={"waiting": broken}), rules={"jam": "high_waiting"})
    state = audit.init({"x": 0.0})
    with pytest.raises(KeyError) as error:
        audit.update(state, {"x": 0.0})
    assert error.value.__notes__ == ["This was raised by the signal 'waiting', given x."]


# Adapters.


def test_an_object_that_no_adapter_recognises():
    with pytest.raises(PluginError) as error:
        find_router_probs(get_plugin_manager(), SimpleNamespace())
    assert str(error.value) == (
        "no adapter recognises a types.SimpleNamespace as a source of router probabilities. Pass an array or "
        "a mapping layer -> array as 'router_probs', or write a plugin with the hook find_router_probs."
    )


def test_arrays_and_mappings_are_not_shown_to_adapters():
    class Plugin:
        @hookimpl
        def find_router_probs(self, source):
            raise AssertionError

    for given in (np.full((2, 4), 0.25), [np.full((2, 4), 0.25)], {"a": np.full((2, 4), 0.25)}):
        audit_with(Plugin()).init({"x": 0.0, "router_probs": given})


# A distribution.


def run(*command: Any, **environment: str) -> str:
    environment = {"PATH": "", "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_an_installed_distribution_takes_part(tmp_path):
    run(
        sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
        "--target", tmp_path, Path(__file__).parent / "sample_plugin",
    )  # fmt: skip
    assert run(sys.executable, "-c", USE_SAMPLE, PYTHONPATH=f"{ROOT}:{tmp_path}").splitlines() == [
        "sample got 2 rows of mine, jam",
        "True",
        "[1.0, 10.0]",
        "[0, 1]",
    ]
