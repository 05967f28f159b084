"""Routers of every kind are found and described; what only looks like one is not, and it is said why."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from routed import KINDS, ROUTER, D, E, K, Kind, T, parameters, soft_top_k, tokens

from moe_rules_callback.tracing import discover_routers

PARAMS, X = parameters(), tokens()


@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_router_is_found_and_described(kind: Kind) -> None:
    (router,) = discover_routers(kind.layer, PARAMS, X)
    assert router.name == ROUTER
    assert (router.experts, router.k) == (E, kind.k)
    assert (router.gate, router.kind) == (kind.gate, kind.kind)
    assert (router.noisy, router.biased) == (kind.noisy, kind.biased)
    assert router.expert_choice is kind.expert_choice
    assert router.layers == ()
    assert f"({kind.layer.__name__}" in router.source


def accuracy(params, x, labels):
    logits = x @ params["head"]["kernel"]
    return (jnp.argmax(logits, axis=-1) == labels).mean()


def top_5_accuracy(params, x, labels):
    _, best = jax.lax.top_k(x @ params["head"]["kernel"], 2)
    return (best == labels[:, None]).any(-1).mean()


def confidence(params, x, labels):
    logp = jax.nn.log_softmax(x @ params["head"]["kernel"])
    return jnp.take_along_axis(logp, jnp.argmax(logp, axis=-1)[:, None], axis=-1).mean()


def sampling(params, x, labels):
    values, index = jax.lax.top_k(x @ params["head"]["kernel"], 3)
    drawn = jax.random.categorical(jax.random.key(0), values)
    return jnp.take_along_axis(index, drawn[:, None], axis=-1)


def gumbel_sampling(params, x, labels):
    return jax.random.categorical(jax.random.key(0), x @ params["head"]["kernel"])


def nucleus(params, x, labels):
    logits = x @ params["head"]["kernel"]
    kept = jnp.where(logits < jax.lax.top_k(logits, 3)[0][..., -1:], -jnp.inf, logits)
    return jax.random.categorical(jax.random.key(0), kept)


def beam(params, x, labels):
    """T beams: the best of all their continuations, and the states they go on from."""
    scores = jax.nn.log_softmax(x @ params["head"]["kernel"])
    _, best = jax.lax.top_k(scores.reshape(-1), T)
    return x[best // E]


def greedy(params, x, labels):
    def step(x, _):
        token = jnp.argmax(x @ params["head"]["kernel"], axis=-1)
        return x + params["embedding"][token], token

    return jax.lax.scan(step, x, length=3)[1]


def attention(params, x, labels):
    scores = (x @ params["head"]["kernel"]) @ (x @ params["head"]["kernel"]).T
    _, best = jax.lax.top_k(scores, 2)
    return x[best].sum()


def confusion(params, x, labels):
    predicted = jax.nn.one_hot(jnp.argmax(x @ params["head"]["kernel"], axis=-1), E)
    return predicted.T @ jax.nn.one_hot(labels, E)


def sparse_attention(params, x, labels):
    """Keys are chosen by queries; the scale of a norm is no router."""
    query = x @ params["head"]["kernel"]
    query = query / jnp.sqrt(jnp.square(query).mean(-1, keepdims=True)) * params["scale"]
    _, best = jax.lax.top_k(query @ (x @ params["head"]["kernel"]).T, 2)
    return x[best].sum()


def one_output(params, x, labels):
    """Takes the tokens of the highest score, as pooling and mixtures of depths do."""
    _, best = jax.lax.top_k((x @ params["head"]["kernel"][:, :1])[:, 0], 2)
    return x[best]


def vocabulary(params, x, labels):
    token = jnp.argmax(x @ params["words"]["kernel"], axis=-1)
    return params["words"]["kernel"].T[token]


HEAD = {
    "head": {"kernel": PARAMS["router"]["kernel"]},
    "scale": jnp.ones(E),
    "embedding": jnp.ones((E, D)),
    "words": {"kernel": jnp.ones((D, 2000))},
}
COMPARED = "compared with an argument, as an accuracy is"
RANDOM = "random numbers are added and nothing is dispatched, as in sampling"
NOTHING = "nothing is dispatched by what it chooses"
NO_AXIS = "no matmul has the axis that it chooses over among its outputs"


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (accuracy, COMPARED),
        (top_5_accuracy, COMPARED),
        (confidence, "used to read the chosen scores"),
        (sampling, NOTHING),
        (gumbel_sampling, RANDOM),
        (nucleus, NOTHING),
        (beam, NO_AXIS),
        (greedy, "used to read a row of a table, as a token's embedding is"),
        (confusion, NOTHING),
        (sparse_attention, "its scores are a product of two activations, not of a parameter"),
        (attention, "its scores are a product of two activations, not of a parameter"),
        (one_output, "it chooses among tokens by a single output, not among experts"),
        (vocabulary, "an axis of 2000 is longer than any router's (1024)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_router_is_not_taken_and_says_why(fn, reason: str) -> None:
    found = discover_routers(fn, HEAD, X, jnp.zeros(T, int))
    assert list(found) == []
    assert reason in [candidate.reason for candidate in found.rejected]


def test_a_helper_of_a_router_is_listed_apart() -> None:
    from routed import group_limited

    found = discover_routers(group_limited, PARAMS, X)
    assert [c.reason for c in found.rejected] == [NO_AXIS]


def test_shapes_alone_will_do() -> None:
    shapes = jax.eval_shape(lambda: (PARAMS, X))
    assert [router.name for router in discover_routers(soft_top_k, *shapes)] == [ROUTER]


def test_a_discovery_prints_what_was_found_and_why() -> None:
    def model(params, x, labels):
        y = soft_top_k(params, x)
        return y, (jnp.argmax(y @ params["router"]["kernel"], axis=-1) == labels).mean()

    lines = str(discover_routers(model, PARAMS, X, jnp.zeros(T, int))).splitlines()
    assert lines[0] == f"{ROUTER}  {E} experts, top {K}, softmax"
    assert lines[1].startswith("    top_k at routed.py:")
    assert lines[1].endswith(
        "(soft_top_k) chooses over the output of this matmul, and a gather dispatches by it"
    )
    assert lines[2] == "not taken:"
    assert lines[3].startswith(f"{ROUTER}#2  argmax at test_routers.py:")
    assert lines[3].endswith(f".model): {COMPARED}")


def test_without_a_router_the_print_says_so() -> None:
    assert str(discover_routers(jnp.tanh, X)) == "no router found"


def test_what_is_not_looked_into_is_listed() -> None:
    from jax.experimental import pallas as pl

    def kernel(x_ref, y_ref):
        y_ref[...] = jnp.tanh(x_ref[...])

    def model(x):
        return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)

    lines = str(discover_routers(model, X)).splitlines()
    assert lines[:2] == ["no router found", "not looked into:"]
    assert lines[2].startswith("pallas_call at test_routers.py:")


def test_two_arguments_with_the_same_paths_are_told_apart() -> None:
    def distil(student, teacher, x):
        return soft_top_k(student, x) - soft_top_k(teacher, x)

    names = [router.name for router in discover_routers(distil, PARAMS, PARAMS, X)]
    assert names == [f"student/{ROUTER}", f"teacher/{ROUTER}"]


def test_a_router_that_is_an_argument_itself_goes_by_the_arguments_name() -> None:
    def layer(x, gate, experts):
        weights, index = jax.lax.top_k(jax.nn.softmax(x @ gate), K)
        return jnp.einsum("tk,tkdf,td->tf", weights, experts[index], x)

    (router,) = discover_routers(layer, X, PARAMS["router"]["kernel"], PARAMS["experts"]["up"])
    assert router.name == "gate"


def test_a_closed_over_router_goes_by_its_scope() -> None:
    def layer(x):
        with jax.named_scope("block_3"):
            return soft_top_k(PARAMS, x)

    (router,) = discover_routers(layer, X)
    assert router.name == "block_3/constant"
