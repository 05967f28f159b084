"""Router metrics of shapes, dtypes and axes that change, are odd, or cannot be meant."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import naive
import numpy as np
import pytest
from audited import records, signal

from moe_rules_callback import Audit, MetricsError, RuleAuditCallback, State
from moe_rules_callback.routers import Routers

T, E, K = 6, 4, 2
RULES = {"sure": "high_routing_confidence", "uneven": "high_load_cv_normalised"}
WIDE = {"uneven": "high_load_cv_normalised"}
P, OTHER = np.random.default_rng(0).dirichlet(np.full(E, 0.5), (2, T)).astype(np.float32)
INDEX = np.argsort(-P, axis=-1)[:, :K].astype(np.int32)


def test_numbers_of_tokens_and_axes_may_change() -> None:
    """No tokens at all is a row without values."""
    steps = []
    for shape in ((6,), (2, 3), (0,), (0, 3)):
        count = np.prod(shape, dtype=int)
        given = {"router_probs": P, "expert_index": INDEX}
        steps.append({key: x[:count].reshape(*shape, x.shape[-1]) for key, x in given.items()})
    got = records(Audit(RULES), steps)
    assert (got.state[2:] == State.UNKNOWN).all()
    assert np.isnan(got.expert_share[2:]).all()
    twin = naive.router_signals(P, K, INDEX)
    for name in ("routing_confidence", "load_cv_normalised"):
        np.testing.assert_allclose(signal(got, name)[:2, 0], twin[name], rtol=1e-5)


def test_one_expert() -> None:
    """Of which nothing is to be chosen: its entropy, which would be 0 / 0, is not known."""
    rules = ["high_routing_confidence", "low_router_entropy"]
    got = records(Audit(rules, top_k=1), [{"router_probs": np.ones((T, 1))}])
    assert got.state[0].tolist() == [State.TRUE, State.UNKNOWN]
    assert np.isnan(signal(got, "router_entropy")).all()


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (2**32 + 1, np.int64),
        (2**31, np.int64),
        (-(2**63), np.int64),
        (2**32, np.uint64),
        (2**64 - 1, np.uint64),
    ],
)
def test_an_index_beyond_int32_is_no_expert(value: int, dtype: Any) -> None:
    """A cast to 32 bits would make some of them experts: the least int64 stands for NaN, and becomes 0."""
    with RuleAuditCallback(WIDE) as audit:
        for each in (1, value):
            index = np.full((T, K), each, dtype)
            audit.on_step({"router_probs": P, "expert_index": index})
        assert np.isfinite(audit.history.signal_pooled.sel(signal="load_cv_normalised").values).tolist() == [
            True, False,
        ]  # fmt: skip


def test_an_index_beyond_int32_inside_a_program_of_64_bits() -> None:
    jax.config.update("jax_enable_x64", True)
    try:
        steps = [
            {"router_probs": jnp.asarray(P), "expert_index": jnp.full((T, K), each)}
            for each in (1, 2**32 + 1, np.iinfo(np.int64).min)
        ]
        got = records(Audit(WIDE), steps)
    finally:
        jax.config.update("jax_enable_x64", False)
    assert got.state[:, 0].tolist() == [State.TRUE, State.UNKNOWN, State.UNKNOWN]


def test_more_tokens_than_float32_counts() -> None:
    count = 2**24 + 10
    mask = jnp.ones((1, count), bool).at[0, :7].set(False)
    shape = jax.ShapeDtypeStruct((1, count, 1), jnp.float32)
    routers = Routers(("router",), 1, 1, shape, None, None, mask)  # type: ignore[arg-type]
    assert int(routers.tokens[0]) == np.float32(count - 7)


@pytest.mark.parametrize(
    "mask",
    [[1, 1, 1, 0, 0, 0], [2, 1, 7, 0, -1, -100], [1.0, 0.5, 1.0, 0.0, 0.0, np.nan]],
    ids=["int", "segments", "float"],
)
def test_masks_of_numbers_count_where_they_are_positive(mask: list[Any]) -> None:
    metrics = {"router_probs": P, "expert_index": INDEX}
    got = records(Audit(["high_routing_confidence"]), [metrics | {"token_mask": np.array(mask)}])
    expected = metrics["router_probs"][:3].max(-1).mean()
    assert signal(got, "routing_confidence")[0, 0] == pytest.approx(expected)


def test_a_mask_to_be_added_to_scores_is_no_mask() -> None:
    """0 keeps a token and -inf drops it: taken for the other kind, padding would be judged."""
    mask = np.array([0, 0, 0, -np.inf, -np.inf, -1e9], np.float32)
    metrics = {"router_probs": P, "expert_index": INDEX}
    got = records(Audit(["high_routing_confidence"]), [metrics | {"token_mask": mask}])
    assert got.state[0].tolist() == [State.UNKNOWN]


SCORES = (
    "expected floating-point numbers [.., tokens, experts]. Indices of the experts chosen go to expert_index"
)
LIST = "A list holds one array for each layer, not numbers."
KEYS = jax.random.split(jax.random.key(0), (T, E))
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"router_probs": INDEX}, f"router_probs has dtype int32; {SCORES}. {LIST}"),
    ({"router_probs": {"a": P, "b": P > 0.3}}, f"router_probs of b has dtype bool; {SCORES}. {LIST}"),
    ({"router_probs": P + 0j}, f"router_probs has dtype complex64; {SCORES}. {LIST}"),
    ({"router_probs": P.astype(object)}, f"router_probs has dtype object; {SCORES}. {LIST}"),
    ({"router_probs": P.astype(str)}, f"router_probs has dtype <U32; {SCORES}. {LIST}"),
    ({"router_probs": KEYS}, f"router_probs has dtype key<fry>; {SCORES}. {LIST}"),
    ({"router_probs": P.tolist()}, f"router_probs of 0/0 is a float; {SCORES}. {LIST}"),
    ({"router_probs": [P, "none"]}, f"router_probs of 1 is a str; {SCORES}. {LIST}"),
    ({"router_logits": P.astype(int)}, f"router_logits has dtype int64; {SCORES}. {LIST}"),
    (
        {"router_probs": P, "expert_index": P[:, :2]},
        f"expert_index has dtype float32; expected integers [.., tokens, k]. {LIST}",
    ),
    (
        {"router_probs": P, "expert_index": P[:, :2] > 0},
        f"expert_index has dtype bool; expected integers [.., tokens, k]. {LIST}",
    ),
    (
        {"router_probs": P, "token_mask": P[:, 0] + 0j},
        f"token_mask has dtype complex64; expected booleans, or numbers above 0 where a token counts. {LIST}",
    ),
    (
        {"router_probs": P, "token_mask": [True] * T},
        f"token_mask of 0 is a bool; expected booleans, or numbers above 0 where a token counts. {LIST}",
    ),
    (
        {"expert_load": np.ones(4, complex)},
        f"expert_load has dtype complex128; expected real numbers [experts]. {LIST}",
    ),
]


@pytest.mark.parametrize(
    ("metrics", "message"), REFUSED, ids=[message.partition(";")[0] for _, message in REFUSED]
)
def test_what_cannot_be_meant(metrics: dict[str, Any], message: str) -> None:
    with pytest.raises(MetricsError) as error:
        Audit([], top_k=2).init(metrics)
    assert str(error.value) == message


def test_a_dtype_that_changes_to_one_that_cannot_be_meant() -> None:
    with RuleAuditCallback(["high_routing_confidence"]) as audit:
        audit.on_step({"router_probs": P})
        for wrong in (P.astype(int), P.astype(object)):
            with pytest.raises(MetricsError, match=r"router_probs has dtype (int64|int32|object); expected"):
                audit.on_step({"router_probs": wrong})
        audit.on_step({"router_probs": P})
        assert audit.history.state.values.tolist() == [[1], [1]]


@pytest.mark.parametrize("axis", [2, -1, 3, -4])
def test_an_axis_that_counts_no_layers(axis: int) -> None:
    with pytest.raises(MetricsError) as error:
        Audit([], layer_axis=axis).init({"router_probs": np.stack([P, P])})
    assert str(error.value) == (
        f"layer_axis={axis} does not count layers in the router array of router, shape (2, 6, 4): it is an "
        "axis before the last, which counts experts, and has a layer at least."
    )
    with pytest.raises(MetricsError, match=r"layer_axis=0 does not count layers .* shape \(0, 6, 4\)"):
        Audit([], layer_axis=0).init({"router_probs": np.stack([P, P])[:0]})


def test_one_mask_for_layers_that_are_counted_from_the_end() -> None:
    mask = np.array([True] * 3 + [False] * 3)
    stacked = np.stack([P, P[::-1]], axis=1)  # [tokens, layers, experts]
    metrics = {"router_probs": stacked, "token_mask": mask}
    got = [records(Audit(["high_routing_confidence"], layer_axis=axis), [metrics]) for axis in (1, -2)]
    np.testing.assert_array_equal(got[0].signal_value, got[1].signal_value)
    confidence = [P[:3].max(-1).mean(), P[3:].max(-1).mean()]
    np.testing.assert_allclose(signal(got[1], "routing_confidence")[0], confidence, rtol=1e-6)
