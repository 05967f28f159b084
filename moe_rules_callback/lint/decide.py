"""Can rules be in given states together? Decided, not sampled.

    deciding = Decision(features)
    deciding.reach([Demand(a, "TRUE"), Demand(b, "FALSE")]).possible

The question is one number: the largest t by which all demands can be met at once (a rule that is to be
TRUE meets it by lower bound - alpha). Formulas are piecewise linear and enter as they are, see `milp`.
The sigmoids of predicates enter as chords with their error, see `curves`; where that leaves the answer
open, the range of a feature is cut in two and each half is asked. A no is a proof, up to TOLERANCE of truth.

The windows of temporal operators are not sampled either: a past operator is decided by one row in each
stretch between the ends of all windows, for every operator that could choose one, so rows are taken there
only. An operator inside another is exact while all windows together span at most SPAN rows; over more it
may have any truth, which can only hide a finding.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from ..formula import After, Always, Connective, Formula, Once, Previously, Rule, Since, children, variables
from .curves import Box, Curves, Solved
from .features import Features
from .milp import Encoding, Program
from .truth import truth

TOLERANCE = 1e-5  # of truth: more than float32 loses, less than anybody means
SPAN = 8  # rows that nested operators may look back together and stay exact
MAX_LAGS = 24  # rows of a question at most; a longer one counts as possible
MAX_NODES = 200  # parts of the formulas of a question, times its rows; a larger one counts as possible
MAX_BOXES = 60  # cuts of a question; one that is open after them counts as possible
PAST = (Always, Once, Previously, Since)

Wanted = Literal["TRUE", "FALSE", "not TRUE", "not FALSE"]
Point = Mapping[tuple[str, int], np.ndarray]  # truth of a predicate, some rows ago


@dataclass(frozen=True)
class Demand:
    """A rule and the state in which it should be."""

    rule: Rule
    wanted: Wanted

    @property
    def upper(self) -> bool:
        return self.wanted.endswith("FALSE")

    @property
    def under(self) -> bool:
        """Whether a larger bound helps."""
        return self.wanted in ("TRUE", "not FALSE")

    @property
    def border(self) -> float:
        """Where the state begins, in truth."""
        return 1 - self.rule.threshold if self.upper else self.rule.threshold

    def met_by(self, interval: np.ndarray) -> np.ndarray:
        """By how much truth [.., 2] meets the demand; negative where it does not."""
        excess = interval[..., int(self.upper)] - self.border
        return excess if self.under else -excess


class Answer(NamedTuple):
    """Of `Decision.reach`.

    Attributes:
        possible: whether the demands can be met together, or that was left open.
        proven: no more than this can they be met by.
        found: they are met by this much where `history` is what was.
        history: truth of the predicates by (name, rows ago).
        point: truth of the predicates at the row itself, by name.
    """

    possible: bool
    proven: float
    found: float
    history: Point

    @property
    def point(self) -> dict[str, np.ndarray]:
        return {name: interval for (name, lag), interval in self.history.items() if lag == 0}


class Decision:
    """Decides questions about rules over some predicates.

    Args:
        features: under the predicates. A predicate that is not among them may have any interval
            0 <= L <= U <= 1, whatever the others have.
    """

    def __init__(self, features: Features) -> None:
        self._features = features

    def reach(self, demands: Sequence[Demand], least: float = -TOLERANCE, close: float = math.inf) -> Answer:
        """Whether demands can be met together, at one row of one layer, by `least` or more.

        Where they cannot, `proven` and `found` are brought within `close` of each other.
        """
        answers = [self._reach(demands, least, close, step) for step in _steps(demands)]
        return max(answers, key=lambda answer: (answer.possible, answer.proven))

    def _reach(self, demands: Sequence[Demand], least: float, close: float, step: float) -> Answer:
        lags, exact = _lags([demand.rule.formula for demand in demands])
        nodes = sum(_weight(node) for demand in demands for node in _nodes(demand.rule.formula))
        if len(lags) > MAX_LAGS or nodes * len(lags) > MAX_NODES:
            return Answer(True, math.inf, -math.inf, {})
        best, closed, history = -math.inf, -math.inf, {}
        boxes: list[tuple[float, int, Box]] = [(-math.inf, 0, {})]  # the most promising first
        for number in range(1, MAX_BOXES):
            box = heapq.heappop(boxes)[2]
            bound, solved = self._solve(demands, box, lags, exact, step)
            halves: list[Box] = []
            if solved is not None:
                met = [d.met_by(truth(d.rule.formula, solved.truths, lags, step)) for d in demands]
                if (found := float(min(met))) > best:
                    best, history = found, solved.truths
                halves = solved.halves(box)
            if best >= least or (bound >= least and not halves):
                return Answer(True, max(bound, closed, -boxes[0][0] if boxes else bound), best, history)
            for i, half in enumerate(halves):
                heapq.heappush(boxes, (-bound, 2 * number + i, half))
            if not halves:
                closed = max(closed, bound)
            proven = max(closed, -boxes[0][0] if boxes else -math.inf)
            if not boxes or (proven < least and proven - best < close):
                return Answer(False, proven, best, history)
        proven = max(closed, -boxes[0][0])
        return Answer(proven >= least, proven, best, history)

    def _solve(
        self, demands: Sequence[Demand], box: Box, lags: Sequence[int], exact: bool, step: float
    ) -> tuple[float, Solved | None]:
        program = Program()
        curves = Curves(program, self._features, box)
        encoding = Encoding(program, curves.atom, lags, exact, step)
        t = program.column(-2, 2)
        for name in dict.fromkeys(name for demand in demands for name in variables(demand.rule.formula)):
            curves.atom(name, 0)
        for demand in demands:
            excess = encoding.bound(demand.rule.formula, demand.upper, demand.under).plus(-demand.border)
            program.require((excess if demand.under else excess.times(-1)).plus(t.times(-1)))
        bound, columns = program.maximise(t)
        return bound, None if columns is None else Solved(curves, columns)


def _nodes(formula: Formula) -> Iterator[Formula]:
    yield formula
    for child in children(formula):
        yield from _nodes(child)


def _weight(node: Formula) -> int:
    """How much a node makes a question harder; <-> and ^ are made of three others, over both bounds."""
    return 16 if isinstance(node, Connective) and node.kind in ("iff", "xor") else 1


def _steps(demands: Sequence[Demand]) -> list[float]:
    """Steps to look at: before the first `after`, and from each of them on."""
    gates = {n.step for demand in demands for n in _nodes(demand.rule.formula) if isinstance(n, After)}
    return [math.inf] if not gates else [-1.0, *sorted(gates)]


def _lags(formulas: Sequence[Formula]) -> tuple[list[int], bool]:
    """Rows to look at, and whether these are all that there are."""
    past = [node for formula in formulas for node in _nodes(formula) if isinstance(node, PAST)]
    nested = any(isinstance(inner, PAST) for node in past for c in children(node) for inner in _nodes(c))
    if nested and (span := max(map(_span, formulas))) <= SPAN:
        return list(range(int(span))), True
    ends = {1, *(2 for node in past if isinstance(node, Previously))}
    ends |= {node.rows for node in past if not isinstance(node, Previously) and node.rows is not None}
    stretches: list[tuple[int, float]] = list(itertools.pairwise([0, *sorted(ends)]))
    if any(not isinstance(node, Previously) and node.rows is None for node in past):
        stretches.append((max(ends), math.inf))
    # Under <-> and ^ both bounds of an operator count, each with a row of its own.
    both = any(isinstance(n, Connective) and n.kind in ("iff", "xor") for f in formulas for n in _nodes(f))
    each = len(past) * (2 if both else 1)
    return [start + i for start, end in stretches for i in range(int(min(each or 1, end - start)))], False


def _span(node: Formula) -> float:
    """Rows that a formula looks at."""
    below = max(map(_span, children(node)), default=1)
    match node:
        case Previously():
            return below + 1
        case Always(rows, _) | Once(rows, _) | Since(rows, _, _):
            return math.inf if rows is None else below + rows - 1
        case _:
            return below


def shared(a: Rule, b: Rule, features: Features) -> bool:
    """Whether two rules rest on a common feature."""
    return bool(_bases(a, features) & _bases(b, features))


def _bases(rule: Rule, features: Features) -> set[int | str]:
    names = set(variables(rule.formula))
    return {features.lines[name].feature if name in features.lines else name for name in names}
