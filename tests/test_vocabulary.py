"""Which rules can be evaluated on the metrics at hand, and what is said about the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from audited import records

from moe_rules_callback import Audit, MetricsError, MissingSignalError, UnknownNameError

PROBS = np.random.default_rng(0).dirichlet(np.ones(4), (2, 8)).astype(np.float32)
STEP = {"loss": np.float32(2), "router_probs": {"a": PROBS[0], "b": PROBS[1]}}


def test_a_shipped_book_runs_on_what_there_is(caplog: pytest.LogCaptureFixture) -> None:
    assert len(records(Audit("nano_moe"), [STEP]).schema.rules) == 5
    (warning,) = caplog.records
    assert warning.getMessage() == (
        "rules without their signals are left out:\n  pass 'params' for load_imbalance"
    )


@pytest.mark.parametrize("book", [None, "router_health"])
def test_a_shipped_book_concludes_from_what_there_is(book: Any, caplog: pytest.LogCaptureFixture) -> None:
    """One axiom of two is enough for a conclusion; without any it is left out with them, and not told of."""
    assert records(Audit(book), [STEP]).schema.rule_names == (
        "saturated_by_choice", "router_saturation", "router_not_learning", "expert_monopoly", "loss_spike",
        "router_in_health",
    )  # fmt: skip
    (warning,) = caplog.records
    told = warning.getMessage()
    assert told.startswith(
        "rules without their signals are left out:\n  pass 'grads' for starved_by_gradient, "
        "learning_by_gradient, dominated_by_gradient\n  pass 'router_logits' for saturated_by_logits\n  pass "
        "'expert_index' or top_k= for dead_by_load, dead_for_long, collapsed_by_load, collapsed_by_first, "
        "weak_by_load, misrouted_by_margin, uneven_load\n  pass 'dropped_token_fraction' as a scalar for "
        "overflow_by_drops\n  "
    )
    assert told.endswith("\n  pass 'balancing_loss' as a scalar for telemetry_by_balance")
    assert "dead_expert" not in told
    assert "saturated_by_choice" not in told


def test_without_any_metrics_a_shipped_book_has_no_rules(caplog: pytest.LogCaptureFixture) -> None:
    assert records(Audit(), [{}]).schema.rules == ()
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("rule", "metrics", "message"),
    [
        (
            "high_load_cv",
            STEP,
            "rule 'r' needs the signal 'load_cv', which the metrics of this step do not give: pass "
            "'expert_index' or top_k=. They are: loss, router_probs.",
        ),
        (
            "low_router_entropy",
            {"loss": 1.0},
            "rule 'r' needs the signal 'router_entropy', which the metrics of this step do not give: pass "
            "'router_probs' (or 'router_logits'). They are: loss.",
        ),
        (
            "stable_loss",
            {},
            "rule 'r' needs the signal 'loss', which the metrics of this step do not give: pass 'loss'. "
            "They are: none.",
        ),
        (
            "high_router_z_loss",
            STEP,
            "rule 'r' needs the signal 'router_z_loss', which the metrics of this step do not give: pass "
            "'router_logits'. They are: loss, router_probs.",
        ),
        (
            "high_loss_spike_score & increasing_weight_norm",
            {"loss": 1.0},
            "rule 'r' needs the signal 'weight_norm', which the metrics of this step do not give: pass "
            "'params'. They are: loss.",
        ),
    ],
)
def test_a_rule_of_the_users_own_needs_its_signals(rule: str, metrics: dict, message: str) -> None:
    with pytest.raises(MissingSignalError) as error:
        Audit({"r": rule}).init(metrics)
    assert str(error.value) == message


def test_unknown_names_are_refused_at_init() -> None:
    with pytest.raises(UnknownNameError, match=r"^rule 'r': no predicate is called 'high_los'"):
        Audit({"r": "high_los"}).init({"loss": 1.0})


def test_a_scalar_under_the_name_of_a_signal_is_judged_like_it() -> None:
    audit = Audit({"starved": "0.8 :: low_router_gradient_share", "sure": "0.8 :: low_router_entropy"})
    rows = records(audit, [{"router_gradient_share": 0.001, "router_entropy": 0.01}])
    assert rows.state.tolist() == [[1, 1]]
    shipped = Audit(signals="all")
    shipped.init({"router_entropy": 0.5})
    assert shipped.schema.signals[0].long_name == "Mean H(p_t) / ln E; 0..1"


def test_all_signals_are_those_that_find_what_they_are_about() -> None:
    audit = Audit({}, signals="all")
    weights = np.ones((2, 2), np.float32)
    audit.init({"params": {"w": weights, "f": np.tanh}, "grads": {"w": weights}})
    assert audit.schema.signal_names == ("weight_norm", "gradient_norm")


def test_a_misspelt_signal_names_the_closest() -> None:
    message = r"pass 'router_entrpy', which is no shipped signal\. Did you mean router_entropy"
    with pytest.raises(MissingSignalError, match=message):
        Audit({}, signals=["router_entrpy"]).init({"loss": 1.0})


def test_one_expert_leaves_nothing_to_judge() -> None:
    rows = records(Audit(top_k=1), [{"loss": 1.0, "router_probs": np.ones((4, 1), np.float32)}] * 150)
    names = rows.schema.rule_names
    told = {names[i] for i in np.flatnonzero((rows.state[100:] != 2).any(0))}
    assert not told & {"router_not_learning", "router_in_health"}


@pytest.mark.parametrize("top_k", [0, 2.5, "2"])
def test_top_k_counts(top_k: Any) -> None:
    with pytest.raises(MetricsError, match=r"it counts the experts that a token uses: 1, 2, \.\."):
        Audit(top_k=top_k)


def test_gradients_in_which_nothing_is_called_a_router() -> None:
    metrics = {"grads": {"w": np.ones(2, np.float32)}}
    with pytest.raises(MissingSignalError, match="router_gradient_share finds no router in 'grads'"):
        records(Audit({"starved": "low_router_gradient_share"}), [metrics])


def test_a_shipped_book_goes_without_what_parameters_do_not_show(caplog: pytest.LogCaptureFixture) -> None:
    """Parameters whose paths name no experts must not end a training that asked for the default book."""
    step = STEP | {"params": {"w": np.ones((3, 3), np.float32)}}
    names = records(Audit(top_k=2), [step]).schema.rule_names
    assert "shock_by_weights" in names
    assert "duplicated_by_weights" not in names
    assert (
        "the parameters' paths do not show what expert_weight_cosine is about, so pass "
        "'expert_weight_cosine' as a scalar for duplicated_by_weights"
    ) in caplog.text
