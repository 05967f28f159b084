"""What a replacement must keep, and where it has to be made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from ..errors import TracingError
from .flow import Flow
from .walk import Path, Site, bodies, tag


def checked(new: Any, old_types: Sequence[tuple[tuple[int, ...], Any]], what: str) -> list[Any]:
    """The results of a replacement as a list.

    Args:
        new: one array, or as many as there are results.
        old_types: shape and dtype of each result that is replaced.
        what: is replaced, for the message.

    Raises:
        TracingError: another number of results, another shape or another dtype.
    """
    results = list(new) if isinstance(new, list | tuple) else [new]
    now = [(jnp.shape(x), jnp.result_type(x)) for x in results]
    if now != list(old_types):
        raise TracingError(
            f"The replacement of {what} returns {_shown(now)}, where {_shown(old_types)} is needed: what "
            "follows was traced for these shapes and dtypes. Usual cause: a forgotten .astype(x.dtype), or a "
            "reduced axis. Return the same."
        )
    return [jnp.asarray(x) for x in results]


def _shown(types: Sequence[tuple[tuple[int, ...], Any]]) -> str:
    named = (f"{jnp.dtype(dtype).name}[{','.join(map(str, shape))}]" for shape, dtype in types)
    return ", ".join(named) or "nothing"


def outside_rules(flow: Flow, site: Site) -> Site:
    """The site, or the function with its own derivative rule around it, if that has nothing else inside.

    `jax.nn.relu` is a jit in a custom_jvp: in its place means in the place of both.
    """
    path = site.path
    while len(path) > 2 and site.count == 1:
        around: Path = path[:-2]
        eqn, inside = flow.equations[around], flow.equations[path]
        jaxpr = bodies(eqn)[0].jaxpr
        whole = len(jaxpr.eqns) == 1 and jaxpr.invars == inside.invars and jaxpr.outvars == inside.outvars
        if not (whole and tag(eqn) in ("custom_jvp_call", "custom_vjp_call")):
            break
        path = around
    return Site(path, site.count)
