"""From the operand of a selection back to the matmul that made it.

    top_k  <-  div  <-  exp  <-  sub  <-  add  <-  dot_general  <-  layers/0/router/kernel

The axis that is chosen over is followed on the way: it has to be an axis of the matmul's weights, the one
with an entry per expert.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

from .flow import Flow, Value
from .walk import Path, shape_of, tag

Span = tuple[int, int]  # axes start:stop of a value

ELEMENTWISE = {
    *("add", "sub", "mul", "div", "max", "min", "neg", "exp", "exp2", "log", "log1p", "expm1", "logistic"),
    *("tanh", "erf", "erf_inv", "abs", "sign", "sqrt", "rsqrt", "square", "integer_pow", "pow", "select_n"),
    *("clamp", "convert_element_type", "stop_gradient", "copy", "copy_p", "reduce_precision", "name"),
    *("add_any", "and", "or", "not", "xor", "is_finite", "sharding_constraint", "reshard", "mesh_cast"),
    *("pvary", "pcast", "psum", "psum_invariant", "psum2", "optimization_barrier", "device_put", "round"),
    *("floor", "ceil", "rem", "eq", "ne", "lt", "le", "gt", "ge"),
}


_ALONG_OTHER_AXES = {
    *("slice", "dynamic_slice", "rev", "pad", "concatenate", "all_gather", "all_gather_invariant"),
}


class Step(NamedTuple):
    """A value on the way back, the axes in it that hold the experts, and what makes it (None: an alias)."""

    value: Value
    span: Span
    eqn: JaxprEqn | None


class Chain(NamedTuple):
    """The way from the operand of a selection (first step) to the result of the matmul (last step).

    Attributes:
        matmul: path of the matmul.
        weights: the operand of the matmul that has the chosen axis.
        other: its other operand.
    """

    steps: list[Step]
    matmul: Path
    weights: Value
    other: Value


def chain_of(flow: Flow, operand: Value, axis: int) -> Chain | None:
    """The shortest way back to a matmul whose output axes include the whole chosen axis."""
    start = Step(operand, (axis, axis + 1), None)
    queue: deque[tuple[Step, tuple[Any, ...] | None]] = deque([(start, None)])
    seen = set()
    while queue:
        step, trail = queue.popleft()
        if step.value in seen:
            continue
        seen.add(step.value)
        made = flow.maker(step.value)
        step = step._replace(eqn=made[1] if made else None)
        here = (step, trail)
        for value in flow.before[step.value]:
            if shape_of(value.var)[-_rank(step.value) :] == shape_of(step.value.var):
                shift = _rank(value) - _rank(step.value)  # a scan's operand has one axis more
                queue.append((Step(value, (step.span[0] + shift, step.span[1] + shift), None), here))
            elif _rank(value) == _rank(step.value) - 1 and step.span[0]:  # out of a scan
                queue.append((Step(value, (step.span[0] - 1, step.span[1] - 1), None), here))
        if made is None:
            continue
        use, eqn = made
        operands = flow.operands(use.path)
        if tag(eqn) == "dot_general":
            owner = _owner(eqn, step.span)
            left, right = operands[:2]
            if owner is None or left is None or right is None:
                continue
            pair = (left, right) if owner == 0 else (right, left)
            return Chain(_unrolled(here), use.path, *pair)
        for k, span in operands_with(eqn, use.number, step.span):
            value = operands[k]
            if value is not None:
                queue.append((Step(value, span, None), here))
    return None


def operands_with(eqn: JaxprEqn, result: int, span: Span) -> Iterator[tuple[int, Span]]:
    """(operand, its axes) that hold what result `result` of the equation has in the axes `span`."""
    kind, shapes = tag(eqn), [shape_of(v) for v in eqn.invars]
    shape = shape_of(eqn.outvars[result])
    if kind in ("optimization_barrier", "device_put", "psum", "psum2", "psum_invariant"):
        yield result, span
    elif kind in ELEMENTWISE:
        yield from ((k, span) for k, s in enumerate(shapes) if s == shape)
    elif kind == "broadcast_in_dim":
        dims = eqn.params["broadcast_dimensions"]
        if all(d in dims and shapes[0][dims.index(d)] == shape[d] for d in range(*span)):
            yield 0, (dims.index(span[0]), dims.index(span[1] - 1) + 1)
    elif kind in ("reshape", "squeeze"):
        found = _reshaped(shapes[0], shape, span)
        if found:
            yield 0, found
    elif kind == "transpose":
        axes = [eqn.params["permutation"][d] for d in range(*span)]
        if axes == list(range(axes[0], axes[0] + len(axes))):
            yield 0, (axes[0], axes[-1] + 1)
    elif kind in _ALONG_OTHER_AXES:
        for k, s in enumerate(shapes):
            if len(s) == len(shape):
                yield k, span
    elif kind.startswith(("cum", "scatter")) or kind == "dynamic_update_slice":  # logits.at[:, 3].set(-inf)
        yield 0, span


def _reshaped(before: tuple[int, ...], after: tuple[int, ...], span: Span) -> Span | None:
    """The axes of `before` that a reshape turns into the axes `span` of `after`."""
    ahead, size = math.prod(after[: span[0]]), math.prod(after[slice(*span)])
    for start in range(len(before)):
        if math.prod(before[:start]) != ahead or before[start] == 1 != size:
            continue
        for stop in range(start + 1, len(before) + 1):
            if math.prod(before[start:stop]) == size:
                return start, stop
    return None


def _owner(eqn: JaxprEqn, span: Span) -> int | None:
    """Which operand of a dot_general has the output axes `span` among its own, or None for a mixture."""
    (contract, _), (batch, _) = eqn.params["dimension_numbers"]
    left = len(shape_of(eqn.invars[0])) - len(contract)  # batch axes, then those of the left operand
    if len(batch) <= span[0] and span[1] <= left:
        return 0
    return 1 if span[0] >= left else None


def _rank(value: Value) -> int:
    return len(shape_of(value.var))


def _unrolled(here: tuple[Any, ...]) -> list[Step]:
    steps = []
    node: tuple[Any, ...] | None = here
    while node is not None:
        step, node = node
        steps.append(step)
    return steps[::-1]
