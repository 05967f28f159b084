"""Every form in which router metrics may come, brought into one; and what is wrong with the others."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.metrics import collect, expert_counts, scalars

rng = np.random.default_rng(0)
A, B = (rng.dirichlet(np.ones(4), 6).astype(np.float32) for _ in range(2))
IA, IB = (np.argsort(-p, axis=-1)[:, :2].astype(np.int32) for p in (A, B))


def seen(metrics: dict[str, Any], top_k: int | None = None, layer_axis: int | None = None) -> dict[str, Any]:
    """Layer name -> (probabilities [T, E], index [T, k] or None, mask [T] or None)."""
    found = {}
    for each in collect(metrics, top_k, layer_axis):
        for i, name in enumerate(each.names):
            pick = [None if x is None else np.asarray(x[i]) for x in (each.given, each.index, each.mask)]
            found[name] = pick
    return found


@pytest.mark.parametrize(
    ("names", "form"),
    [
        (("layer_0", "layer_1"), lambda a, b: [a, b]),
        (("layer_0", "layer_1"), lambda a, b: (a, b)),
        (("x", "y"), lambda a, b: {"y": b, "x": a}),
        (("enc/moe", "enc/ten"), lambda a, b: {"enc": {"ten": b, "moe": a}}),
        (("block_2/p", "block_10/p"), lambda a, b: {"block_10": {"p": b}, "block_2": {"p": a}}),
        (("2", "10"), lambda a, b: {10: b, 2: a}),
        (("dec/0", "dec/1"), lambda a, b: {"dec": [a, b]}),
    ],
    ids=["list", "tuple", "mapping", "nested", "natural order", "numbers", "list in mapping"],
)
def test_forms(names: tuple[str, str], form: Any) -> None:
    metrics = {
        "router_probs": form(A, B),
        "expert_index": form(IA, IB),
        "token_mask": form(A[:, 0] > 0.2, B[:, 0] > 0),
    }
    found = seen(metrics)
    assert tuple(found) == names
    for (probs, index, mask), p, i, m in zip(
        found.values(), (A, B), (IA, IB), (A[:, 0] > 0.2, B[:, 0] > 0), strict=True
    ):
        np.testing.assert_array_equal(probs, p)
        np.testing.assert_array_equal(index, i)
        np.testing.assert_array_equal(mask, m)
    traced = jax.eval_shape(
        lambda given: [jnp.zeros(len(r.names)) for r in collect(given, None, None)], metrics
    )
    assert len(traced) == 2
    order: list[tuple[str, ...]] = []
    jax.eval_shape(lambda given: order.extend(r.names for r in collect(given, None, None)), metrics)
    assert tuple(n for each in order for n in each) == names  # jit sorts the keys of a dict


@pytest.mark.parametrize("axis", [0, 1, -3])
def test_stacked_layers(axis: int) -> None:
    probs = np.stack([A, B], axis)
    found = seen({"router_probs": probs, "expert_index": np.stack([IA, IB], axis)}, layer_axis=axis)
    assert list(found) == ["layer_0", "layer_1"]
    np.testing.assert_array_equal(found["layer_0"][0], A)
    np.testing.assert_array_equal(found["layer_1"][0], B)
    np.testing.assert_array_equal(found["layer_1"][1], IB)


@pytest.mark.parametrize("layer_axis", [0, 2])
def test_stacked_layers_with_batch_time_and_one_mask(layer_axis: int) -> None:
    probs = rng.dirichlet(np.ones(4), (2, 3)).astype(np.float32)  # [batch, time, experts]
    mask = np.array([[True, True, False], [True, False, False]])
    found = seen(
        {"router_probs": np.stack([probs, probs[::-1]], layer_axis), "token_mask": mask},
        layer_axis=layer_axis,
    )
    np.testing.assert_array_equal(found["layer_0"][0], probs)
    np.testing.assert_array_equal(found["layer_1"][0], probs[::-1])
    np.testing.assert_array_equal(found["layer_1"][2], mask)


def test_one_mask_for_all_layers_of_a_mapping() -> None:
    mask = A[:, 0] > 0.2
    found = seen({"router_probs": {"x": A, "y": B}, "token_mask": mask})
    np.testing.assert_array_equal(found["x"][2], mask)
    np.testing.assert_array_equal(found["y"][2], mask)


def test_leading_axes_are_tokens() -> None:
    found = seen({"router_probs": A.reshape(2, 3, 4), "expert_index": IA.reshape(2, 3, 2)})
    np.testing.assert_array_equal(found["router"][0], A.reshape(2, 3, 4))
    np.testing.assert_array_equal(found["router"][1], IA.reshape(2, 3, 2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_probabilities_become_float32(dtype: Any) -> None:
    (routers,) = collect({"router_probs": jnp.asarray(A, dtype)}, 2, None)
    assert routers.probs.dtype == jnp.float32
    np.testing.assert_allclose(routers.probs.sum(-1), 1, atol=1e-6)


def test_logits_give_probabilities_when_these_are_not_passed() -> None:
    (routers,) = collect({"router_logits": np.log(A)}, 2, None)
    np.testing.assert_allclose(routers.probs[0], A, rtol=1e-5)


@pytest.mark.parametrize(("top_k", "index", "k"), [(3, None, 3), (3, IA, 2), (None, None, None)])
def test_experts_per_token(top_k: int | None, index: Any, k: int | None) -> None:
    metrics = {"router_probs": A} | ({} if index is None else {"expert_index": index})
    (routers,) = collect(metrics, top_k, None)
    assert (routers.experts, routers.k) == (4, k)


def test_no_router_at_all() -> None:
    assert collect({"loss": 1.0}, None, None) == []
    assert expert_counts({"loss": 1.0}) == set()


def test_expert_counts() -> None:
    assert expert_counts({"router_probs": {"x": A, "y": np.ones((3, 8))}}) == {4, 8}
    assert expert_counts({"router_logits": [A]}) == {4}


def test_scalars() -> None:
    metrics = {
        "loss": jnp.float32(1), "lr": 1e-3, "epoch": 3, "acc": np.float64(0.5), "zero_d": np.zeros(()),
        "abstract": jax.ShapeDtypeStruct((), jnp.float32), "router_probs": A, "vector": np.ones(3),
        "params": {"w": np.ones(2)}, "note": "text",
    }  # fmt: skip
    assert list(scalars(metrics)) == ["loss", "lr", "epoch", "acc", "zero_d", "abstract"]


@pytest.mark.parametrize(
    ("metrics", "options", "message"),
    [
        (
            {"router_probs": {"x": A, "y": B}, "expert_index": {"x": IA}},
            {},
            "expert_index and the router probabilities name different layers: y only on one side. Pass both "
            "in the same form: two arrays, or two mappings with the same keys.",
        ),
        ({"expert_index": IA}, {}, "name different layers: router only on one side"),
        ({"router_probs": object()}, {}, "router_probs is a object, not an array, a list of arrays or"),
        ({"router_probs": {"x": 3}}, {}, "router_probs of x is a int, not an array"),
        (
            {"router_probs": A[0]},
            {},
            r"the router array of router has shape \(4,\); expected \[.., tokens, experts\]. Pass the "
            "probabilities of all tokens, before experts are chosen.",
        ),
        ({"router_probs": A}, {"layer_axis": 0}, r"\[.., tokens, experts\] with the layers on axis 0"),
        (
            {"router_probs": A, "expert_index": IA[:5]},
            {},
            r"expert_index of router has shape \(5, 2\), which does not belong to router probabilities of "
            r"shape \(6, 4\): all axes but the last must agree.",
        ),
        ({"router_probs": A, "token_mask": np.ones(5)}, {}, r"token_mask of router has shape \(5,\)"),
        (
            {"router_probs": A, "router_logits": np.ones((6, 7))},
            {},
            r"router_logits of router have shape \(6, 7\), and the probabilities \(6, 4\)",
        ),
        ({"router_probs": A[:, :0]}, {}, r"the router array of router has shape \(6, 0\)"),
        ({"router_probs": A}, {"top_k": 5}, "5 experts per token do not fit the 4 experts of router"),
        ({"router_probs": A}, {"top_k": 0}, "0 experts per token do not fit"),
    ],
)
def test_what_does_not_belong_together(metrics: dict, options: dict, message: str) -> None:
    with pytest.raises(MetricsError, match=message):
        collect(metrics, options.get("top_k"), options.get("layer_axis"))


@pytest.mark.parametrize("empty", [{}, []])
def test_an_empty_mapping_of_probabilities_is_refused(empty: Any) -> None:
    with pytest.raises(MetricsError, match=r"^router_probs holds no array\. Pass one for every layer"):
        collect({"router_probs": empty}, None, None)
