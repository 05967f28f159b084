"""Figures that need the true domain of every token, or the text itself.

What a router does with domains is read from one table, `tally`: how often each expert was the first,
second, .. choice of tokens of each domain.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_rules_callback.paths import AnyPath


def tally(expert_index: jax.Array, domain: jax.Array, domains: int, experts: int) -> jax.Array:
    """Counts float32 [k, domains, experts] from expert_index [tokens, k] and the tokens' domain [tokens]."""
    chosen = jax.nn.one_hot(expert_index, experts)  # [N, k, E]
    belongs = jax.nn.one_hot(domain, domains)  # [N, D]
    return jnp.einsum("nke,nd->kde", chosen, belongs)


def routing_accuracy(table: jax.Array) -> jax.Array:
    """Share of tokens whose first choice is their domain's expert: the first choice of most of its tokens.

    table [k, D, E]. A router that sends everything to one expert scores 1: read it beside
    `busiest_expert_share`, which is what it would be if one expert served all domains.
    """
    first = table[0]  # [D, E]
    return first.max(axis=-1).sum() / first.sum()


def busiest_expert_share(table: jax.Array) -> jax.Array:
    """Share of tokens whose first choice is the busiest expert, whatever their domain. table [k, D, E]."""
    first = table[0].sum(axis=0)  # [E]
    return first.max() / first.sum()


def domain_specialisation(table: jax.Array) -> jax.Array:
    """The largest share of a domain's tokens that use one and the same expert, mean over domains.

    table [k, D, E]. k / E where every expert takes from all domains alike, 1 where every domain has an
    expert that all its tokens use (Muennighoff et al. 2024, OLMoE, section 5.3). A domain without
    tokens is left out.
    """
    tokens = table[0].sum(axis=-1)  # [D]
    largest = table.sum(axis=0).max(axis=-1)  # [D]
    return jnp.mean(largest / tokens, where=tokens > 0)


def of_routing(tables: jax.Array) -> dict[str, float]:
    """The figures of a whole model, from the tables of its layers [layers, k, D, E].

    Means over layers, but `experts_used` and `least_expert_share` are those of the worst layer. An
    expert is in use when it gets more than a tenth of its fair share of the assignments.
    """
    means = {
        function.__name__: float(jax.vmap(function)(tables).mean())
        for function in (routing_accuracy, busiest_expert_share, domain_specialisation)
    }
    assignments = np.asarray(tables).sum(axis=(1, 2))  # [layers, E]
    share = assignments / assignments.sum(axis=-1, keepdims=True)
    used = (share > 0.1 / share.shape[-1]).sum(axis=-1)
    return {**means, "experts_used": float(used.min()), "least_expert_share": float(share.min())}


def write_affinity(path: AnyPath, tables: jax.Array, domains: Sequence[str]) -> None:
    """Writes as CSV which share of a domain's assignments each expert gets, a row a layer and domain.

    tables [layers, k, D, E]; nan for a domain without tokens.
    """
    assignments = np.asarray(tables).sum(axis=1)  # [layers, D, E]
    total = assignments.sum(axis=-1, keepdims=True)
    share = np.where(total > 0, assignments / np.maximum(total, 1), np.nan)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["domain", *(f"expert_{expert}" for expert in range(share.shape[-1]))])
        for layer, of_domains in enumerate(share):
            for domain, row in zip(domains, of_domains, strict=True):
                writer.writerow([f"layer_{layer} {domain}", *(f"{value:.4f}" for value in row)])


def text_entropy(texts: Sequence[np.ndarray]) -> tuple[float, float]:
    """Entropy of a byte, alone and given the byte before it, in nats; texts of any length count alike.

    It is what the best model that sees no context, or one byte of it, would score on these very texts.
    """
    pairs = np.zeros((256, 256))
    for text in texts:
        codes = text[:-1].astype(np.int64) * 256 + text[1:]
        pairs += np.bincount(codes, minlength=256 * 256).reshape(256, 256) / (len(codes) * len(texts))
    return _entropy(pairs.sum(axis=0)), _entropy(pairs) - _entropy(pairs.sum(axis=1))


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
