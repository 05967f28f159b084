"""A watched function gives the results it gave, and the rows that its probabilities would have given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed import ROUTER, E, K, parameters, soft_top_k, softmax_after, tokens

from moe_rules_callback import HistoryError, MetricsError, MissingSignalError, RuleAuditCallback
from moe_rules_callback.errors import TracingError
from moe_rules_callback.tracing import tap

LAYERS, STEPS = 3, 4
STACKED, ONE = parameters(layers=LAYERS), parameters()
BATCHES = [tokens(2 * STEPS)[i] for i in range(2 * STEPS)]
SIGNALS = ("load_gini", "router_mutual_information", "boundary_margin", "expert_coactivation")
Model = Callable[[Any, jax.Array], jax.Array]


def scanned(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, p: (x + soft_top_k(p, x), None), x, params)[0]


def rematted(params: Any, x: jax.Array) -> jax.Array:
    block = jax.checkpoint(lambda x, p: (x + soft_top_k(p, x), None))
    return jax.lax.scan(block, x, params)[0]


def unrolled(params: Any, x: jax.Array) -> jax.Array:
    for i in range(LAYERS):
        x = x + soft_top_k(jax.tree.map(lambda leaf, i=i: leaf[i], params), x)
    return x


def loss_of(model: Model) -> Callable[[Any, jax.Array], jax.Array]:
    return lambda params, x: jnp.square(model(params, x)).mean()


def sgd(params: Any, grads: Any) -> Any:
    return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)


def auditor(signals: Any = SIGNALS, **options: Any) -> RuleAuditCallback:
    return RuleAuditCallback(
        {"r": "low_load_cv_normalised & high_router_entropy"}, signals=signals, **options
    )


@pytest.fixture
def audit() -> Iterator[RuleAuditCallback]:
    with auditor() as audit:
        yield audit


def assert_same_rows(got: Any, expected: Any, truth: float = 1e-6) -> None:
    """`truth`: tolerance of what steep ramps make of the signals."""
    np.testing.assert_array_equal(got.step, expected.step)
    assert got.signal.values.tolist() == expected.signal.values.tolist()
    assert got.layer.values.tolist() == expected.layer.values.tolist()
    for name in ("signal_value", "signal_pooled", "expert_share"):
        np.testing.assert_allclose(got[name], expected[name], atol=1e-6, err_msg=name)
    np.testing.assert_allclose(got.truth_layer, expected.truth_layer, atol=truth)
    np.testing.assert_array_equal(got.state, expected.state)


def tapped_rows(loss: Any, params: Any, batches: Any, layer_axis: int | None = 0) -> tuple[Any, list[Any]]:
    """What tap and on_step record over a run of one batch a step, and the losses and parameters."""
    step = jax.jit(jax.value_and_grad(tap(loss), has_aux=True))
    plain = jax.jit(jax.value_and_grad(loss))
    seen = []
    with auditor(top_k=K, layer_axis=layer_axis) as audit:
        for x in batches:
            seen.append(plain(params, x))
            (value, probs), grads = step(params, x)
            audit.on_step({"loss": value, "router_probs": probs[ROUTER]})
            params = sgd(params, grads)
        return renamed(audit.history), seen


def renamed(rows: Any) -> Any:
    """With the names of layers that a watched function gives them."""
    return rows.assign_coords(layer=[n.replace("layer_", f"{ROUTER}_") for n in rows.layer.values.tolist()])


@pytest.mark.parametrize("model", [scanned, rematted])
def test_rows_and_results_are_those_of_tap_and_on_step(model: Model, audit: RuleAuditCallback) -> None:
    loss = loss_of(model)
    expected, seen = tapped_rows(loss, STACKED, BATCHES[:STEPS])
    step, params = jax.jit(jax.value_and_grad(audit.watch(loss))), STACKED
    for x, before in zip(BATCHES, seen, strict=False):
        value, grads = step(params, x)
        jax.tree.map(np.testing.assert_array_equal, (value, grads), before)
        audit.on_step({"loss": value})
        params = sgd(params, grads)
    assert_same_rows(audit.history, expected)


def test_routers_of_the_same_kind_leave_as_one_array(audit: RuleAuditCallback) -> None:
    watched = audit.watch(loss_of(unrolled))
    program = jax.make_jaxpr(jax.grad(watched))(STACKED, BATCHES[0]).jaxpr
    (delivery,) = (eqn for eqn in program.eqns if eqn.primitive.name == "debug_callback")
    assert [x.aval.shape[:2] for x in delivery.invars] == [(LAYERS, 1)]
    loss, _ = jax.jit(jax.value_and_grad(watched))(STACKED, BATCHES[0])
    audit.on_step({"loss": loss})
    expected, _ = tapped_rows(loss_of(scanned), STACKED, BATCHES[:1])
    got = audit.history
    np.testing.assert_allclose(got.signal_value, expected.signal_value, atol=1e-6)
    assert got.layer.values.tolist() == [ROUTER, f"{ROUTER}#2", f"{ROUTER}#3"]


def test_a_loss_inside_a_checkpoint_counts_once(audit: RuleAuditCallback) -> None:
    loss = loss_of(rematted)
    step = jax.jit(jax.grad(jax.checkpoint(audit.watch(loss))))
    step(STACKED, BATCHES[0])
    step(STACKED, BATCHES[1])
    assert len(audit.history.step) == 2


def test_evaluation_does_not_count(audit: RuleAuditCallback) -> None:
    watched = audit.watch(loss_of(scanned))
    evaluate, train = jax.jit(watched), jax.jit(jax.grad(watched))
    assert evaluate(STACKED, BATCHES[0]) == jax.jit(loss_of(scanned))(STACKED, BATCHES[0])
    with pytest.raises(HistoryError):
        _ = audit.history
    train(STACKED, BATCHES[1])
    evaluate(STACKED, BATCHES[2])
    assert len(audit.history.step) == 1


@pytest.mark.parametrize("way", ["calls", "scan", "scan inside the loss", "inside the step"])
def test_micro_batches_make_one_row(way: str, audit: RuleAuditCallback) -> None:
    """As if their tokens had come in one batch."""
    loss, xs = loss_of(scanned), jnp.stack(BATCHES[:2])
    with auditor(top_k=K, layer_axis=0) as together:
        _, probs = jax.jit(tap(loss))(STACKED, BATCHES[0])
        _, more = jax.jit(tap(loss))(STACKED, BATCHES[1])
        together.on_step({"router_probs": jnp.concatenate([probs[ROUTER], more[ROUTER]], axis=1)})
        expected = renamed(together.history)

    def accumulated(loss: Any) -> Any:
        def step(params: Any, xs: jax.Array) -> Any:
            add = lambda total, x: (jax.tree.map(jnp.add, total, jax.grad(loss)(params, x)), None)  # noqa: E731
            return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), xs)[0]

        return step

    if way == "calls":
        step = jax.jit(jax.grad(audit.watch(loss, forwards_per_step=2)))
        for x in xs:
            step(STACKED, x)
    elif way == "scan":
        jax.jit(accumulated(audit.watch(loss, forwards_per_step=2)))(STACKED, xs)
    elif way == "scan inside the loss":
        total = lambda p, xs: jax.lax.scan(lambda c, x: (c + loss(p, x), None), 0.0, xs)[0]  # noqa: E731
        jax.jit(jax.grad(audit.watch(total)))(STACKED, xs)
    else:
        jax.jit(audit.watch(accumulated(loss)))(STACKED, xs)
    assert_same_rows(audit.history, expected, truth=1e-5)


def test_micro_batches_are_weighted_by_their_tokens(audit: RuleAuditCallback) -> None:
    loss = loss_of(soft_top_k)
    step = jax.jit(jax.grad(audit.watch(loss, forwards_per_step=2)))
    x, y = BATCHES[0], BATCHES[1][:2]
    step(ONE, x)
    step(ONE, y)
    with auditor(top_k=K) as together:
        both = jnp.concatenate([x, y])
        together.on_step({"router_probs": {ROUTER: jax.nn.softmax(both @ ONE["router"]["kernel"])}})
        assert_same_rows(audit.history, together.history, truth=1e-5)


def test_a_donating_training_step(audit: RuleAuditCallback) -> None:
    def step(params: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        value, grads = jax.value_and_grad(loss_of(rematted))(params, x)
        return sgd(params, grads), value

    expected, _ = tapped_rows(loss_of(rematted), STACKED, BATCHES[:STEPS])
    jitted = jax.jit(step, donate_argnums=0)
    watched = audit.watch(jitted)
    params, bare = (jax.tree.map(jnp.copy, STACKED) for _ in range(2))
    for x in BATCHES[:STEPS]:
        given = params
        params, value = watched(params, x)
        bare, plain = jitted(bare, x)
        assert value == plain
        assert jax.tree.leaves(given)[0].is_deleted()
        audit.on_step({"loss": value})
    assert_same_rows(audit.history, expected)


def test_aux_that_is_not_differentiated_stays_out_of_the_gradient(audit: RuleAuditCallback) -> None:
    """The derivative of sqrt at 0 is infinite: 0 times it would be NaN."""

    def loss(params: Any, x: jax.Array) -> Any:
        y = soft_top_k(params, x)
        return jnp.square(y).mean(), {"norm": jnp.sqrt((0 * y).sum()), "n": 3, "index": jnp.arange(2)}

    plain = jax.jit(lambda p, x: jax.value_and_grad(loss, has_aux=True)(p, x))(ONE, BATCHES[0])
    got = jax.jit(lambda p, x: jax.value_and_grad(audit.watch(loss), has_aux=True)(p, x))(ONE, BATCHES[0])
    jax.tree.map(np.testing.assert_array_equal, got, plain)
    assert np.isfinite(got[1]["router"]["kernel"]).all()
    assert len(audit.history.step) == 1


def test_logits() -> None:
    """Where the model has only those, signals of logits are there as well."""
    with auditor("router_z_loss") as audit, auditor("router_z_loss", top_k=K) as expected:
        jax.jit(jax.grad(audit.watch(loss_of(softmax_after))))(ONE, BATCHES[0])
        expected.on_step({"router_logits": {ROUTER: BATCHES[0] @ ONE["router"]["kernel"]}})
        assert_same_rows(audit.history, expected.history)


def test_a_branch_that_is_not_taken_has_no_tokens(audit: RuleAuditCallback) -> None:
    def loss(params: Any, x: jax.Array, use: jax.Array) -> jax.Array:
        return jnp.square(jax.lax.cond(use, lambda x: soft_top_k(params, x), lambda x: 2 * x, x)).mean()

    step = jax.jit(jax.grad(audit.watch(loss, forwards_per_step=2)))
    for taken in (False, True, False, False):
        step(ONE, BATCHES[0], jnp.asarray(taken))
    with auditor(top_k=K) as expected:
        probs = jax.nn.softmax(BATCHES[0] @ ONE["router"]["kernel"])
        expected.on_step({"router_probs": {ROUTER: probs}})
        assert_same_rows(audit.history.isel(step=[0]), expected.history)
    assert np.isnan(audit.history.expert_share[1]).all()


def test_only_the_statistics_that_rules_need_leave_the_device() -> None:
    sizes = []
    for signals in ((), "expert_coactivation"):
        with RuleAuditCallback({"r": "low_load_cv"}, signals=signals) as audit:
            text = str(jax.make_jaxpr(jax.grad(audit.watch(loss_of(soft_top_k))))(ONE, BATCHES[0]))
            sizes.append([n for n in (1 + E, 1 + E + E * E) if f"f32[1,{n}]" in text])
    assert sizes == [[1 + E], [1 + E + E * E]]


def test_scalars_and_step_numbers_of_the_hook_belong_to_their_row(audit: RuleAuditCallback) -> None:
    step = jax.jit(jax.value_and_grad(audit.watch(loss_of(scanned))))
    losses = []
    for i, x in enumerate(BATCHES[:3]):
        value, _ = step(STACKED, x)
        losses.append(float(value))
        if i:  # a hook that comes a step late
            audit.on_step({"loss": losses[i - 1], "learning_rate": 0.1 * i}, step=10 * i)
    audit.close()
    rows = audit.history
    assert rows.step.values.tolist() == [10, 20, 21]
    rate = rows.signal_pooled.sel(signal="learning_rate")
    np.testing.assert_allclose(rate, [0.1, 0.2, np.nan], rtol=1e-6)
    np.testing.assert_allclose(rows.signal_pooled.sel(signal="loss"), [*losses[:2], np.nan])


def test_faults_of_the_thread_are_raised_by_the_next_call() -> None:
    with RuleAuditCallback({"r": "high_load_cv & high_weight_norm"}) as audit:
        step = jax.jit(jax.value_and_grad(audit.watch(loss_of(soft_top_k))))
        value, _ = step(ONE, BATCHES[0])
        audit.on_step({"loss": value})
        with pytest.raises(MissingSignalError, match="needs the signal 'weight_norm'"):
            audit.flush()


def test_what_is_refused(audit: RuleAuditCallback) -> None:
    with pytest.raises(ValueError, match="forwards_per_step is 0; it counts forwards"):
        audit.watch(jnp.tanh, forwards_per_step=0)
    with pytest.raises(TracingError, match="No router was found"):
        audit.watch(jnp.tanh)(BATCHES[0])
    with pytest.raises(MetricsError, match="has its router metrics from elsewhere"):
        audit.watch(jnp.tanh)
    with pytest.raises(MetricsError, match=r"on_step was given params, router_probs\. Beside"):
        audit.on_step({"loss": 1.0, "router_probs": BATCHES[0], "params": ONE})


def test_forwards_that_make_no_row_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with auditor() as audit:
        step = jax.jit(jax.grad(audit.watch(loss_of(soft_top_k), forwards_per_step=2)))
        for x in BATCHES[:3]:
            step(ONE, x)
            audit.on_step({})
    assert "at the end 2 calls of on_step and 1 forwards made no row: forwards_per_step=2" in caplog.text


def test_without_a_hook_rows_come_without_scalars(caplog: pytest.LogCaptureFixture) -> None:
    with auditor() as audit:
        step = jax.jit(jax.grad(audit.watch(loss_of(soft_top_k))))
        for x in BATCHES[:3]:
            step(ONE, x)
        assert audit.history.step.values.tolist() == [0, 1, 2]
        assert "loss" not in audit.history.signal
        audit.on_step({"loss": 1.0})
        audit.flush()
        assert len(audit.history.step) == 3
    assert "called for the first time after rows had been made without it: it is left out" in caplog.text


def test_a_checkpoint_before_the_first_call_of_the_hook() -> None:
    """The first row waits for its scalars; where there is no hook, that shows at the next forward."""
    with RuleAuditCallback({"r": "low_load_cv"}, signals=["loss"]) as audit:
        step = jax.jit(jax.value_and_grad(audit.watch(loss_of(soft_top_k))))
        losses = []
        for x in BATCHES[:3]:
            losses.append(step(ONE, x)[0])
            state = audit.state
            assert (0 if state is None else int(state.row)) == len(losses) - 1
            audit.on_step({"loss": losses[-1]})
        np.testing.assert_array_equal(audit.history.loss, losses)
    with auditor() as audit:
        step = jax.jit(jax.grad(audit.watch(loss_of(soft_top_k))))
        for x in BATCHES[:2]:
            step(ONE, x)
        assert audit.state is not None
        assert int(audit.state.row) == 2


def test_each_member_of_a_vmap_is_a_forward(audit: RuleAuditCallback) -> None:
    watched = audit.watch(loss_of(soft_top_k), forwards_per_step=2)
    jax.jit(jax.vmap(jax.grad(watched), in_axes=(None, 0)))(ONE, jnp.stack(BATCHES[:2]))
    with auditor(top_k=K) as together:
        probs = jax.nn.softmax(jnp.concatenate(BATCHES[:2]) @ ONE["router"]["kernel"])
        together.on_step({"router_probs": {ROUTER: probs}})
        assert_same_rows(audit.history, together.history, truth=1e-5)
