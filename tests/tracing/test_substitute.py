"""Parts of a traced model replaced, as YAX shows: relu by gelu, LoRA adapters on every Dense."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed import parameters, soft_top_k, tokens

from moe_rules_callback.errors import TracingError
from moe_rules_callback.tracing import find, substitute, trace

X = tokens()


def with_gelu(variables, x):
    first, second = (variables["params"][f"Dense_{i}"] for i in range(2))
    return jax.nn.gelu(x @ first["kernel"] + first["bias"]) @ second["kernel"] + second["bias"]


@pytest.fixture(scope="module")
def linen():
    models = pytest.importorskip("models")
    fn, args = models.mlp_in_linen()
    return trace(fn, *args), args


def test_relu_by_gelu(linen) -> None:
    traced, (variables, x) = linen
    changed = substitute(traced, '//pjit[@name="relu"]', jax.nn.gelu)
    np.testing.assert_allclose(changed(variables, x), with_gelu(variables, x), atol=1e-6)
    assert find(changed, '//pjit[@name="relu"]') == []
    assert len(find(traced, '//pjit[@name="relu"]')) == 1  # the one given stays
    # its derivative is gelu's, though relu has a rule of its own
    grads = [jax.jit(jax.grad(lambda v, f=f: f(v, x).sum()))(variables) for f in (changed, with_gelu)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *grads)


def test_lora_on_every_dense(linen) -> None:
    traced, (variables, x) = linen
    rng = np.random.default_rng(0)
    sizes = {"Dense_0": (4, 10), "Dense_1": (10, 3)}
    adapters = {
        path: (jnp.asarray(rng.normal(size=(n, 2)), jnp.float32), jnp.zeros((2, m)))
        for path, (n, m) in sizes.items()
    }

    def adapted(adapters, x):
        def lora(call, x, kernel, bias):
            a, b = adapters[call.attributes["path"]]
            return call(x, kernel, bias) + x @ a @ b

        return substitute(traced, '//module_call[@type="Dense"]', lora, with_call=True)(variables, x)

    np.testing.assert_array_equal(adapted(adapters, x), traced(variables, x))  # b is 0
    grads = jax.jit(jax.grad(lambda adapters: jnp.square(adapted(adapters, x)).sum()))(adapters)
    assert all(float(abs(b).max()) > 0.01 for _, b in grads.values())
    moved = jax.tree.map(lambda p, g: p - 0.01 * g, adapters, grads)
    assert jnp.square(adapted(moved, x)).sum() < jnp.square(adapted(adapters, x)).sum()


def test_a_replaced_module_is_still_found(linen) -> None:
    traced, (variables, x) = linen
    double = lambda call, *inputs: 2 * call(*inputs)  # noqa: E731
    once = substitute(traced, "//module_call[@features=3]", double, with_call=True)
    twice = substitute(once, "//module_call[@features=3]", double, with_call=True)
    np.testing.assert_allclose(twice(variables, x), 4 * traced(variables, x), rtol=1e-6)


def test_inside_a_scan() -> None:
    def model(params, x):
        return jax.lax.scan(lambda x, p: (x + soft_top_k(p, x), None), x, params)[0]

    params = parameters(layers=2)
    changed = substitute(trace(model, params, X), "//scan//tanh", jnp.sin)

    def expected(params, x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jnp, "tanh", jnp.sin)
            return model(params, x)

    np.testing.assert_allclose(changed(params, X), expected(params, X), atol=1e-6)


def test_another_shape_or_dtype_is_refused() -> None:
    traced = trace(lambda x: jnp.tanh(x).sum(), X)
    with pytest.raises(TracingError) as error:
        substitute(traced, "//tanh", lambda x: x.sum(-1))
    assert str(error.value) == (
        "The replacement of tanh returns float32[6], where float32[6,4] is needed: what follows was traced "
        "for these shapes and dtypes. Usual cause: a forgotten .astype(x.dtype), or a reduced axis. Return "
        "the same."
    )
    with pytest.raises(TracingError, match=r"returns bfloat16\[6,4\], where float32\[6,4\] is needed"):
        substitute(traced, "//tanh", lambda x: x.astype(jnp.bfloat16))
    with pytest.raises(TracingError, match=r"returns float32\[6,4\], float32\[6,4\], where float32\[6,4\]"):
        substitute(traced, "//tanh", lambda x: (x, x))


def test_no_match_is_an_error() -> None:
    with pytest.raises(TracingError, match=r"Nothing in the trace matches '//tan'\. print\(trace\) shows"):
        substitute(trace(jnp.tanh, X), "//tan", jnp.sin)


def test_matches_inside_each_other_are_refused(linen) -> None:
    with pytest.raises(TracingError, match="Two matches of '//module_call' lie inside each other"):
        substitute(linen[0], "//module_call", lambda *inputs: inputs[0])


def test_a_part_of_a_function_with_its_own_rule_is_refused() -> None:
    @jax.custom_jvp
    def double_tanh(x):
        return 2 * jnp.tanh(x)

    double_tanh.defjvps(lambda t, out, x: t)
    with pytest.raises(TracingError, match=r"lies inside a function with its own derivative rule"):
        substitute(trace(lambda x: double_tanh(x), X), "//tanh", jnp.sin)
