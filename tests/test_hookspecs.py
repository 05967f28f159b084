"""Every hook is documented, and does what its documentation says."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pluggy
import pytest
from collector import HOT, RULES, Collector

from moe_rules_callback import Audit, Predicate, RuleAuditCallback, hookimpl, hookspecs
from moe_rules_callback.plugins import get_plugin_manager
from moe_rules_callback.records import ARRAYS

HOOKS = {
    name: function
    for name, function in vars(hookspecs).items()
    if hasattr(function, f"{hookspecs.PROJECT}_spec")
}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_explains_itself_and_its_parameters(name):
    doc = inspect.getdoc(HOOKS[name]) or ""
    assert len(doc.splitlines()[0]) > 20
    for parameter in inspect.signature(HOOKS[name]).parameters.values():
        assert f":param {parameter.name}: " in doc
        assert parameter.default is parameter.empty  # pluggy would not pass it on
        assert parameter.annotation is not parameter.empty


def test_the_hooks_are_these():
    assert list(HOOKS) == [
        "on_train_start", "on_step", "on_train_end", "on_records", "on_rewind", "on_alert", "on_alert_end",
        "provide_signals", "provide_predicates", "provide_rules", "find_router_probs",
    ]  # fmt: skip


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_test(name):
    assert f"test_hook_{name}" in globals()


def make(*plugins: Any, **options: Any) -> RuleAuditCallback:
    return RuleAuditCallback(RULES, plugins=plugins, flush_every=2, **options)


def test_hook_on_train_start(tmp_path):
    runs = []

    class Plugin:
        @hookimpl
        def on_train_start(self, run):
            runs.append(run)

    with make(Plugin(), logdir=tmp_path, sinks=[], resume=True, config={"lr": 0.1}) as audit:
        assert runs == []
        audit.on_step({"x": 0.0})
        audit.on_step({"x": 0.0})
    (run,) = runs
    assert (run.logdir, run.flush_every, run.resume, run.config) == (tmp_path, 2, True, {"lr": 0.1})
    assert (run.schema.rules, run.schema.signal_names, run.schema.layers) == ((HOT,), ("x",), ("model",))


def test_hook_on_step():
    seen = []

    class Plugin:
        @hookimpl
        def on_step(self, metrics, step):
            seen.append((metrics, step))

    with make(Plugin()) as audit:
        audit.on_step({"x": 1.0, "note": "anything"})
        audit.on_step({"x": 2.0}, 7)
    assert seen == [({"x": 1.0, "note": "anything"}, None), ({"x": 2.0}, 7)]


def test_hook_on_step_reaches_a_callback_in_a_manager_of_the_trainer():
    """pluggy passes nothing to an argument that has a default, as `step` of the method has."""
    seen = Collector()
    pm = pluggy.PluginManager(hookspecs.PROJECT)
    pm.add_hookspecs(hookspecs)
    pm.register(make(seen))
    pm.check_pending()
    pm.hook.on_step(metrics={"x": 1.0}, step=7)
    pm.hook.on_step(metrics={"x": 2.0}, step=None)
    pm.hook.on_train_end(run=None)
    assert (seen.steps, seen.x, seen.events[-1]) == ([7, 8], [1, 2], "on_train_end")


def test_hook_on_train_end():
    runs = []

    class Plugin:
        @hookimpl
        def on_train_start(self, run):
            runs.append(run)

        on_train_end = on_train_start

    with make(Plugin()) as audit:
        audit.on_step({"x": 0.0})
    assert len(runs) == 2
    assert runs[0] is runs[1]


def test_hook_on_records():
    seen = Collector()
    with make(seen) as audit:
        for x in (0.0, 0.5, -1.0):
            audit.on_step({"x": x})
    assert [batch.step.tolist() for batch in seen.batches] == [[0, 1], [2]]
    assert seen.x == [0, 0.5, -1]
    assert {type(getattr(batch, name)) for batch in seen.batches for name in ARRAYS} == {np.ndarray}


def test_hook_on_rewind():
    """The rows that are void, and then those that replace them, in the place of both."""

    class Plugin(Collector):
        @hookimpl
        def on_rewind(self, step):
            self.events.append(f"on_rewind {step}")

    seen = Plugin()
    with make(seen) as audit:
        assert audit.state is None
        for x in range(4):
            audit.on_step({"x": x})
        saved = audit.state
        for x in range(4, 6):
            audit.on_step({"x": x})
        audit.restore(saved)
        for x in (40, 50, 60):
            audit.on_step({"x": x})
        assert audit.history.signal_pooled.sel(signal="x").values.tolist() == [0, 1, 2, 3, 40, 50, 60]
        assert audit.history.step.values.tolist() == [0, 1, 2, 3, 4, 5, 6]
    at = seen.events.index("on_rewind 4")
    assert sum(map(len, seen.batches[: seen.events[:at].count("on_records")])) == 6
    assert seen.steps == [0, 1, 2, 3, 4, 5, 4, 5, 6]


def test_hook_on_alert():
    seen = Collector()
    with make(seen) as audit:
        for x in (0.0, -1.0, -1.0):
            audit.on_step({"x": x})
    assert [(alert.rule, alert.step, alert.layer) for alert in seen.alerts] == [(HOT, 1, "model")]
    assert seen.events == ["on_train_start", "on_records", "on_alert", "on_records", "on_train_end"]


def test_hook_on_alert_end():
    began, ended = [], []

    class Plugin:
        @hookimpl
        def on_alert(self, alert):
            began.append(alert)

        @hookimpl
        def on_alert_end(self, alert):
            ended.append(alert)

    with make(Plugin()) as audit:
        for step in range(40):
            audit.on_step({"x": -1.0 if step in (0, 2) else 0.0})
            audit.flush()
    assert [(alert.step, alert.ended) for alert in began] == [(0, None)]
    assert [(alert.rule, alert.step, alert.ended) for alert in ended] == [(HOT, 0, 3)]


def test_hook_provide_signals():
    class Plugin:
        @hookimpl
        def provide_signals(self):
            return {"span": lambda metrics: jnp.ptp(metrics["attention"])}

    with make(Plugin(), signals=["span"]) as audit:
        audit.on_step({"x": 0.0, "attention": np.array([1.0, 5.0])})
        audit.on_step({"x": 0.0, "attention": np.array([1.0, 7.0])})
    assert audit.history.signal_value.sel(signal="span", layer="model").values.tolist() == [4, 6]


def test_hook_provide_predicates():
    class Plugin:
        @hookimpl
        def provide_predicates(self):
            return {"enough": Predicate("x", "high", 10.0)}

    with RuleAuditCallback({"full": "enough"}, plugins=[Plugin()]) as audit:
        for x in (0.0, 10.0, 20.0):
            audit.on_step({"x": x})
    assert audit.history.state.sel(rule="full").values.tolist() == [0, 2, 1]


def test_hook_provide_rules():
    class Plugin:
        @hookimpl
        def provide_rules(self):
            return {"cold": "~is_hot", "burning": HOT}

    with make(Plugin()) as audit:
        audit.on_step({"x": -1.0})
    assert dict(zip(audit.history.rule.values.tolist(), audit.history.state.values[0], strict=True)) == {
        "hot": 1, "cold": 0, "burning": 1,
    }  # fmt: skip


def test_hook_find_router_probs():
    probs, asked = np.full((4, 3), 1 / 3), []

    def plugin(name: str, answer: Any) -> Any:
        class Plugin:
            @hookimpl
            def find_router_probs(self, source):
                asked.append((name, source))
                return answer

        return Plugin()

    sown = SimpleNamespace()
    manager = get_plugin_manager(
        [plugin("never", None), plugin("first", {"block": probs}), plugin("last", None)]
    )
    for metric in ("intermediates", "router_probs"):
        asked.clear()
        audit = Audit({"sure": "high_routing_confidence"}, plugin_manager=manager)
        audit.init({metric: sown})
        assert audit.schema.layers == ("block",)
        assert asked == [("last", sown), ("first", sown)]  # stops at the first result
