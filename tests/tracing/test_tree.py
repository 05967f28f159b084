"""The tree of a traced function: what it shows, and that it runs."""

from __future__ import annotations

from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routed import E, parameters, soft_top_k, tokens

from moe_rules_callback.errors import TracingError
from moe_rules_callback.tracing import find, trace

PARAMS, X = parameters(layers=2), tokens()


def model(params, x):
    with jax.named_scope("stack"):
        x = jax.lax.scan(lambda x, p: (x + soft_top_k(p, x), None), x, params)[0]
    return jax.nn.relu(x)


def test_a_trace_runs_like_the_function() -> None:
    traced = trace(model, PARAMS, X)
    np.testing.assert_array_equal(traced(PARAMS, 2 * X), model(PARAMS, 2 * X))
    loss, grads = jax.jit(jax.value_and_grad(lambda p: traced(p, X).sum()))(PARAMS)
    expected = jax.jit(jax.value_and_grad(lambda p: model(p, X).sum()))(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (loss, grads), expected)


def test_other_arguments_are_refused() -> None:
    traced = trace(model, PARAMS, X)
    with pytest.raises(TracingError) as error:
        traced(PARAMS, X[:2])
    assert str(error.value) == (
        "These arguments are not like those that model was traced with: x was float32[6, 4] and is "
        "float32[2, 4]. A trace holds for one structure, one set of shapes and dtypes and one value of "
        "everything that is no array. Trace again with these."
    )
    with pytest.raises(TracingError, match=r"missing \[\], new \['args\[2\]'\]"):
        traced(PARAMS, X, X)
    with pytest.raises(TracingError, match="a value that is no array differs"):
        trace(lambda x, n: x * n, X, 2)(X, 3)


def test_the_print_shows_calls_shapes_and_parameters() -> None:
    lines = str(trace(model, PARAMS, X)).splitlines()
    assert lines[0].startswith("trace model  f32[2,8,5,4], f32[2,8,4,5], ")
    assert lines[0].endswith(" -> f32[6,4]")
    assert lines[1].startswith("  scope stack  ")
    assert lines[2].startswith("    scan  length=2  ")
    kernel = "router/kernel"
    assert f"      dot_general  f32[6,4], f32[4,8] {kernel} -> f32[6,8]" in lines
    assert "      top_k  k=2  f32[6,8] -> f32[6,2], i32[6,2]" in lines
    assert "    jit relu  f32[6,4] -> f32[6,4]" in lines


def test_the_xml_holds_attributes_types_parameters_and_lines() -> None:
    root = ElementTree.fromstring(trace(model, PARAMS, X).xml())
    assert (root.tag, root.get("name")) == ("trace", "model")
    (chosen,) = root.iter("top_k")
    assert chosen.get("k") == "2"
    assert chosen.attrib["source"].startswith("routed.py:")
    assert [inner.get("type") for inner in chosen] == ["f32[6,8]", "f32[6,2]", "i32[6,2]"]
    matmul = next(root.iter("dot_general"))
    assert matmul[1].attrib == {"type": "f32[4,8]", "parameter": "router/kernel"}


def test_a_node_runs_what_stands_there() -> None:
    (chosen,) = find(trace(model, PARAMS, X), "//top_k")
    probs = jax.nn.softmax(X @ jnp.ones((4, E)))
    values, index = chosen(probs)
    np.testing.assert_array_equal(values, jax.lax.top_k(probs, 2)[0])
    np.testing.assert_array_equal(index, jax.lax.top_k(probs, 2)[1])
    (relu,) = find(trace(model, PARAMS, X), "//custom_jvp_call")
    np.testing.assert_array_equal(relu(X), jnp.maximum(X, 0))
    assert repr(relu) == "custom_jvp_call  f32[6,4] -> f32[6,4]"
