"""Tiny routed layers of every kind, in plain JAX, with what a tap of each must return.

Each is `layer(params, x) -> y` for x [tokens, D]. `expected` gives [tokens, E] from the router's weights,
without any of the package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

T, D, E, F, K = 6, 4, 8, 5, 2
ROUTER = "router/kernel"


def parameters(layers: int | None = None) -> dict[str, Any]:
    """Weights of one layer, or of several stacked on a leading axis."""
    rng = np.random.default_rng(0)
    lead = () if layers is None else (layers,)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32) * 0.5

    return {
        "router": {"kernel": normal(D, E), "bias": normal(E), "noise": normal(D, E)},
        "experts": {"up": normal(E, D, F), "down": normal(E, F, D)},
    }


def tokens(*lead: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(*lead, T, D)), jnp.float32)


def softmax(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def logits_of(params: Any, x: Any) -> np.ndarray:
    return np.asarray(x, np.float64).reshape(-1, D) @ np.asarray(params["router"]["kernel"], np.float64)


def run_gathered(params: Any, x: jax.Array, weights: jax.Array, index: jax.Array) -> jax.Array:
    """Each token through the weights of its experts, which are gathered."""
    up, down = params["experts"]["up"][index], params["experts"]["down"][index]  # [T, k, D, F], [T, k, F, D]
    h = jnp.tanh(jnp.einsum("td,tkdf->tkf", x, up))
    return jnp.einsum("tkf,tkfd,tk->td", h, down, weights)


def run_dense(params: Any, x: jax.Array, combine: jax.Array) -> jax.Array:
    """Every token through all experts, summed with weights [T, E]."""
    h = jnp.tanh(jnp.einsum("td,edf->tef", x, params["experts"]["up"]))
    return jnp.einsum("tef,efd,te->td", h, params["experts"]["down"], combine)


def soft_top_k(params, x):
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    weights, index = jax.lax.top_k(probs, K)
    return run_gathered(params, x, weights / weights.sum(-1, keepdims=True), index)


def softmax_after(params, x):
    chosen, index = jax.lax.top_k(x @ params["router"]["kernel"], K)
    return run_gathered(params, x, jax.nn.softmax(chosen), index)


def switch(params, x):
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    mask = jax.nn.one_hot(jnp.argmax(probs, axis=-1), E)
    return run_dense(params, x, mask * probs)


def two_argmax(params, x):
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    first = jax.nn.one_hot(jnp.argmax(probs, axis=-1), E)
    second = jax.nn.one_hot(jnp.argmax(jnp.where(first > 0, 0.0, probs), axis=-1), E)
    return run_dense(params, x, (first + second) * probs)


def noisy_top_k(params, x):
    logits = x @ params["router"]["kernel"]
    scale = jax.nn.softplus(x @ params["router"]["noise"])
    noisy = logits + scale * jax.random.normal(jax.random.key(0), logits.shape)
    chosen, index = jax.lax.top_k(noisy, K)
    return run_gathered(params, x, jax.nn.softmax(chosen), index)


def sigmoid_gate(params, x):
    scores = jax.nn.sigmoid(x @ params["router"]["kernel"])
    weights, index = jax.lax.top_k(scores, K)
    return run_gathered(params, x, weights, index)


def bias_balanced(params, x):
    scores = jax.nn.sigmoid(x @ params["router"]["kernel"])
    _, index = jax.lax.top_k(scores + params["router"]["bias"], K)
    return run_gathered(params, x, jnp.take_along_axis(scores, index, axis=-1), index)


def group_limited(params, x):
    scores = jax.nn.softmax(x @ params["router"]["kernel"])
    groups = scores.reshape(T, 4, E // 4)
    _, best = jax.lax.top_k(groups.max(-1), 2)
    mask = jax.nn.one_hot(best, 4).sum(1)
    limited = jnp.where(mask[..., None] > 0, groups, 0.0).reshape(T, E)
    weights, index = jax.lax.top_k(limited, K)
    return run_gathered(params, x, weights, index)


def balanced_logits(params, x):
    """The bias only serves to choose; the weights are a softmax without it."""
    logits = x @ params["router"]["kernel"]
    _, index = jax.lax.top_k(logits + params["router"]["bias"], K)
    chosen = jnp.take_along_axis(logits, index, axis=-1)
    return run_gathered(params, x, jax.nn.softmax(chosen), index)


def argsorted(params, x):
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    index = jnp.argsort(-probs, axis=-1)[:, :K]
    return run_gathered(params, x, jnp.take_along_axis(probs, index, axis=-1), index)


def approximate(params, x):
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    weights, index = jax.lax.approx_max_k(probs, K)
    return run_gathered(params, x, weights, index)


def ragged(params, x):
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    weights, index = jax.lax.top_k(probs, K)
    order = jnp.argsort(index.reshape(-1))
    sizes = jnp.bincount(index.reshape(-1), length=E)
    repeated = jnp.repeat(x, K, axis=0)[order]
    h = jnp.tanh(jax.lax.ragged_dot(repeated, params["experts"]["up"], sizes))
    out = jax.lax.ragged_dot(h, params["experts"]["down"], sizes)
    return (out[jnp.argsort(order)].reshape(T, K, D) * weights[..., None]).sum(1)


def sorted_tokens(params, x):
    """Tokens are gathered in the order of their experts, as before a grouped matmul."""
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    weights, index = jax.lax.top_k(probs, K)
    order = jnp.argsort(index.reshape(-1))
    gathered = x[order // K]
    owner = index.reshape(-1)[order]
    h = jnp.einsum("nd,ndf->nf", gathered, params["experts"]["up"][owner])
    out = jnp.einsum("nf,nfd->nd", jnp.tanh(h), params["experts"]["down"][owner])
    return jnp.zeros_like(x).at[order // K].add(out * weights.reshape(-1)[order][:, None])


def with_capacity(params, x):
    """GShard's: each expert takes the first two tokens that want it; dispatch and combine are matmuls."""
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    mask = jax.nn.one_hot(jnp.argmax(probs, axis=-1), E)
    place = jnp.cumsum(mask, axis=0) * mask - mask
    slot = jax.nn.one_hot((place * mask).sum(-1).astype(int), 2) * (mask * (place < 2)).sum(-1, keepdims=True)
    dispatch = jnp.einsum("te,tc->tec", mask, slot)
    h = jnp.tanh(jnp.einsum("tec,td,edf->ecf", dispatch, x, params["experts"]["up"]))
    out = jnp.einsum("ecf,efd->ecd", h, params["experts"]["down"])
    return jnp.einsum("tec,te,ecd->td", dispatch, probs, out)


def masked_tokens(params, x):
    """Padding is masked in the logits and in the tokens."""
    real = (jnp.abs(x).sum(-1, keepdims=True) > 0).astype(x.dtype)
    probs = jax.nn.softmax(x @ params["router"]["kernel"] * real)
    weights, index = jax.lax.top_k(probs, K)
    chosen = jax.nn.one_hot(index, E)  # [T, k, E]
    h = jnp.tanh(jnp.einsum("td,edf->tef", x * real, params["experts"]["up"]))
    out = jnp.einsum("tef,efd->ted", h, params["experts"]["down"])
    kept = jnp.where((chosen.sum(1) > 0)[..., None], out * real[..., None], 0.0)
    return kept.sum(1) * weights.sum(-1, keepdims=True)


def per_token(params, x):
    """Written for one token, vmapped over all."""

    def one(token):
        weights, index = jax.lax.top_k(jax.nn.softmax(token @ params["router"]["kernel"]), K)
        outs = [jnp.tanh(token @ params["experts"]["up"][i]) @ params["experts"]["down"][i] for i in index]
        return weights @ jnp.stack(outs)

    return jax.vmap(one)(x)


def switched(params, x):
    """One branch per expert, vmapped over tokens."""

    def expert(i):
        return lambda token: jnp.tanh(token @ params["experts"]["up"][i]) @ params["experts"]["down"][i]

    def one(token):
        probs = jax.nn.softmax(token @ params["router"]["kernel"])
        best = jnp.argmax(probs)
        return jax.lax.switch(best, [expert(i) for i in range(E)], token) * probs[best]

    return jax.vmap(one)(x)


def thresholded(params, x):
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    smallest = jax.lax.top_k(probs, K)[0][..., -1:]
    return run_dense(params, x, jnp.where(probs >= smallest, probs, 0.0))


def biased_linear(params, x):
    probs = jax.nn.softmax(x @ params["router"]["kernel"] + params["router"]["bias"])
    weights, index = jax.lax.top_k(probs, K)
    return run_gathered(params, x, weights, index)


def softmax_beside(params, x):
    logits = x @ params["router"]["kernel"]
    probs = jax.nn.softmax(logits)
    _, index = jax.lax.top_k(logits, K)
    return run_gathered(params, x, jnp.take_along_axis(probs, index, axis=-1), index)


def expert_choice(params, x):
    probs = jax.nn.softmax(x @ params["router"]["kernel"])
    weights, index = jax.lax.top_k(probs.T, 3)  # [E, 3]: each expert takes three tokens
    h = jnp.tanh(jnp.einsum("ecd,edf->ecf", x[index], params["experts"]["up"]))
    out = jnp.einsum("ecf,efd->ecd", h, params["experts"]["down"]) * weights[..., None]
    return jnp.zeros_like(x).at[index.reshape(-1)].add(out.reshape(-1, D))


def experts_first(params, x):
    """Logits [E, T], as some write them."""
    logits = jnp.einsum("de,td->et", params["router"]["kernel"], x)
    weights, index = jax.lax.top_k(jax.nn.softmax(logits, axis=0).T, K)
    return run_gathered(params, x, weights, index)


@dataclass(frozen=True)
class Kind:
    layer: Callable[[Any, jax.Array], jax.Array]
    expected: Callable[[Any, Any], np.ndarray]
    k: int | None = K
    gate: str = "softmax"
    kind: str = "probabilities"
    noisy: bool = False
    biased: bool = False
    expert_choice: bool = False

    def __repr__(self) -> str:
        return self.layer.__name__


def _probabilities(params: Any, x: Any) -> np.ndarray:
    return softmax(logits_of(params, x))


def _sigmoid(params: Any, x: Any) -> np.ndarray:
    return 1 / (1 + np.exp(-logits_of(params, x)))


def _with_bias(params: Any, x: Any) -> np.ndarray:
    return softmax(logits_of(params, x) + np.asarray(params["router"]["bias"], np.float64))


KINDS = [
    Kind(soft_top_k, _probabilities),
    Kind(softmax_after, logits_of, gate="softmax after", kind="logits"),
    Kind(switch, _probabilities, k=1),
    Kind(two_argmax, _probabilities),
    Kind(noisy_top_k, logits_of, gate="softmax after", kind="logits", noisy=True),
    Kind(sigmoid_gate, _sigmoid, gate="sigmoid", kind="scores"),
    Kind(bias_balanced, _sigmoid, gate="sigmoid", kind="scores", biased=True),
    Kind(balanced_logits, logits_of, gate="softmax after", kind="logits", biased=True),
    Kind(group_limited, _probabilities),
    Kind(argsorted, _probabilities),
    Kind(approximate, _probabilities),
    Kind(ragged, _probabilities),
    Kind(sorted_tokens, _probabilities),
    Kind(with_capacity, _probabilities, k=1),
    Kind(masked_tokens, _probabilities),
    Kind(per_token, _probabilities),
    Kind(switched, _probabilities, k=1),
    Kind(thresholded, _probabilities),
    Kind(biased_linear, _with_bias),
    Kind(softmax_beside, _probabilities),
    Kind(expert_choice, _probabilities, k=3, expert_choice=True),
    Kind(experts_first, _probabilities),
]
