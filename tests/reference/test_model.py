"""The model against plain loops in NumPy, and what must hold of it whatever its size."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from reference.config import Config
from reference.model import GPT, MoE, Routing, balancing_loss, z_loss

TINY = Config(layers=1, width=8, heads=2, context=8, experts=4, expert_width=6, top_k=2, batch=2)


call = nnx.jit(lambda model, *arguments: model(*arguments))  # one compilation, where eager mode has dozens


def tiny(**changes) -> Config:
    return Config(**{**vars(TINY), **changes})


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def naive_moe(x: np.ndarray, moe: MoE, config: Config) -> tuple[np.ndarray, float]:
    """[N, D] -> [N, D] and the share of dropped assignments: one token, one expert at a time."""
    router = np.asarray(moe.router.kernel[...])
    w_in, w_out = np.asarray(moe.experts.w_in[...]), np.asarray(moe.experts.w_out[...])
    group = len(x) // (config.groups or 1)
    capacity = min(group, math.ceil(config.capacity_factor * group * config.top_k / config.experts))
    out, served, dropped = np.zeros_like(x), np.zeros(config.experts, int), 0
    for t, token in enumerate(x):
        if t % group == 0:
            served[:] = 0
        p = np.exp(token @ router)
        p /= p.sum()
        for e in np.argsort(-p)[: config.top_k]:
            if served[e] < capacity:
                served[e] += 1
                out[t] += p[e] * gelu(token @ w_in[e]) @ w_out[e]
            else:
                dropped += 1
    return out, dropped / (len(x) * config.top_k)


@pytest.mark.parametrize(
    "changes",
    [
        {"capacity_factor": 2.0},
        {"capacity_factor": 0.5},
        {"capacity_factor": 0.75, "groups": 2},
        {"capacity_factor": 1.0, "top_k": 1},
        {"capacity_factor": 1.0, "top_k": 4},
    ],
    ids=["roomy", "scarce", "two groups", "top 1", "every expert"],
)
def test_experts_against_a_loop_over_tokens(changes):
    config = tiny(**changes)
    moe = MoE(config, nnx.Rngs(3), jnp.float32)
    moe.router.kernel[...] *= 50  # decided enough for some experts to overflow
    x = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    y, routing = call(moe, jnp.asarray(x))
    expected, dropped = naive_moe(x.reshape(16, 8), moe, config)
    np.testing.assert_allclose(y.reshape(16, 8), expected, atol=1e-5)
    assert float(routing.dropped) == pytest.approx(dropped)
    assert (dropped > 0) == (config.capacity_factor < 1 or config.top_k == 1)


def test_gradients_against_all_experts_on_all_tokens():
    config = tiny(capacity_factor=2.0)
    moe = MoE(config, nnx.Rngs(0), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (1, 8, 8))

    def masked(moe: MoE, x: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(moe.router(x[0]))  # [T, E]
        gate = jnp.where(probs >= jnp.sort(probs)[:, -2:-1], probs, 0.0)
        hidden = jax.nn.gelu(jnp.einsum("td,edf->tef", x[0], moe.experts.w_in[...]))
        return jnp.einsum("tef,efd,te->td", hidden, moe.experts.w_out[...], gate)[None]

    def gradient(layer):
        return nnx.jit(nnx.grad(lambda moe, x: jnp.sum(jnp.sin(layer(moe, x))), argnums=(0, 1)))(moe, x)

    grads, expected = gradient(lambda moe, x: moe(x)[0]), gradient(masked)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        assert float(jnp.abs(want).max()) > 0
        np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_task_alone_reaches_router_and_positions(top_k):
    model = GPT(tiny(top_k=top_k), nnx.Rngs(0))
    tokens = jnp.arange(16).reshape(2, 8)
    grads = nnx.jit(nnx.grad(lambda model: jnp.sum(jnp.sin(model(tokens)[0]))))(model)
    assert float(jnp.abs(grads["blocks"][0]["moe"]["router"]["kernel"][...]).max()) > 0
    assert (jnp.abs(grads["positions"]["embedding"][...]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("capacity_factor", [0.5, 2.0])
def test_a_later_token_changes_nothing_before_it(capacity_factor):
    model = GPT(tiny(layers=2, capacity_factor=capacity_factor), nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 256)
    before, _ = call(model, tokens)
    after, _ = call(model, tokens.at[1, 5].add(1))
    np.testing.assert_allclose(before[1, :5], after[1, :5], atol=1e-6)
    assert float(jnp.abs(before[1, 5:] - after[1, 5:]).max()) > 1e-4


def test_noise_comes_from_the_key_and_differs_between_layers():
    model = GPT(tiny(layers=2, router_noise=1.0), nnx.Rngs(0))
    tokens = jnp.zeros((1, 8), jnp.int32)
    _, quiet = call(model, tokens)
    _, first = call(model, tokens, jax.random.key(0))
    _, again = call(model, tokens, jax.random.key(0))
    _, other = call(model, tokens, jax.random.key(1))
    noise = [np.asarray(f.logits - q.logits) for f, q in zip(first, quiet, strict=True)]
    assert np.abs(noise[0]).max() > 0.1
    assert np.abs(noise[0] - noise[1]).max() > 0.1
    np.testing.assert_array_equal(first[0].logits, again[0].logits)
    assert np.abs(np.asarray(first[0].logits - other[0].logits)).max() > 0.1


def routing(probs: jax.Array, expert_index: jax.Array) -> Routing:
    return Routing(jnp.log(probs), probs, expert_index, jnp.float32(0))


def test_balancing_loss_is_1_at_uniform_routing_and_highest_at_collapse():
    uniform = jnp.full((8, 4), 0.25)
    evenly = jnp.arange(16).reshape(8, 2) % 4
    assert float(balancing_loss(routing(uniform, evenly))) == pytest.approx(1)
    one = jax.nn.one_hot(jnp.zeros(8, jnp.int32), 4)
    assert float(balancing_loss(routing(one, jnp.zeros((8, 1), jnp.int32)))) == pytest.approx(4)


def test_z_loss_is_the_squared_log_of_the_partition_sum():
    logits = jnp.array([[0.0, 0.0], [1.0, 2.0]])
    expected = (math.log(2) ** 2 + math.log(math.e + math.e**2) ** 2) / 2
    only_logits = Routing(logits, logits, logits.astype(jnp.int32), jnp.float32(0))
    assert float(z_loss(only_logits)) == pytest.approx(expected, rel=1e-6)


def test_bfloat16_keeps_parameters_router_and_logits_in_float32():
    tokens = jax.random.randint(jax.random.key(0), (2, 8), 0, 256)
    exact, _ = call(GPT(TINY, nnx.Rngs(0)), tokens)
    model = GPT(TINY, nnx.Rngs(0), jnp.bfloat16)
    logits, (routing,) = call(model, tokens)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    assert logits.dtype == routing.logits.dtype == routing.probs.dtype == jnp.float32
    difference = np.abs(np.asarray(logits - exact)).max()
    assert 0 < difference < 0.02 * np.abs(np.asarray(exact)).max()
