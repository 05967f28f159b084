"""The truth of a formula on given rows, in float64 and for many points at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .. import logic
from ..formula import After, Always, Connective, Formula, Not, Once, Previously, Since, Var


def truth(
    formula: Formula,
    atoms: Mapping[tuple[str, int], np.ndarray],
    lags: Sequence[int] = (0,),
    step: float = np.inf,
    lag: int = 0,
) -> np.ndarray:
    """Truth intervals [.., 2].

    Args:
        formula: what is evaluated.
        atoms: truth intervals [.., 2] of the predicates by (name, rows ago). Where a row is lacking, the
            newest row stands for it: with one row, the predicates have always been what they are.
        lags: the rows that windows look at, ascending.
        step: of all rows, for `after`.
        lag: the row at which the formula is evaluated.
    """

    def at(node: Formula, lag: int) -> np.ndarray:
        return truth(node, atoms, lags, step, lag)

    def window(rows: int | None) -> list[int]:
        return [d for d in lags if lag <= d and (rows is None or d < lag + rows)] or [lag]

    match formula:
        case Var(name):
            return atoms.get((name, lag), atoms[name, 0])
        case Not(operand):
            return 1 - at(operand, lag)[..., ::-1]
        case Connective("iff", operands):  # each operand once: a chain of n is no tree of 2^n
            a, b = (at(operand, lag) for operand in operands)
            return _connect("and", (_connect("implies", (a, b)), _connect("implies", (b, a))))
        case Connective("xor", operands):
            a, b = (at(operand, lag) for operand in operands)
            return _connect("and", (_connect("or", (a, b)), _connect("nand", (a, b))))
        case Connective(kind, operands, weights):
            return _connect(kind, [at(operand, lag) for operand in operands], weights)
        case After(first, operand):
            inner = at(operand, lag)
            return inner if step >= first else np.broadcast_to(np.array([0.0, 1.0]), inner.shape)
        case Previously(operand):
            return at(operand, lag + 1)
        case Always(rows, operand):
            return np.min([at(operand, d) for d in window(rows)], axis=0)
        case Once(rows, operand):
            return np.max([at(operand, d) for d in window(rows)], axis=0)
        case Since(rows, left, right):
            seen = window(rows)
            held = [
                np.min([at(right, d), *(at(left, later) for later in seen[:place])], axis=0)
                for place, d in enumerate(seen)
            ]
            return np.max(held, axis=0)
    raise TypeError(f"{formula!r} is no formula")


def _connect(kind: str, operands: Sequence[np.ndarray], weights: Sequence[float] = (1.0, 1.0)) -> np.ndarray:
    """A connective over truth intervals [.., 2]."""
    bias, coefficients, corner = logic.coefficients(kind, weights)
    total = np.float64(bias)
    for x, c, origin in zip(operands, coefficients, corner, strict=True):
        total = total + c * ((x if c > 0 else x[..., ::-1]) - origin)
    return np.clip(total, 0, 1)
