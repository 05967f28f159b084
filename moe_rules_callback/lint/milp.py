"""Formulas as mixed-integer linear programs.

A variable stands for one bound of one node at one row. It is kept on one side only, under the truth or
over it, whichever the question pushes against; so an or that is to be large, or an and that is to be
small, costs no binary variable, and what is left is exact:

    v <= max(0, e)    v <= z,  v <= e - low (1 - z)               z binary, e in low..high
    v >= min(1, e)    v >= z,  v >= e - (high - 1) z
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .. import logic
from ..formula import After, Always, Connective, Formula, Not, Once, Previously, Since, Var, children

TIME_LIMIT = 5.0  # seconds for one program; after it the bound that is known so far counts


class Linear(NamedTuple):
    """constant + sum of coefficient * column, which lies in low..high."""

    constant: float
    terms: dict[int, float]
    low: float
    high: float

    def times(self, factor: float) -> Linear:
        low, high = sorted((factor * self.low, factor * self.high))
        terms = {column: factor * c for column, c in self.terms.items()}
        return Linear(factor * self.constant, terms, low, high)

    def plus(self, other: Linear | float) -> Linear:
        if not isinstance(other, Linear):
            other = constant(other)
        terms = dict(self.terms)
        for column, c in other.terms.items():
            terms[column] = terms.get(column, 0.0) + c
        low, high = self.low + other.low, self.high + other.high
        return Linear(self.constant + other.constant, terms, low, high)

    def at(self, columns: np.ndarray) -> float:
        """Its value in a solution."""
        return self.constant + sum(c * columns[column] for column, c in self.terms.items())


def constant(value: float) -> Linear:
    return Linear(value, {}, value, value)


def complement(e: Linear) -> Linear:
    return e.times(-1).plus(1.0)


class Program:
    """Columns and rows, gathered one by one."""

    def __init__(self) -> None:
        self._low: list[float] = []
        self._high: list[float] = []
        self._integer: list[bool] = []
        self._rows: list[Linear] = []

    def column(self, low: float = 0.0, high: float = 1.0, integer: bool = False) -> Linear:
        self._low.append(low)
        self._high.append(high)
        self._integer.append(integer)
        return Linear(0.0, {len(self._low) - 1: 1.0}, low, high)

    def require(self, e: Linear) -> None:
        """e >= 0"""
        self._rows.append(e)

    def maximise(self, e: Linear) -> tuple[float, np.ndarray | None]:
        """An upper bound of the maximum of e, and columns that come close to it; None: none were found."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        entries = [(i, j, c) for i, row in enumerate(self._rows) for j, c in row.terms.items()]
        i, j, c = zip(*entries, strict=True)
        places = np.array([i, j], np.int32)  # HiGHS in SciPy 1.14 takes no others
        matrix = csr_array((c, (places[0], places[1])), (len(self._rows), len(self._low)))
        lows = np.array([-row.constant for row in self._rows])
        objective = np.zeros(len(self._low))
        objective[list(e.terms)] = [-c for c in e.terms.values()]
        found = milp(
            objective,
            bounds=Bounds(np.array(self._low), np.array(self._high)),  # pyright: ignore[reportArgumentType]
            integrality=np.array(self._integer, int),
            constraints=LinearConstraint(matrix, lb=lows),  # pyright: ignore[reportArgumentType]
            options={"mip_rel_gap": 0.0, "time_limit": TIME_LIMIT},
        )
        dual = found.get("mip_dual_bound")
        bound = found.fun if dual is None and found.status == 0 else dual
        return (e.high if bound is None else e.constant - bound), found.x


class Encoding:
    """Formulas at one row, in terms of the rows before it.

    Args:
        program: gathers what is needed.
        atom: (name, lag) -> lower and upper bound of a predicate `lag` rows ago.
        lags: the rows that windows look at, 0 is now; ascending.
        exact: whether these are all of them, so that operators may stand inside each other.
        step: of the row; `after` counts from it.
    """

    def __init__(
        self,
        program: Program,
        atom: Callable[[str, int], tuple[Linear, Linear]],
        lags: Sequence[int],
        exact: bool,
        step: float,
    ) -> None:
        self._program, self._atom, self._lags, self._exact, self._step = program, atom, lags, exact, step
        self._known: dict[tuple[Formula, int, bool, bool], Linear] = {}
        self._opaque: dict[tuple[Formula, int], tuple[Linear, Linear]] = {}

    def bound(self, node: Formula, upper: bool, under: bool, lag: int = 0) -> Linear:
        """The upper or lower bound of a node, at most (`under`) or at least what it is."""
        key = (node, lag, upper, under)
        if key not in self._known:
            self._known[key] = self._bound(node, upper, under, lag)
        return self._known[key]

    def _bound(self, node: Formula, upper: bool, under: bool, lag: int) -> Linear:
        match node:
            case Var(name):
                return self._atom(name, lag)[upper]
            case Not():
                return self._affine("not", (1.0,), node, upper, under, lag)
            case Connective("iff", (a, b)):
                both = (Connective("implies", (a, b)), Connective("implies", (b, a)))
                return self.bound(Connective("and", both), upper, under, lag)
            case Connective("xor", (a, b)):
                both = (Connective("or", (a, b)), Connective("nand", (a, b)))
                return self.bound(Connective("and", both), upper, under, lag)
            case Connective(kind, _, weights):
                return self._affine(kind, weights, node, upper, under, lag)
            case After(step, operand):
                early = constant(float(upper))
                if self._step < step:
                    return early
                inner = self.bound(operand, upper, under, lag)
                # The rows before may be earlier than the step: whichever suits the question.
                return inner if lag == 0 or upper != under else early
            case _ if lag and not self._exact:
                return self._free(node, lag)[upper]
            case Previously(operand):
                return self.bound(operand, upper, under, lag + 1)
            case Always(rows, operand):
                return self._least(
                    [self.bound(operand, upper, under, d) for d in self._window(rows, lag)], under
                )
            case Once(rows, operand):
                return self._most(
                    [self.bound(operand, upper, under, d) for d in self._window(rows, lag)], under
                )
            case Since(rows, left, right):
                window = self._window(rows, lag)
                return self._most(
                    [
                        self._least(
                            [
                                self.bound(right, upper, under, d),
                                *(self.bound(left, upper, under, later) for later in window[:place]),
                            ],
                            under,
                        )
                        for place, d in enumerate(window)
                    ],
                    under,
                )
        raise TypeError(f"{node!r} is no formula")

    def _window(self, rows: int | None, lag: int) -> list[int]:
        return [d for d in self._lags if lag <= d and (rows is None or d < lag + rows)]

    def _free(self, node: Formula, lag: int) -> tuple[Linear, Linear]:
        if (node, lag) not in self._opaque:
            lower, upper = self._program.column(), self._program.column()
            self._program.require(upper.plus(lower.times(-1)))
            self._opaque[node, lag] = lower, upper
        return self._opaque[node, lag]

    def _affine(
        self, kind: str, weights: Sequence[float], node: Formula, upper: bool, under: bool, lag: int
    ) -> Linear:
        bias, coefficients, corner = logic.coefficients(kind, weights)
        e = constant(bias)
        for child, c, at in zip(children(node), coefficients, corner, strict=True):
            own = c > 0
            x = self.bound(child, upper == own, under == own, lag)
            e = e.plus(x.plus(-at).times(c))
        return self._clamp(e, under)

    def _clamp(self, e: Linear, under: bool) -> Linear:
        if not under:
            return complement(self._clamp(complement(e), True))
        if e.high <= 0 or e.low >= 1:
            return constant(0.0 if e.high <= 0 else 1.0)
        if e.low >= 0 and e.high <= 1:
            return e
        v = self._program.column(max(e.low, 0.0), min(e.high, 1.0))
        slack = e.plus(v.times(-1))
        if e.low < 0:
            z = self._program.column(integer=True)
            self._program.require(z.plus(v.times(-1)))
            slack = slack.plus(z.plus(-1.0).times(e.low))
        self._program.require(slack)
        return v

    def _least(self, values: Sequence[Linear], under: bool) -> Linear:
        if len(values) == 1:
            return values[0]
        v = self._program.column(min(x.low for x in values), min(x.high for x in values))
        if under:
            for x in values:
                self._program.require(x.plus(v.times(-1)))
            return v
        chosen = [self._program.column(integer=True) for _ in values]
        self._program.require(_sum(chosen).plus(-1.0))
        for x, z in zip(values, chosen, strict=True):  # v >= x - (high - low of v) where z = 0
            self._program.require(v.plus(x.times(-1)).plus(z.plus(-1.0).times(-(x.high - v.low))))
        return v

    def _most(self, values: Sequence[Linear], under: bool) -> Linear:
        return complement(self._least([complement(x) for x in values], not under))


def _sum(values: Iterable[Linear]) -> Linear:
    total = constant(0.0)
    for x in values:
        total = total.plus(x)
    return total
