"""Queries by XPath, YAX's three among them, in Linen and in NNX."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from routed import parameters, soft_top_k, tokens

from moe_rules_callback.errors import TracingError
from moe_rules_callback.tracing import find, trace

PARAMS, X = parameters(layers=2), tokens()


def model(params, x):
    return jax.lax.scan(jax.checkpoint(lambda x, p: (x + soft_top_k(p, x), None)), x, params)[0]


@pytest.fixture(scope="module")
def linen():
    models = pytest.importorskip("models")
    fn, args = models.mlp_in_linen()
    return trace(fn, *args)


@pytest.fixture(scope="module")
def nnx():
    models = pytest.importorskip("models")
    fn, args = models.mlp_in_nnx()
    return trace(fn, *args)


def test_modules_by_an_attribute(linen) -> None:
    (dense,) = find(linen, "//module_call[@features=10]")
    assert dense.attributes == {
        "type": "Dense", "name": "Dense_0", "path": "Dense_0", "features": "10", "use_bias": "True"
    }  # fmt: skip
    kernel, bias = (f"params/Dense_0/{name}" for name in ("kernel", "bias"))
    assert dense.inputs == [("f32[6,4]", "args[1]"), ("f32[4,10]", kernel), ("f32[10]", bias)]
    assert dense.outputs == ["f32[6,10]"]


def test_a_jitted_function_by_its_name(linen) -> None:
    for query in ('//pjit[@name="relu"]', '//jit[@name="relu"]'):
        (relu,) = find(linen, query)
        assert (relu.tag, relu.inputs) == ("jit", [("f32[6,10]", "")])


def test_modules_by_their_type(linen) -> None:
    found = find(linen, '//module_call[@type="Dense"]')
    assert [dense.attributes["name"] for dense in found] == ["Dense_0", "Dense_1"]


def test_modules_lie_inside_each_other(linen) -> None:
    assert len(find(linen, '//module_call[@type="LinenMLP"]/module_call')) == 2
    assert len(find(linen, '/trace/module_call[@name="LinenMLP"]//dot_general')) == 2


def test_modules_of_nnx(nnx) -> None:
    assert [m.attributes["path"] for m in find(nnx, '//module_call[@type="Linear"]')] == ["first", "second"]
    (first,) = find(nnx, "//module_call[@out_features=10]")
    assert first.inputs[1] == ("f32[4,10]", "first/kernel")
    assert first.attributes["in_features"] == "4"
    assert len(find(nnx, '//module_call[@type="NnxMLP"]//pjit[@name="relu"]')) == 1


def test_every_call_of_a_shared_module_is_a_node() -> None:
    flax = pytest.importorskip("flax")
    layer = flax.nnx.Linear(4, 4, rngs=flax.nnx.Rngs(0))
    calls = find(trace(lambda layer, x: layer(layer(x)), layer, X), "//module_call")
    assert [len(call.children) for call in calls] == [3, 3]


def test_a_profiler_that_was_there_before_goes_on() -> None:
    """NNX's calls are watched through Python's profile function."""
    models = pytest.importorskip("models")
    seen = []

    def profile(frame, event, arg):
        seen.append(frame.f_code.co_name)

    fn, args = models.mlp_in_nnx()
    sys.setprofile(profile)
    try:
        trace(fn, *args)
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)
    assert "forward" in seen


def test_primitives_inside_calls() -> None:
    traced = trace(model, PARAMS, X)
    (chosen,) = find(traced, "//scan//top_k[@k=2]")
    assert chosen.attributes["k"] == "2"
    assert find(traced, "//top_k[@k>2]") == []
    for name in ("remat", "remat2", "checkpoint"):
        assert len(find(traced, f"//{name}")) == 1
    (matmul,) = find(traced, '//dot_general[input[contains(@parameter, "router")]]')
    assert matmul.inputs[1] == ("f32[4,8]", "router/kernel")


def test_scopes() -> None:
    def scoped(x):
        with jax.named_scope("outer"), jax.named_scope("inner"):
            return jnp.tanh(x)

    (node,) = find(trace(scoped, X), '//scope[@name="outer"]/scope[@name="inner"]/tanh')
    assert node.outputs == ["f32[6,4]"]


def test_a_text_that_is_no_number_is_unequal_to_one() -> None:
    """dtype="float32", shape="(3, 3)": a comparison with a number is false and no error."""
    traced = trace(lambda x: jnp.zeros((3, 3)) + x.sum(), X)
    assert find(traced, "//broadcast_in_dim[@shape=10]") == []


def test_quoted_names_stay() -> None:
    def pjit(x):
        return jnp.tanh(x)

    (node,) = find(trace(lambda x: jax.jit(pjit)(x), X), '//pjit[@name="pjit"]')
    assert node.attributes["name"] == "pjit"


def test_a_query_that_cannot_be_read() -> None:
    with pytest.raises(TracingError, match=r"Cannot read the query '//top_k\[' as XPath: .*\nQueries look"):
        find(trace(model, PARAMS, X), "//top_k[")


def test_without_elementpath(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "elementpath", None)
    with pytest.raises(TracingError) as error:
        find(trace(model, PARAMS, X), "//top_k")
    assert str(error.value) == (
        "Queries need the package elementpath, which is not installed. "
        "Install it: pip install 'moe-rules-callback[trace]'."
    )


def test_no_framework_is_imported() -> None:
    code = (
        "import sys, jax.numpy as jnp, moe_rules_callback.tracing as t; "
        "print(t.discover_routers(jnp.tanh, jnp.ones(3)), t.trace(jnp.tanh, jnp.ones(3)).xml()[:6]); "
        "print({'flax', 'equinox', 'penzai', 'haiku', 'elementpath', 'xarray'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False)
    assert done.stdout == "no router found <trace\nset()\n", done.stderr


def test_a_query_for_something_else_than_nodes() -> None:
    with pytest.raises(TracingError) as error:
        find(trace(model, PARAMS, X), "//top_k/@k")
    assert str(error.value) == (
        "The query '//top_k/@k' selects something else than modules, scopes, calls and primitives: '2'. "
        "Let its last step name one of them: //top_k, not //top_k/@k."
    )
