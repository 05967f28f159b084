"""Finds the routers in a function that nobody changed.

A router is a top_k, approx_top_k, argmax or sort over a short axis of floats, whose operand goes back to a
matmul with weights that have this axis, and whose outcome goes on to dispatch: a gather, scatter, ragged_dot,
switch or one-hot matmul. The path of the weights names it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from .arguments import Arguments
from .dispatch import MOVES, Dispatch, is_random
from .flow import Flow, Value
from .gates import described, partners
from .logits import Span, chain_of
from .program import Program
from .routers import Discovery, Router
from .walk import Path, dtype_of, enclosing, is_opaque, shape_of, source_of, tag, walk

MAX_EXPERTS = 1024  # the choice over a longer axis is one of a word
_AXIS = {"top_k": "axis", "approx_top_k": "reduction_dimension", "argmax": "axes", "sort": "dimension"}


def discover_routers(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Discovery:
    """The routing sites of a function; it is traced, not run.

    Args:
        fn: a forward pass, a loss or a whole training step.
        *args, **kwargs: its arguments; `jax.ShapeDtypeStruct` in the place of arrays will do.

    Returns:
        The routers, and what was not taken for one, with reasons; print it.
    """
    return discover(Program.of(fn, Arguments(fn, args, kwargs)))


def discover(program: Program) -> Discovery:
    """`discover_routers` on a program that was traced before."""
    flow = Flow(program.closed)
    found = [c for path, eqn in flow.equations.items() if (c := _candidate(flow, program, path, eqn))]
    opaque = [f"{tag(eqn)} at {source_of(eqn)}" for eqn in flow.equations.values() if is_opaque(eqn)]
    return Discovery(_numbered(_merged(found)), dict.fromkeys(opaque))


def _axis(eqn: JaxprEqn) -> int | None:
    """The axis that a selection of floats chooses over, or None for any other equation."""
    kind = tag(eqn)
    if kind not in _AXIS or not jnp.issubdtype(dtype_of(eqn.invars[0]), jnp.floating):
        return None
    axis = eqn.params.get(_AXIS[kind], -1)  # top_k had none in older releases
    return (axis[0] if isinstance(axis, tuple) else axis) % len(shape_of(eqn.invars[0]))


def differentiates(program: Program) -> bool:
    """Whether a function holds a backward pass, as a whole training step does."""
    return any(_is_backward(eqn) for _, eqn in walk(program.closed.jaxpr))


def _is_backward(eqn: JaxprEqn) -> bool:
    """Whether an equation belongs to a backward pass: a remat's second forward, or a transposition."""
    stack = str(eqn.source_info.name_stack)
    return "rematted_computation" in stack or "transpose(" in stack


def _is_recomputed(flow: Flow, path: Path) -> bool:
    """Whether an equation is, or stands inside, one of a backward pass."""
    return any(_is_backward(flow.equations[p]) for p in (*enclosing(path), path))


def _candidate(flow: Flow, program: Program, path: Path, eqn: JaxprEqn) -> Router | None:
    axis = _axis(eqn)
    if axis is None or _is_recomputed(flow, path):
        return None
    operand = flow.operands(path)[0]
    if operand is None:
        return None
    size = shape_of(operand.var)[axis]
    # jax keeps no lines inside its own jitted functions (jnp.argsort): take those of the call.
    sources = (source_of(flow.equations[p]) for p in (path, *reversed([*enclosing(path)])))
    source = next(filter(None, sources), "?")
    base = Router("", False, "", tag(eqn), source, _k(flow, path, eqn, axis), size, path=path)
    chain = chain_of(flow, operand, axis)
    if chain is None:
        return replace(base, reason="no matmul has the axis that it chooses over among its outputs")
    may_choose_tokens = tag(eqn) != "argmax"
    dispatch = Dispatch(flow, path, chain, size, may_choose_tokens)
    weights, other = flow.weights(chain.weights), flow.weights(chain.other)
    by_expert = other is not None and (weights is None or _takes_from(flow, dispatch, chain.weights))
    by_expert = by_expert and may_choose_tokens
    if by_expert:
        weights = other
    if weights is None:
        return replace(base, reason="its scores are a product of two activations, not of a parameter")
    matmul, span = flow.equations[chain.matmul], chain.steps[-1].span
    if by_expert:
        span = _other_axes(matmul, span)
    experts = math.prod(shape_of(matmul.outvars[0])[slice(*span)])
    name = _name(flow, program, weights, eqn)
    base = replace(base, name=name, experts=experts, matmul=chain.matmul, expert_choice=by_expert)
    base = described(flow, base, chain, span)
    if experts > MAX_EXPERTS:
        return replace(base, reason=f"an axis of {experts} is longer than any router's ({MAX_EXPERTS})")
    if experts < 2:
        return replace(base, reason="it chooses among tokens by a single output, not among experts")
    if dispatch.found is None:
        if any(is_random(flow, v) for v in partners(flow, chain)):
            return replace(base, reason="random numbers are added and nothing is dispatched, as in sampling")
        return replace(base, reason="; ".join(dispatch.seen) or "nothing is dispatched by what it chooses")
    reason = f"chooses over the output of this matmul, and a {dispatch.found[0]} dispatches by it"
    return replace(base, taken=True, reason=reason)


def _takes_from(flow: Flow, dispatch: Dispatch, tokens: Value) -> bool:
    """Whether what is dispatched is what the matmul was fed with: then the choice was among tokens."""
    if dispatch.found is None or not dispatch.by_choice:
        return False
    ours = set(flow.back([tokens], lambda eqn: tag(eqn) in MOVES))
    theirs = (v for v in flow.operands(dispatch.found[1]) if v is not None)
    return not ours.isdisjoint(flow.back(theirs, lambda eqn: tag(eqn) in MOVES))


def _other_axes(matmul: JaxprEqn, span: Span) -> Span:
    """The axes of a dot_general's result that come from the operand which does not have the axes `span`."""
    (contract, _), (batch, _) = matmul.params["dimension_numbers"]
    left = len(shape_of(matmul.invars[0])) - len(contract)
    return (left, len(shape_of(matmul.outvars[0]))) if span[1] <= left else (len(batch), left)


def _k(flow: Flow, path: Path, eqn: JaxprEqn, axis: int) -> int | None:
    if tag(eqn) != "sort":
        return 1 if tag(eqn) == "argmax" else eqn.params["k"]
    values = list(flow.results(path))
    for value in values:
        values += [v for v in flow.after[value] if v not in values]
        for use in flow.uses[value]:
            user = flow.equations[use.path]
            if tag(user) == "slice":
                start, limit = user.params["start_indices"][axis], user.params["limit_indices"][axis]
                if limit - start < shape_of(value.var)[axis]:
                    return limit - start
            elif tag(user) in ("rev", "convert_element_type"):
                values += flow.results(use.path)
    return None


def _name(flow: Flow, program: Program, weights: Value, eqn: JaxprEqn) -> str:
    if weights in flow.inputs:
        return program.names[flow.inputs[weights]]
    stack = str(eqn.source_info.name_stack)
    return f"{stack}/constant" if stack else "constant"


def _merged(found: list[Router]) -> list[Router]:
    """One router per matmul: GShard's two argmax are a top 2."""
    by_matmul: dict[Path, Router] = {}
    rest = []
    for router in found:
        first = by_matmul.get(router.matmul) if router.taken else None
        if not router.taken:
            rest.append(router)
        elif first is None:
            by_matmul[router.matmul] = router
        else:
            one_by_one = router.selection == first.selection == "argmax"
            by_matmul[router.matmul] = replace(first, k=first.k + 1 if one_by_one and first.k else router.k)
    return sorted([*by_matmul.values(), *rest], key=lambda router: router.path)


def _numbered(found: list[Router]) -> Iterator[Router]:
    """Names made unique: a router that runs twice is `name` and `name#2`."""
    seen: Counter[str] = Counter()
    for router in sorted(found, key=lambda router: (not router.taken, router.path)):
        seen[router.name] += 1
        count = seen[router.name]
        yield replace(router, name=f"{router.name}#{count}") if router.name and count > 1 else router
