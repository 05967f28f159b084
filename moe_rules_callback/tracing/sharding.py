"""Over which axes of the mesh a value inside a `shard_map` differs from device to device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn, Literal

from .walk import Path, bodies, scan_split, tag

Axes = frozenset[str]

# After these the value is the same along their axes.
_EQUALISING = {"psum", "psum2", "psum_invariant", "pmax", "pmin", "all_gather", "all_gather_invariant"}


def varying_axes(eqn: JaxprEqn, below: Path, result: int) -> tuple[str, ...]:
    """Axes over which result `result` of the equation at `below` inside a shard_map varies, in mesh order."""
    inputs = [_named(spec) for spec in eqn.params["in_specs"]]
    found: list[Axes] = []
    _follow(bodies(eqn)[0].jaxpr, inputs, below[1:], result, found)
    axes = frozenset().union(*found)
    return tuple(name for name in eqn.params["mesh"].axis_names if name in axes)


def _named(spec: Any) -> Axes:
    parts = (part if isinstance(part, tuple) else (part,) for part in spec if part is not None)
    return frozenset(name for part in parts for name in part)


def _follow(jaxpr: Jaxpr, inputs: Sequence[Axes], below: Path, result: int, found: list[Axes]) -> list[Axes]:
    """Axes of the outputs. Those of the site at `below`, if it is in here, are added to `found`."""
    env = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Axes:
        return frozenset() if isinstance(atom, Literal) else env.get(atom, frozenset())

    for i, eqn in enumerate(jaxpr.eqns):
        operands = [read(atom) for atom in eqn.invars]
        everything: Axes = frozenset().union(*operands)
        here = below[:1] == (i,)
        outs = [everything] * len(eqn.outvars)
        if tag(eqn) in _EQUALISING:
            outs = [everything - _axis_names(eqn)] * len(eqn.outvars)
        elif tag(eqn) == "axis_index":
            outs = [_axis_names(eqn)]
        for j, body in enumerate(bodies(eqn)):
            inner = [operands[k] for k in body.operands]
            rest = below[2:] if here and below[1:2] == (j,) else ()
            after = _follow(body.jaxpr, inner, rest, result, found)
            if tag(eqn) == "scan":  # the carry may vary only from the second turn on
                first, carries = scan_split(eqn)
                for k in range(carries):
                    inner[first + k] |= after[k]
                after = _follow(body.jaxpr, inner, rest, result, found)
            if tag(eqn) in ("jit", "scan", "remat", "closed_call"):
                outs = after
        env.update(zip(eqn.outvars, outs, strict=True))
        if here and len(below) == 1:
            found.append(outs[result])
    return [read(atom) for atom in jaxpr.outvars]


def _axis_names(eqn: JaxprEqn) -> Axes:
    names = eqn.params.get("axes", eqn.params.get("axis_name", ()))
    return frozenset(names if isinstance(names, tuple) else (names,))
