"""Means over tokens, the only things that the audit reads large arrays for.

Each statistic of a layer is a mean over its tokens: of the entropy of a token's probabilities [Y], of the
experts it uses [Y, E], .. So statistics of micro-batches and of devices are averaged with their token
counts, probabilities are never gathered, and everything after this module is as small as the experts.
`signals` turns statistics into signals.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp
from jax.sharding import NamedSharding, PartitionSpec

from .routers import Routers
from .summaries import Summary


def entropy(routers: Routers) -> jax.Array:
    """[n], mean of H(p_t) in nats: of scores s with the sum S, ln S - sum s ln s / S."""
    s = routers.scores
    # Not `entr`: its comparisons make so much of it that a CPU deals it out to all cores, which takes longer.
    excess = jnp.where(s > 0, s * jnp.log(s), 0.0).sum(-1) / routers.total
    return routers.mean(jnp.maximum(jnp.log(routers.total) - excess, 0.0))


def confidence(routers: Routers) -> jax.Array:
    """[n], mean of the largest probability."""
    return routers.mean(routers.highest)


def margin(routers: Routers) -> jax.Array:
    """[n], mean of the largest minus the second largest probability; E = 1: the largest."""
    rest = jnp.where(routers.top1 > 0, 0.0, routers.probs).max(-1)
    return routers.mean(routers.highest - rest)


def boundary(routers: Routers) -> jax.Array:
    """[n], mean of the smallest selected minus the largest unselected probability; k = E: 0."""
    chosen = routers.selected > 0
    lowest = jnp.where(chosen, routers.probs, jnp.inf).min(-1)
    highest = jnp.where(chosen, -jnp.inf, routers.probs).max(-1)
    gap = jnp.zeros_like(lowest) if routers.k == routers.experts else lowest - highest
    return routers.mean(jnp.where(jnp.isfinite(lowest), gap, jnp.nan))  # inf: the selection is not sound


def probability(routers: Routers) -> jax.Array:
    """[n, E], mean probability of each expert."""
    return routers.mean(routers.probs)


def first(routers: Routers) -> jax.Array:
    """[n, E], share of tokens whose most probable expert it is."""
    sound = jnp.isfinite(confidence(routers))[:, None]
    counts = routers.counts(routers.best[..., None])
    return jnp.where(sound, counts / routers.tokens[:, None], jnp.nan)


def load(routers: Routers) -> jax.Array:
    """[n, E], share of assignments that each expert receives; sums to 1."""
    assert routers.k is not None
    if routers.index is None:
        return routers.mean(routers.selected) / routers.k
    # Asked of the indices, for XLA would count once more to sum the counts; and a sum, as the counts are, so
    # that devices reduce all together.
    wrong = routers.unmasked(~routers.named).sum(tuple(range(1, len(routers.shape))), dtype=jnp.int32)
    shares = routers.counts(routers.index) / (routers.k * routers.tokens[:, None])
    return jnp.where(wrong[:, None] == 0, shares, jnp.nan)


def pairs(routers: Routers) -> jax.Array:
    """[n, E, E], share of tokens that use both experts; the diagonal: that use the expert."""
    chosen = routers.unmasked(jnp.minimum(routers.selected, 1))
    # A mesh with explicit axes wants to be told that the sum over sharded tokens is not sharded.
    whole = NamedSharding(jax.typeof(chosen).sharding.mesh, PartitionSpec())
    together = jnp.einsum("n...i,n...j->nij", chosen, chosen, out_sharding=whole)
    return together / routers.tokens[:, None, None]


def logit_square(routers: Routers) -> jax.Array:
    """[n], mean square of the logits."""
    assert routers.logits is not None
    return routers.mean(jnp.square(routers.logits).mean(-1))


def log_partition_square(routers: Routers) -> jax.Array:
    """[n], mean of logsumexp(logits) squared."""
    assert routers.logits is not None
    return routers.mean(jnp.square(logsumexp(routers.logits, axis=-1)))


STATISTICS: dict[str, Callable[[Routers], jax.Array]] = {
    function.__name__: function
    for function in (
        entropy, confidence, margin, boundary, probability, first, load, pairs, logit_square,
        log_partition_square,
    )
}  # fmt: skip
TOKENS = "tokens"  # how many a summary rests on, which each has anyway
NEED_K = frozenset({"boundary", "load", "recent_load", "pairs"})
NEED_LOGITS = frozenset({"logit_square", "log_partition_square"})


@dataclass(frozen=True)
class Statistics:
    """Statistics of Y layers that have as many experts, and of all of them pooled.

    Attributes:
        values: name -> float32 [Y + 1, ..]; the last row is the mean over layers, weighted by tokens.
        experts, k: E, and the experts per token (None: not known).
    """

    values: dict[str, jax.Array]
    experts: int
    k: int | None

    def __getitem__(self, name: str) -> jax.Array:
        return self.values[name]


def summarise(routers: Routers, names: Iterable[str]) -> Summary:
    """The statistics `names` of the layers of one router array."""
    values = {name: _whole(STATISTICS[name](routers)) for name in names if name != TOKENS}
    return Summary(routers.names, routers.experts, routers.k, _whole(routers.tokens), values)


def _whole(x: jax.Array) -> jax.Array:
    """On every device of the mesh, if the trainer says which it is: what comes next is small, and dealt out
    by layers or experts it would be sent around at every turn."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.manual_axes:
        return x
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.lax.with_sharding_constraint(jax.sharding.reshard(x, whole), whole)


def measure(routers: Iterable[Routers | Summary], names: Iterable[str]) -> list[Statistics]:
    """The statistics `names` of all layers, one `Statistics` for each (E, k) that occurs."""
    names = sorted(names)
    groups: dict[tuple[int, int | None], list[Summary]] = {}
    for each in routers:
        summary = each if isinstance(each, Summary) else summarise(each, names)
        groups.setdefault((each.experts, each.k), []).append(summary)
    measured: list[Statistics] = []
    for (experts, k), members in groups.items():
        tokens = jnp.concatenate([each.tokens for each in members])
        weight = tokens / tokens.sum()  # NaN when no layer has a token left
        values: dict[str, jax.Array] = {}
        for name in names:
            if name == TOKENS:
                values[name] = jnp.append(tokens, tokens.sum())
                continue
            layers = jnp.concatenate([each.values[name] for each in members])
            share = weight.reshape(-1, *(1,) * (layers.ndim - 1))
            pooled = jnp.where(share == 0, 0, share * layers).sum(0)
            values[name] = jnp.concatenate([layers, pooled[None]])
        measured.append(Statistics(values, experts, k))
    return measured
