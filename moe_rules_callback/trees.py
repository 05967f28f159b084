"""Norms and similarities over parameter and gradient trees, with routers and experts known by name.

A leaf belongs to a router when one part of its path is `router`, `gate`, `gating` or ends or begins with
`router` (`mlp.router.kernel`, `router_weights`); `gate_proj` of a gated MLP does not count. It belongs to
experts, and to no router, when a part is `experts` or `expert`, stacked on an axis of E, or numbered by
the path (`experts.3.kernel`, `expert_3`). A key such as Haiku's `model/block_0/router` is several parts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from .errors import MissingSignalError

ROUTER = re.compile(r"^(router|gate|gating|router_.*|.*_router|.*Router.*)$")
EXPERTS = re.compile(r"^experts?$")
NUMBERED = re.compile(r"^experts?_(\d+)$")

Leaves = list[tuple[tuple[str, ...], jax.Array]]


def leaves(tree: Any) -> Leaves:
    """(path, floating-point array) of a pytree's leaves; everything else is passed over."""
    found: Leaves = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating):
            names = (str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)
            found.append((tuple("/".join(names).split("/")), leaf))
    return found


def _squares(x: jax.Array) -> jax.Array:
    """float32 [..], sums of squares over the last two axes: of kernels."""
    squares = jnp.square(x.astype(jnp.float32)).sum(tuple(range(x.ndim))[-2:])
    # Else XLA sums a whole array for the norm of all, and once more for those of its experts.
    return jax.lax.optimization_barrier(squares)


def _square(arrays: Iterable[jax.Array]) -> jax.Array:
    return sum((_squares(x).sum() for x in arrays), start=jnp.float32(0))


def _share(part: jax.Array, whole: jax.Array) -> jax.Array:
    """part / whole; 0 where both are, NaN where the whole is not finite."""
    return jnp.where(jnp.isfinite(whole), part / jnp.maximum(whole, 1e-30), jnp.nan)


def _of_expert(part: str) -> bool:
    return bool(EXPERTS.match(part) or NUMBERED.match(part))


def norm(tree: Any) -> jax.Array:
    """Euclidean norm over all floating-point leaves, float32 []."""
    return jnp.sqrt(_square(leaf for _, leaf in leaves(tree)))


def router_share(tree: Any) -> jax.Array:
    """norm(leaves of routers) / norm(all leaves), float32 [].

    Raises:
        MissingSignalError: no path names a router.
    """
    every = leaves(tree)
    routers = [
        leaf for path, leaf in every if any(map(ROUTER.match, path)) and not any(map(_of_expert, path))
    ]
    if not routers:
        raise MissingSignalError(
            "router_gradient_share finds no router in 'grads': no part of a path is 'router' or 'gate'. "
            f"Paths look like {_examples(every)}. Pass the share as a scalar metric of that name instead."
        )
    return _share(jnp.sqrt(_square(routers)), norm(tree))


def expert_arrays(
    tree: Any, experts: Collection[int], signal: str, least_axes: int = 1
) -> list[list[tuple[jax.Array, int]]]:
    """For each set of experts its arrays, float32 [*layers, E, ...], each with the axis that counts them.

    They are not flattened or joined: that would gather the parameters of experts on many devices.

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

    def axis(x: jax.Array) -> int:
        return next((i for i, length in enumerate(x.shape) if length in experts), 0)

    sets = [
        [(x.astype(jnp.float32), axis(x)) for x in arrays if x.ndim - axis(x) > least_axes]
        for arrays in stacked.values()
    ]
    if not any(sets):
        raise MissingSignalError(
            f"{signal} finds no experts: no part of a parameter path is 'experts'. Paths look like "
            f"{_examples(every)}. Pass the value as a scalar metric of that name instead."
        )
    return [arrays for arrays in sets if arrays]


def _norms(arrays: list[tuple[jax.Array, int]]) -> jax.Array:
    """Euclidean norm of each expert over all its arrays, float32 [*layers, E]."""
    squares = [
        _squares(x).sum(tuple(range(axis + 1, x.ndim - 2)))
        if x.ndim - axis > 2
        else jnp.square(x).sum(tuple(range(axis + 1, x.ndim)))  # biases
        for x, axis in arrays
    ]
    return jnp.sqrt(sum(squares[1:], start=squares[0]))


def expert_min_share(tree: Any, experts: Collection[int] = ()) -> jax.Array:
    """min over max of the experts' norms, the smallest over layers, float32 []. ~0: an expert is dead."""
    norms = map(_norms, expert_arrays(tree, experts, "expert_gradient_min_share"))
    return jnp.stack([_share(n.min(-1), n.max(-1)).min() for n in norms]).min()


def expert_cosine(tree: Any, experts: Collection[int] = ()) -> jax.Array:
    """Mean pairwise cosine of the experts' kernels in a layer, the largest over layers, float32 [].

    Each pair counts by the product of its norms: sum v_i v_j / sum |v_i| |v_j| over i != j. So a kernel is
    read once, where XLA can in the pass that updates it; to divide by the norms first takes a second pass.
    About 0 at a random initialisation, 1 for identical experts, 0 without a pair. Biases are left out.
    """
    cosines = []
    for arrays in expert_arrays(tree, experts, "expert_weight_cosine", least_axes=2):
        norms = _norms(arrays)
        own = jnp.square(norms).sum(-1)
        whole = sum(  # |sum of all vectors|^2, [*layers]
            (jnp.square(x.sum(axis)).sum(tuple(range(axis, x.ndim - 1))) for x, axis in arrays),
            start=jnp.float32(0),
        )
        pairs = jnp.square(norms.sum(-1)) - own
        none = pairs <= 1e-5 * own  # rounding; False for NaN
        cosines.append(jnp.where(none, 0.0, (whole - own) / pairs).max())
    return jnp.stack(cosines).max()


def _examples(every: Leaves) -> str:
    return ", ".join("/".join(path) for path, _ in every[:3]) or "(none)"
