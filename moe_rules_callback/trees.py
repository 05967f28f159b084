"""Norms and similarities over parameter and gradient trees, with routers and experts known by name.

A leaf belongs to a router when one part of its path is `router`, `gate`, `gating` or ends or begins with
`router` (`mlp.router.kernel`, `router_weights`); `gate_proj` of a gated MLP does not count. It belongs to
experts when a part is `experts` or `expert`, stacked on an axis of E, or numbered by the path
(`experts.3.kernel`, `expert_3`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .errors import MissingSignalError

ROUTER = re.compile(r"^(router|gate|gating|router_.*|.*_router|.*Router.*)$")
EXPERTS = re.compile(r"^experts?$")
NUMBERED = re.compile(r"^(?:experts?_)(\d+)$")

Leaves = list[tuple[tuple[str, ...], jax.Array]]


def leaves(tree: Any) -> Leaves:
    """(path, floating-point array) of a pytree's leaves; everything else is passed over."""
    found: Leaves = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            names = (str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
            found.append((tuple(names), leaf))
    return found


def _square(arrays: Iterable[jax.Array]) -> jax.Array:
    return sum((jnp.square(x.astype(jnp.float32)).sum() for x in arrays), start=jnp.float32(0))


def norm(tree: Any) -> jax.Array:
    """Euclidean norm over all floating-point leaves, float32 []."""
    return jnp.sqrt(_square(leaf for _, leaf in leaves(tree)))


def router_share(tree: Any) -> jax.Array:
    """norm(leaves of routers) / norm(all leaves), float32 [].

    Raises:
        MissingSignalError: no path names a router.
    """
    every = leaves(tree)
    routers = [leaf for path, leaf in every if any(map(ROUTER.match, path))]
    if not routers:
        raise MissingSignalError(
            "router_gradient_share finds no router in 'grads': no part of a path is 'router' or 'gate'. "
            f"Paths look like {_examples(every)}. Pass the share as a scalar metric of that name instead."
        )
    return jnp.sqrt(_square(routers) / (_square(leaf for _, leaf in every) + 1e-30))


def expert_rows(tree: Any, experts: Collection[int], signal: str, least_axes: int = 1) -> list[jax.Array]:
    """For each set of experts all its parameters, float32 [layers, E, parameters of an expert].

    Args:
        tree: parameters or gradients.
        experts: numbers of experts that the routers have; the first axis of such a length counts the
            experts of a stacked array, and axes before it count scanned layers. Empty: the first axis.
        signal: named in the error.
        least_axes: axes that an expert's array must have: 2 leaves biases out.

    Raises:
        MissingSignalError: no path names experts.
    """
    every = leaves(tree)
    stacked: dict[str, list[jax.Array]] = {}
    single: dict[tuple[str, tuple[str, ...]], dict[int, jax.Array]] = {}
    for path, leaf in every:
        for i, part in enumerate(path):
            prefix, rest = "/".join(path[:i]), path[i + 1 :]
            if number := NUMBERED.match(part):
                single.setdefault((prefix, rest), {})[int(number[1])] = leaf
            elif not EXPERTS.match(part):
                continue
            elif rest and rest[0].isdigit():
                single.setdefault((prefix, rest[1:]), {})[int(rest[0])] = leaf
            else:
                stacked.setdefault(prefix, []).append(leaf)
            break
    for (prefix, _), members in single.items():
        array = jnp.stack([members[i] for i in sorted(members)])
        stacked.setdefault(prefix, []).append(array)
    rows = [
        jnp.concatenate(parts, axis=-1)
        for arrays in stacked.values()
        if (parts := [part for x in arrays if (part := _rows(x, experts, least_axes)) is not None])
    ]
    if not rows:
        raise MissingSignalError(
            f"{signal} finds no experts: no part of a parameter path is 'experts'. Paths look like "
            f"{_examples(every)}. Pass the value as a scalar metric of that name instead."
        )
    return rows


def _rows(x: jax.Array, experts: Collection[int], least_axes: int) -> jax.Array | None:
    """x as [layers, E, parameters], or None when an expert has fewer than `least_axes` axes in it."""
    axis = next((i for i, length in enumerate(x.shape) if length in experts), 0)
    if x.ndim - axis - 1 < least_axes:
        return None
    return x.astype(jnp.float32).reshape(math.prod(x.shape[:axis]), x.shape[axis], -1)


def expert_min_share(tree: Any, experts: Collection[int] = ()) -> jax.Array:
    """min over max of the experts' norms, the smallest over layers, float32 []. ~0: an expert is dead."""
    groups = expert_rows(tree, experts, "expert_gradient_min_share")
    norms = [jnp.linalg.norm(rows, axis=-1) for rows in groups]
    return jnp.stack([(n.min(-1) / jnp.maximum(n.max(-1), 1e-30)).min() for n in norms]).min()


def expert_cosine(tree: Any, experts: Collection[int] = ()) -> jax.Array:
    """Mean pairwise cosine of the experts' kernels, the largest over layers, float32 [].

    About 0 at a random initialisation, 1 for identical experts. Biases are left out.
    """
    cosines = []
    for rows in expert_rows(tree, experts, "expert_weight_cosine", least_axes=2):
        rows = rows / jnp.maximum(jnp.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
        n = rows.shape[1]
        total = jnp.square(rows.sum(1)).sum(-1)  # n + 2 * sum over pairs
        cosines.append(((total - n) / max(n * (n - 1), 1)).max())
    return jnp.stack(cosines).max()


def _examples(every: Leaves) -> str:
    return ", ".join("/".join(path) for path, _ in every[:3]) or "(none)"
