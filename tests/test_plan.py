"""From metrics to rows: signals in windows, what is recorded, and rows whose metrics are not finite."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
from audited import records, signal, state, truth

from moe_rules_callback import Audit, MetricsError, MissingSignalError, Rule, hookimpl
from moe_rules_callback.plugins import get_plugin_manager
from moe_rules_callback.predicates import Predicate
from moe_rules_callback.rulebook import Rulebook
from moe_rules_callback.signals import Signal

rng = np.random.default_rng(0)
PROBS = rng.dirichlet(np.ones(4), (40, 12)).astype(np.float32)
LOSS = (3 - 0.01 * np.arange(140) + 0.05 * rng.normal(size=140)).astype(np.float32)


def losses(values: Any) -> list[dict[str, Any]]:
    return [{"loss": np.float32(x)} for x in values]


def test_an_expert_is_dead_after_32_rows_without_work() -> None:
    """Expert 3 stops at row 5; its mean over 32 rows falls below .1 / E when its last share has left."""
    busy, idle = np.tile([[0, 1], [2, 3]], (6, 1)), np.tile([[0, 1], [2, 1]], (6, 1))
    steps = [{"router_probs": PROBS[0], "expert_index": busy if row < 5 else idle} for row in range(40)]
    q = np.array([[0.25] * 4 if row < 5 else [0.25, 0.5, 0.25, 0] for row in range(40)])
    expected = [np.mean(q[max(0, t - 31) : t + 1].mean(0) < 0.1 / 4) for t in range(40)]
    rows = records(Audit({}, signals="dead_expert_fraction"), steps)
    got = signal(rows, "dead_expert_fraction")[:, 0]
    np.testing.assert_allclose(got, expected)
    assert got[0] == 0
    assert got[-1] == 0.25
    np.testing.assert_allclose(rows.expert_share[:, 0], q)


def test_a_bad_row_is_no_row_for_the_dead() -> None:
    index = np.tile([[0, 1], [2, 3]], (6, 1))
    broken = np.full_like(index, -1)
    steps = [{"router_probs": PROBS[0], "expert_index": broken if t in (0, 7) else index} for t in range(10)]
    got = signal(records(Audit({}, signals="dead_expert_fraction"), steps), "dead_expert_fraction")[:, 0]
    np.testing.assert_array_equal(got, [np.nan if t in (0, 7) else 0 for t in range(10)])


def test_loss_slope_and_spike_score() -> None:
    rows = records(Audit({}, signals=("loss_slope", "loss_spike_score")), losses(LOSS))
    slope, spike = signal(rows, "loss_slope")[:, 0], signal(rows, "loss_spike_score")[:, 0]
    assert np.isnan(slope[:31]).all()
    assert np.isnan(spike[:128]).all()
    for t in (31, 60, 139):
        newer, older = LOSS[t - 15 : t + 1], LOSS[t - 31 : t - 15]
        assert slope[t] == pytest.approx((np.median(newer) - np.median(older)) / 16, abs=1e-6)
    for t in (128, 139):
        past = LOSS[t - 128 : t].astype(np.float64)
        assert spike[t] == pytest.approx((LOSS[t] - past.mean()) / past.std(ddof=1), rel=1e-3)


def test_a_window_that_has_not_filled_is_unknown_and_no_gap() -> None:
    """Else `always[8]` over it would be certain of 8 rows from the first one on."""
    y = LOSS.copy()
    y[128:] += 3
    rules = {"spiked": "always[4](high_loss_spike_score)", "rose": "always[4](increasing_loss)"}
    rows = records(Audit(rules), losses(y))
    assert (truth(rows, "spiked")[:131, 0, 0] == 0).all()
    assert (truth(rows, "rose")[:34, 0, 0] == 0).all()
    assert (truth(rows, "rose")[34, 0] != [0, 1]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_metric_that_is_not_finite_spoils_its_own_row_only(bad: float) -> None:
    """Every rule over it is unknown there; windows and trends afterwards are those without that row."""
    rules = {
        "now": "high_x", "trend": "increasing_loss", "stable": "stable_loss", "always": "always[4](low_x)",
        "before": "previously(low_x)", "since": "low_x since[5] high_x", "other": "high_y",
    }  # fmt: skip
    own = {f"{s}_{n}": Predicate(n, s, 0.5) for s in ("high", "low") for n in ("x", "y")}  # type: ignore[arg-type]
    book = Rulebook("mine", _rules(rules), own)
    x = rng.random(44)
    steps = [{"loss": LOSS[t], "x": np.float32(x[t]), "y": np.float32(0.3)} for t in range(44)]
    clean = records(Audit(book), steps)
    gap = (3, 20, 40)
    spoiled = [
        dict(m, x=np.float32(bad), loss=np.float32(bad)) if t in gap else m for t, m in enumerate(steps)
    ]
    rows = records(Audit(book), spoiled)
    for name in rules:
        if name == "other":
            np.testing.assert_array_equal(truth(rows, name), truth(clean, name))
            continue
        assert (truth(rows, name)[list(gap), 0] == [0, 1]).all(), name
        assert (state(rows, name)[list(gap)] == 2).all(), name
        assert np.isfinite(truth(rows, name)).all()
    series = [None if t in gap else naive.ramp(-float(np.float32(x[t])), -0.5) for t in range(44)]
    twin = naive.truth(_rule(rules["always"]), [{"low_x": v} for v in series])
    np.testing.assert_allclose(truth(rows, "always")[:, 0], twin, atol=1e-5)
    y = np.where(np.isin(np.arange(44), gap), np.nan, LOSS[:44])
    expected = [naive.ramp(naive.rising(y[t - 31 : t + 1]), 0.5) for t in (31, 39, 41, 43)]
    np.testing.assert_allclose(truth(rows, "trend")[[31, 39, 41, 43], 0], expected, atol=1e-3)
    np.testing.assert_array_equal(signal(rows, "x")[list(gap), 0], np.full(3, bad, np.float32))


def _rule(text: str):
    from moe_rules_callback.language import parse_formula

    return parse_formula(text)


def _rules(rules: dict[str, str]) -> tuple[Rule, ...]:
    return tuple(Rule(name, _rule(text), text=text) for name, text in rules.items())


def test_scalars_are_always_recorded_and_keep_their_values() -> None:
    rows = records(Audit({}), [{"loss": 2.5, "lr": 1e-3, "epoch": 3}])
    assert set(rows.schema.signal_names) == {"loss", "lr", "epoch"}
    assert signal(rows, "lr")[0, 0] == np.float32(1e-3)
    assert rows.schema.layers == ("model",)
    assert rows.schema.experts == 0
    assert not any(info.per_layer for info in rows.schema.signals)


def test_model_signals() -> None:
    tree = {
        "router": np.full(4, 1.0, np.float32),
        "experts": {"w": rng.normal(size=(4, 2, 3)).astype(np.float32)},
    }
    metrics = {"router_probs": PROBS[0], "params": tree, "grads": tree}
    rows = records(Audit({}, signals="all", top_k=2), [metrics])
    total = np.sqrt(4 + (tree["experts"]["w"] ** 2).sum())
    assert signal(rows, "weight_norm")[0, 0] == pytest.approx(total, rel=1e-6)
    assert signal(rows, "gradient_norm")[0, 0] == pytest.approx(total, rel=1e-6)
    assert signal(rows, "router_gradient_share")[0, 0] == pytest.approx(2 / total, rel=1e-6)
    assert 0 < signal(rows, "expert_gradient_min_share")[0, 0] < 1


def test_layers_with_different_numbers_of_experts() -> None:
    """Grouped by E, each with its own ramps; a pooled value over both means nothing and is NaN."""
    wide = rng.dirichlet(np.ones(8), 12).astype(np.float32)
    metrics = {"router_probs": {"a": PROBS[0], "b": wide, "c": PROBS[1]}}
    rows = records(Audit({"r": "high_load_cv"}, top_k=2), [metrics])
    assert rows.schema.layers == ("a", "c", "b")
    expected = [naive.router_signals(p, 2)["load_cv"] for p in (PROBS[0], PROBS[1], wide)]
    np.testing.assert_allclose(signal(rows, "load_cv")[0], expected, rtol=1e-5)
    assert np.isnan(rows.signal_pooled[0]).all()
    assert rows.expert_share.shape == (1, 3, 8)
    assert np.isnan(rows.expert_share[0, :2, 4:]).all()
    np.testing.assert_allclose(np.nansum(rows.expert_share[0], axis=-1), 1, rtol=1e-6)
    ramps = [naive.ramp(x / m, 0.4, 24, 0.025) for x, m in zip(expected, (1, 1, np.sqrt(3)), strict=True)]
    np.testing.assert_allclose(truth(rows, "r")[0], ramps, atol=1e-5)


def test_pooled_values_come_from_pooled_statistics() -> None:
    """Two layers that are each collapsed, onto different experts, are balanced together."""
    one = np.tile(np.eye(4, dtype=np.float32)[0], (12, 1))
    rows = records(Audit({}, signals="load_cv", top_k=1), [{"router_probs": [one, one[:, ::-1]]}])
    np.testing.assert_allclose(signal(rows, "load_cv")[0], [np.sqrt(3)] * 2, rtol=1e-6)
    assert rows.signal_pooled[0, 0] == pytest.approx(1)


def test_shares_are_those_of_the_first_choice_where_k_is_not_known(caplog: pytest.LogCaptureFixture) -> None:
    rows = records(Audit({}, max_experts=3), [{"router_probs": PROBS[0]}])
    first = np.bincount(PROBS[0].argmax(-1), minlength=4) / 12
    np.testing.assert_allclose(rows.expert_share[0, 0], first[:3], rtol=1e-6)
    assert "expert_share keeps 3 of 4 experts; raise max_experts to keep all" in caplog.text


def test_signals_that_cannot_be_recorded() -> None:
    with pytest.raises(MissingSignalError) as error:
        Audit({}, signals="load_cv").init({"router_probs": PROBS[0]})
    assert str(error.value) == (
        "the signal 'load_cv' is to be recorded, but the metrics of this step do not give it: "
        "pass 'expert_index' or top_k=."
    )


def test_a_signal_must_be_a_single_number() -> None:
    class Plugin:
        @hookimpl
        def provide_signals(self):
            return {"vector": Signal(lambda m: m["params"]["w"], ("params",))}

    audit = Audit({"r": "high_vector"}, plugin_manager=get_plugin_manager([Plugin()]))
    metrics = {"params": {"w": np.ones(3, np.float32)}}
    with pytest.raises(MetricsError) as error:
        audit.update(audit.init(metrics), metrics)
    assert str(error.value) == (
        "the signal 'vector' has shape (3,); a signal is a single number. Reduce it first, for instance with "
        "jnp.mean."
    )
