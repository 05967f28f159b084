"""The truth of a formula on given rows, in float64 and for many points at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .. import logic
from ..formula import After, Always, Connective, Formula, Not, Once, Previously, Since, Var, children


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
        case Connective("iff", (a, b)):
            both = (Connective("implies", (a, b)), Connective("implies", (b, a)))
            return at(Connective("and", both), lag)
        case Connective("xor", (a, b)):
            both = (Connective("or", (a, b)), Connective("nand", (a, b)))
            return at(Connective("and", both), lag)
        case Connective(kind, _, weights):
            bias, coefficients, corner = logic.coefficients(kind, weights)
            total = np.float64(bias)
            for child, c, origin in zip(children(formula), coefficients, corner, strict=True):
                x = at(child, lag)
                total = total + c * ((x if c > 0 else x[..., ::-1]) - origin)
            return np.clip(total, 0, 1)
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
