"""Where an equation stands in a jaxpr of jaxprs.

    scan (3)  ->  its body  ->  top_k (7)          path (3, 0, 7)

A `Path` alternates between the number of an equation and the number of one of its bodies. A `Site` is one
equation, or some consecutive ones (a module's call), at a path.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

# The lines that equations come from are the user's, not those of this folder.
source_info_util.register_exclusion(os.path.join(os.path.dirname(__file__), ""))

Path = tuple[int, ...]

# One tag for what releases of jax call differently.
TAGS = {"pjit": "jit", "remat2": "remat", "checkpoint": "remat", "custom_vjp_call_jaxpr": "custom_vjp_call"}
# Primitives whose one body has the operands as inputs and the results as outputs.
CALLS = {
    *("jit", "remat", "closed_call", "core_call", "call"),
    *("custom_jvp_call", "custom_vjp_call", "shard_map"),
}


class Body(NamedTuple):
    """One nested jaxpr of an equation.

    Attributes:
        jaxpr, consts: the jaxpr, and the values of its `constvars`.
        operands: for each input the number of the equation's operand that feeds it first.
        results: for each output the number of the equation's result that it becomes, -1 for none.
    """

    jaxpr: Jaxpr
    consts: Sequence[Any]
    operands: Sequence[int]
    results: Sequence[int]


@dataclass(frozen=True)
class Site:
    """`count` equations in a row, the first of them at `path`."""

    path: Path
    count: int = 1


def tag(eqn: JaxprEqn) -> str:
    """Name of the primitive, the same in every release of jax."""
    return TAGS.get(eqn.primitive.name, eqn.primitive.name)


def opened(jaxpr: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """(jaxpr, consts) of an open or a closed jaxpr."""
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bodies(eqn: JaxprEqn) -> list[Body]:
    """The nested jaxprs that an equation runs; not what a reduction or a kernel keeps inside."""
    params, kind = eqn.params, tag(eqn)
    if kind == "while":
        conds, bodys, n = params["cond_nconsts"], params["body_nconsts"], len(eqn.invars)
        carry = [*range(conds + bodys, n)]
        tested, run = opened(params["cond_jaxpr"]), opened(params["body_jaxpr"])
        return [
            Body(*tested, [*range(conds), *carry], [-1] * len(tested[0].outvars)),
            Body(*run, [*range(conds, conds + bodys), *carry], range(len(eqn.outvars))),
        ]
    if kind == "cond":
        operands, results = range(1, len(eqn.invars)), range(len(eqn.outvars))
        return [Body(*opened(branch), operands, results) for branch in params["branches"]]
    if kind in CALLS or kind == "scan":
        inner = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
        return [Body(*opened(inner), range(len(eqn.invars)), range(len(eqn.outvars)))]
    return []


def is_opaque(eqn: JaxprEqn) -> bool:
    """Whether an equation runs a program that is not looked into: a kernel, a solver."""
    lists = (value if isinstance(value, tuple) else (value,) for value in eqn.params.values())
    programs = (opened(part)[0] for parts in lists for part in parts)
    # A single equation is the sum of a reduction or of a scatter.
    return not bodies(eqn) and any(isinstance(p, Jaxpr) and len(p.eqns) > 1 for p in programs)


def walk(jaxpr: Jaxpr, frame: Path = ()) -> Iterator[tuple[Path, JaxprEqn]]:
    """Every equation with its path, outer ones before those inside."""
    for i, eqn in enumerate(jaxpr.eqns):
        yield (*frame, i), eqn
        for j, body in enumerate(bodies(eqn)):
            yield from walk(body.jaxpr, (*frame, i, j))


def enclosing(path: Path) -> Iterator[Path]:
    """Paths of the equations around one, outermost first."""
    return (path[:n] for n in range(1, len(path), 2))


def scan_split(eqn: JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many its state."""
    if "ft_in" in eqn.params:  # since jax 0.11
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def scans_around(eqn: JaxprEqn, below: Path) -> int:
    """How many scans stand between an equation and the site at `below` inside it."""
    count = 0
    while len(below) > 2:
        eqn = bodies(eqn)[below[0]].jaxpr.eqns[below[1]]
        below = below[2:]
        count += tag(eqn) == "scan"
    return count


def shape_of(value: Any) -> tuple[int, ...]:
    """Shape of a variable or literal; () where it is no array."""
    return getattr(value.aval, "shape", ())


def dtype_of(value: Any) -> Any:
    """Dtype of a variable or literal that is an array, or None."""
    return getattr(value.aval, "dtype", None)


def source_of(eqn: JaxprEqn) -> str:
    """`model.py:41 (moe)`, the user's line that an equation comes from, or ''."""
    return source_info_util.summarize(eqn.source_info).rpartition("/")[2]


def boundary(jaxpr: Jaxpr, start: int, count: int) -> tuple[list[Any], list[Var]]:
    """What consecutive equations read and what the rest of the jaxpr needs of them.

    One equation: its operands, literals among them, and all its results. Several: the variables read, in
    order of first use, and the results used after them.
    """
    group = jaxpr.eqns[start : start + count]
    if count == 1:
        return list(group[0].invars), list(group[0].outvars)
    made = {v for eqn in group for v in eqn.outvars}
    reads = [v for eqn in group for v in eqn.invars if not isinstance(v, Literal) and v not in made]
    later = {v for eqn in jaxpr.eqns[start + count :] for v in eqn.invars if not isinstance(v, Literal)}
    later |= {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    return list(dict.fromkeys(reads)), [v for eqn in group for v in eqn.outvars if v in later]
