"""A tapped function returns what it returned before, to the bit, and the routers' probabilities."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed import KINDS, ROUTER, E, Kind, T, logits_of, parameters, run_gathered, soft_top_k, softmax, tokens

from moe_rules_callback.errors import TracingError
from moe_rules_callback.tracing import discover_routers, tap

PARAMS, X = parameters(), tokens()


def assert_same_bits(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_values_and_gradients(kind: Kind) -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(kind.layer(params, x)).sum()

    plain, grads = jax.jit(jax.value_and_grad(loss))(PARAMS, X)
    (tapped, taps), tapped_grads = jax.jit(jax.value_and_grad(tap(loss), has_aux=True))(PARAMS, X)
    assert_same_bits((tapped, tapped_grads), (plain, grads))
    assert list(taps) == [ROUTER]
    np.testing.assert_allclose(taps[ROUTER], kind.expected(PARAMS, X), atol=1e-6)


def layers_of(params: Any) -> list[Any]:
    count = params["router"]["kernel"].shape[0]
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(count)]


def stack_expected(params: Any, x: jax.Array, layer: Any) -> np.ndarray:
    """Probabilities of every layer, by running the layers one by one."""
    found = []
    for one in layers_of(params):
        found.append(softmax(logits_of(one, x)))
        x = x + layer(one, x)
    return np.stack(found)


STACKED = parameters(layers=3)


def scanned(params, x):
    return jax.lax.scan(lambda x, p: (x + soft_top_k(p, x), None), x, params)[0]


def rematted(params, x):
    return jax.lax.scan(jax.checkpoint(lambda x, p: (x + soft_top_k(p, x), None)), x, params)[0]


def with_policy(params, x):
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    block = jax.checkpoint(lambda x, p: (x + soft_top_k(p, x), None), policy=policy, prevent_cse=False)
    return jax.lax.scan(block, x, params, unroll=2)[0]


def jitted_blocks(params, x):
    block = jax.jit(lambda p, x: x + soft_top_k(p, x))
    return jax.lax.scan(lambda x, p: (block(p, x), None), x, params)[0]


def indexed_loop(params, x):
    def body(i, x):
        one = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), params)
        return x + soft_top_k(one, x)

    return jax.lax.fori_loop(0, 3, body, x)


@pytest.mark.parametrize("model", [scanned, rematted, with_policy, jitted_blocks, indexed_loop])
def test_layers_under_scan(model: Any) -> None:
    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.square(model(params, x)).sum()

    plain = jax.jit(jax.value_and_grad(loss))(STACKED, X)
    (tapped, taps), grads = jax.jit(jax.value_and_grad(tap(loss), has_aux=True))(STACKED, X)
    assert_same_bits((tapped, grads), plain)
    np.testing.assert_allclose(taps[ROUTER], stack_expected(STACKED, X, soft_top_k), atol=1e-5)
    (router,) = discover_routers(loss, STACKED, X)
    assert router.layers == (3,)


@pytest.mark.parametrize("model", [scanned, rematted, with_policy, jitted_blocks])
def test_a_whole_training_step(model: Any) -> None:
    """The step is traced after differentiation: the backward pass's second forward does not count."""

    def step(params: Any, x: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(lambda p: jnp.square(model(p, x)).sum())(params)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), loss

    plain = jax.jit(step)(STACKED, X)
    tapped, taps = jax.jit(tap(step))(STACKED, X)
    assert_same_bits(tapped, plain)
    assert list(taps) == [ROUTER]
    np.testing.assert_allclose(taps[ROUTER], stack_expected(STACKED, X, soft_top_k), atol=1e-5)


def test_unrolled_layers_have_a_name_each() -> None:
    params = {"layers": layers_of(STACKED)}

    def model(params, x):
        for one in params["layers"]:
            x = x + soft_top_k(one, x)
        return x

    _, taps = jax.jit(tap(model))(params, X)
    assert list(taps) == [f"layers/{i}/{ROUTER}" for i in range(3)]
    np.testing.assert_allclose(
        jnp.stack(list(taps.values())), stack_expected(STACKED, X, soft_top_k), atol=1e-5
    )


def test_micro_batches_are_a_further_leading_axis() -> None:
    def step(params, xs):
        return jax.lax.scan(lambda total, x: (total + scanned(params, x).sum(), None), 0.0, xs)[0]

    xs = tokens(2)
    loss, taps = jax.jit(tap(step))(STACKED, xs)
    assert_same_bits(loss, jax.jit(step)(STACKED, xs))
    assert taps[ROUTER].shape == (2, 3, T, E)
    np.testing.assert_allclose(taps[ROUTER][1], stack_expected(STACKED, xs[1], soft_top_k), atol=1e-5)


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_that_is_not_taken_gives_zeros(taken: bool) -> None:
    def model(params, x, use):
        return jax.lax.cond(use, lambda x: soft_top_k(params, x), lambda x: 2 * x, x)

    out, taps = jax.jit(tap(model))(PARAMS, X, jnp.asarray(taken))
    assert_same_bits(out, jax.jit(model)(PARAMS, X, jnp.asarray(taken)))
    expected = softmax(logits_of(PARAMS, X)) if taken else np.zeros((T, E))
    np.testing.assert_allclose(taps[ROUTER], expected, atol=1e-6)


def test_the_last_turn_of_a_while_loop_counts() -> None:
    def model(params, x, turns):
        body = lambda state: (state[0] + 1, state[1] + soft_top_k(params, state[1]))  # noqa: E731
        return jax.lax.while_loop(lambda state: state[0] < turns, body, (0, x))[1]

    out, taps = jax.jit(tap(model))(PARAMS, X, jnp.asarray(2))
    assert_same_bits(out, jax.jit(model)(PARAMS, X, jnp.asarray(2)))
    before_last = X + soft_top_k(PARAMS, X)
    np.testing.assert_allclose(taps[ROUTER], softmax(logits_of(PARAMS, before_last)), atol=1e-6)
    _, none = jax.jit(tap(model))(PARAMS, X, jnp.asarray(0))
    assert not none[ROUTER].any()


def test_vmap_inside_and_outside() -> None:
    xs = tokens(2)
    expected = softmax(logits_of(PARAMS, xs))
    _, inside = jax.jit(tap(jax.vmap(soft_top_k, in_axes=(None, 0))))(PARAMS, xs)
    np.testing.assert_allclose(inside[ROUTER], expected, atol=1e-6)
    out, outside = jax.jit(jax.vmap(tap(soft_top_k), in_axes=(None, 0)))(PARAMS, xs)
    np.testing.assert_allclose(outside[ROUTER].reshape(-1, E), expected, atol=1e-6)
    assert_same_bits(out, jax.jit(jax.vmap(soft_top_k, in_axes=(None, 0)))(PARAMS, xs))


def test_an_axis_of_the_batch_is_flattened_into_tokens() -> None:
    def model(params, xs):
        probs = jax.nn.softmax(xs @ params["router"]["kernel"])
        weights, index = jax.lax.top_k(probs, 1)
        return jnp.einsum("btkdf,btd,btk->btf", params["experts"]["up"][index], xs, weights)

    xs = tokens(2)
    _, taps = jax.jit(tap(model))(PARAMS, xs)
    np.testing.assert_allclose(taps[ROUTER], softmax(logits_of(PARAMS, xs)), atol=1e-6)


@jax.custom_vjp
def clipped_gradient(x):
    return x


clipped_gradient.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.01, 0.01),))


def test_rules_of_other_functions_survive() -> None:
    def loss(params, x):
        return jnp.square(soft_top_k(params, clipped_gradient(x))).sum()

    plain = jax.jit(jax.grad(loss, argnums=1))(PARAMS, X)
    tapped, _ = jax.jit(jax.grad(tap(loss), argnums=1, has_aux=True))(PARAMS, X)
    assert abs(plain).max() == np.float32(0.01)  # the rule is at work
    assert_same_bits(tapped, plain)


@pytest.mark.parametrize("wrapper", ["custom_vjp", "custom_jvp"])
def test_a_router_inside_a_function_with_its_own_rule(wrapper: str) -> None:
    if wrapper == "custom_vjp":
        layer = jax.custom_vjp(soft_top_k)
        layer.defvjp(lambda p, x: (soft_top_k(p, x), (p, x)), lambda res, g: jax.vjp(soft_top_k, *res)[1](g))
    else:
        layer = jax.custom_jvp(soft_top_k)
        layer.defjvp(lambda primals, tangents: jax.jvp(soft_top_k, primals, tangents))

    def loss(params, x):
        return jnp.square(layer(params, x)).sum()

    with pytest.raises(TracingError) as error:
        tap(loss)(PARAMS, X)
    where = f"lies inside a function with its own derivative rule (jax.{wrapper}), at test_tap.py:"
    assert where in str(error.value)
    assert "Wrap the whole training step instead" in str(error.value)

    step = jax.value_and_grad(loss)  # the advice
    out, taps = jax.jit(tap(step))(PARAMS, X)
    assert_same_bits(out, jax.jit(step)(PARAMS, X))
    np.testing.assert_allclose(taps[ROUTER], softmax(logits_of(PARAMS, X)), atol=1e-6)


def test_softmax_with_its_own_rule_is_tapped_at_its_result() -> None:
    """As jax.nn.softmax has one under jax_softmax_custom_jvp."""

    @jax.custom_jvp
    def own_softmax(x):
        return jnp.exp(x) / jnp.exp(x).sum(-1, keepdims=True)

    own_softmax.defjvp(lambda primals, tangents: jax.jvp(jax.nn.softmax, primals, tangents))

    def loss(params, x):
        weights, index = jax.lax.top_k(own_softmax(x @ params["router"]["kernel"]), 2)
        return jnp.square(run_gathered(params, x, weights, index)).sum()

    plain = jax.jit(jax.value_and_grad(loss))(PARAMS, X)
    (out, taps), grads = jax.jit(jax.value_and_grad(tap(loss), has_aux=True))(PARAMS, X)
    assert_same_bits((out, grads), plain)
    np.testing.assert_allclose(taps[ROUTER], softmax(logits_of(PARAMS, X)), atol=1e-6)


def test_shard_map_on_one_device() -> None:
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P("data")}
    model = jax.shard_map(scanned, mesh=mesh, **specs)
    out, taps = jax.jit(tap(model))(STACKED, X)
    assert_same_bits(out, jax.jit(model)(STACKED, X))
    np.testing.assert_allclose(taps[ROUTER], stack_expected(STACKED, X, soft_top_k), atol=1e-5)


def test_outside_jit() -> None:
    out, taps = tap(soft_top_k)(PARAMS, X)
    np.testing.assert_allclose(out, soft_top_k(PARAMS, X), atol=1e-6)
    np.testing.assert_allclose(taps[ROUTER], softmax(logits_of(PARAMS, X)), atol=1e-6)


def test_a_jitted_function_is_traced_once() -> None:
    traced = []

    @jax.jit
    def step(params, x):
        traced.append(1)
        return soft_top_k(params, x)

    tapped = tap(step)
    for factor in (1.0, 2.0, 3.0):
        out, taps = tapped(PARAMS, factor * X)
        assert_same_bits(out, step(PARAMS, factor * X))
        np.testing.assert_allclose(taps[ROUTER], softmax(logits_of(PARAMS, factor * X)), atol=1e-6)
    assert len(traced) <= 2  # once for the tap, once for the call of `step` itself


def test_a_function_that_is_not_jitted_sees_what_it_closes_over_now() -> None:
    params = dict(PARAMS)
    tapped = tap(lambda x: soft_top_k(params, x))
    (_, before) = tapped(X)
    params["router"] = {"kernel": 2 * PARAMS["router"]["kernel"]}
    (_, after) = tapped(X)
    assert abs(before["constant"] - after["constant"]).max() > 0.01


def test_a_number_that_changes_in_every_step_is_warned_of() -> None:
    tapped = tap(jax.jit(lambda params, x, step: soft_top_k(params, x) * step, static_argnums=2))
    for step in range(15):
        tapped(PARAMS, X, step)
    with pytest.warns(UserWarning, match=r"<lambda> for 16 different sets of arguments.*jnp.asarray\(step\)"):
        tapped(PARAMS, X, 15)


def test_settings_without_a_hash_are_compared() -> None:
    class Config:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Config)

    tapped = tap(Jitted(lambda params, x, config: soft_top_k(params, x)))
    for _ in range(2):
        assert list(tapped(PARAMS, X, Config())[1]) == [ROUTER]


class Jitted:
    """What a framework's jit returns: callable, with `lower`."""

    def __init__(self, fn: Any) -> None:
        self.__name__, self.lower, self._fn = "jitted", None, fn

    def __call__(self, *args: Any) -> Any:
        return self._fn(*args)


def test_donated_buffers_stay_donated() -> None:
    step = jax.jit(lambda params, x: x + soft_top_k(params, x), donate_argnums=1)
    x = X + 0
    tap(step)(PARAMS, x)
    assert x.is_deleted()


def test_static_values_and_other_leaves_pass_through() -> None:
    def model(params, x, *, scale, activation):
        return {"y": activation(soft_top_k(params, x)) * scale, "name": "moe", "n": 3}

    out, taps = tap(model)(PARAMS, X, scale=2, activation=jnp.tanh)
    assert_same_bits(out["y"], jnp.tanh(soft_top_k(PARAMS, X)) * 2)
    assert (out["name"], out["n"], list(taps)) == ("moe", 3, [ROUTER])


def two_heads(params, x, labels):
    y = soft_top_k(params, x)
    return y, (jnp.argmax(y @ params["head"], axis=-1) == labels).mean()


TWO = (PARAMS | {"head": PARAMS["router"]["noise"]}, X, jnp.zeros(T, int))


def test_the_user_chooses() -> None:
    def names(**choice: Any) -> list[str]:
        return list(tap(two_heads, **choice)(*TWO)[1])

    assert names() == [ROUTER]
    assert names(routers=["head"]) == names(routers="head") == ["head"]
    assert names(routers=lambda router: router.experts == E) == [ROUTER, "head"]


def test_a_tapped_jit_is_no_jit() -> None:
    """`lower` would be that of the function without taps."""
    assert not hasattr(tap(Jitted(soft_top_k)), "lower")


def test_nothing_of_a_trace_is_kept() -> None:
    with jax.checking_leaks():
        jax.jit(tap(lambda params, x: soft_top_k(params, x)))(PARAMS, X)


def test_the_condition_of_a_loop_is_refused() -> None:
    def model(params, x):
        return jax.lax.while_loop(lambda x: soft_top_k(params, x).sum() > 1e9, lambda x: 2 * x, x)

    with pytest.raises(TracingError) as error:
        tap(model)(PARAMS, X)
    assert "lies inside the condition of a while loop, at test_tap.py:" in str(error.value)
    assert str(error.value).endswith(
        ", which cannot be made anew with a further or another result. Ask for a value that goes into it "
        "or comes out of it instead."
    )


def test_logits_that_are_handed_to_a_jitted_function() -> None:
    choose = jax.jit(lambda logits: jax.lax.top_k(logits, 2))

    def model(params, x):
        chosen, index = choose(x @ params["router"]["kernel"])
        return run_gathered(params, x, jax.nn.softmax(chosen), index)

    _, taps = jax.jit(tap(model))(PARAMS, X)
    np.testing.assert_allclose(taps[ROUTER], logits_of(PARAMS, X), atol=1e-6)


def test_logits_of_all_tokens_chosen_from_one_by_one() -> None:
    def model(params, x):
        def one(_, token_and_logits):
            token, logits = token_and_logits
            chosen, index = jax.lax.top_k(logits, 2)
            return None, run_gathered(params, token[None], jax.nn.softmax(chosen)[None], index[None])

        return jax.lax.scan(one, None, (x, x @ params["router"]["kernel"]))[1]

    _, taps = jax.jit(tap(model))(PARAMS, X)
    np.testing.assert_allclose(taps[ROUTER], logits_of(PARAMS, X), atol=1e-6)


def test_a_router_that_runs_twice_has_two_names() -> None:
    def model(params, x):
        return soft_top_k(params, soft_top_k(params, x))

    _, taps = jax.jit(tap(model))(PARAMS, X)
    assert list(taps) == [ROUTER, f"{ROUTER}#2"]
    np.testing.assert_allclose(
        taps[f"{ROUTER}#2"], softmax(logits_of(PARAMS, soft_top_k(PARAMS, X))), atol=1e-6
    )


def test_pmap() -> None:
    xs = tokens(1)
    _, taps = jax.pmap(tap(soft_top_k), in_axes=(None, 0))(PARAMS, xs)
    np.testing.assert_allclose(taps[ROUTER][0], softmax(logits_of(PARAMS, xs)), atol=1e-6)


def test_errors_say_what_there_is() -> None:
    with pytest.raises(TracingError, match=r"No selection is fed by heads\. Did you mean head\?"):
        tap(two_heads, routers=["heads"])(*TWO)
    with pytest.raises(TracingError) as error:
        tap(jnp.tanh)(X)
    assert str(error.value) == (
        "No router was found: no top_k, argmax or sort over the output of a matmul goes on to dispatch. "
        "Usual causes: the function does not run the model, or its router chooses in another way. Choose by "
        "name with routers=[..] from what was found:\nno router found"
    )
