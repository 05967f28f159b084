"""The past operators, nested, against rtamt: several hundred formulas drawn at random.

rtamt (https://github.com/nickovic/rtamt) evaluates signal temporal logic; its robustness is a minimum and
maximum over time. A bound x of an interval is the robustness x - 1/2, so that a negation swaps the
bounds. What rtamt does not have is said in its language, by signals that are `SURE` or `-SURE`:

    a row before the start counts as [0, 1]       `short_n`: fewer than n rows so far
    a row left out is [0, 1] and passed over      `bad_S`: an atom in S was left out
    after[n]                                      `early_n`: the step is below n

Conjunctions, which rtamt reads as a minimum, stand only at the leaves, as arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from test_program import NAMES, intervals, run

from moe_rules_callback.formula import (
    After,
    Always,
    Connective,
    Formula,
    Not,
    Once,
    Previously,
    Since,
    Var,
    children,
)  # fmt: skip

rtamt = pytest.importorskip("rtamt", reason="rtamt is installed up to Python 3.11")

ROWS, SURE = 24, 1e6
FORMULAS, WINDOWS = 80, (1, 2, 3, 4, 5, 7, 8, 9)
FALSE, TRUE = "(zero >= 0.5)", "(one >= 0.5)"  # robustness of the truths 0 and 1


def draw(rng: np.random.Generator, depth: int) -> Formula:
    """A formula of at most `depth` past operators over one another."""
    if depth == 0:
        a, b = (Var(str(name)) for name in rng.choice(NAMES, 2, replace=False))
        return (a, a, Not(a), Connective("and", (a, b)), Connective("or", (a, Not(b))))[rng.integers(5)]
    rows = None if rng.random() < 0.25 else int(rng.choice(WINDOWS))
    inner = draw(rng, int(rng.integers(depth)) if rng.random() < 0.2 else depth - 1)
    match rng.integers(7):
        case 0 | 1:
            return Always(rows, inner)
        case 2 | 3:
            return Once(rows, inner)
        case 4:
            other = draw(rng, int(rng.integers(depth)))
            return Since(rows, *((inner, other) if rng.random() < 0.5 else (other, inner)))
        case 5:
            return Previously(Not(inner))
        case _:
            return After(int(rng.integers(ROWS)), inner)


def atoms(formula: Formula) -> str:
    """The atoms that a formula rests on, as the end of a name."""
    names = {formula.name} if isinstance(formula, Var) else {*"".join(map(atoms, children(formula)))}
    return "".join(sorted(names))


def arithmetic(leaf: Formula, bound: int) -> str:
    """One bound of a leaf, a number between 0 and 1."""
    match leaf:
        case Var(name):
            return f"{name}{bound}"
        case Not(operand):
            return f"(1 - {arithmetic(operand, 1 - bound)})"
        case Connective("and", (a, b)):
            total = f"({arithmetic(a, bound)} + {arithmetic(b, bound)} - 1)"
            return f"(({total} + abs({total})) / 2)"
        case Connective("or", (a, b)):
            return f"(1 - {arithmetic(Connective('and', (Not(a), Not(b))), 1 - bound)})"
    raise AssertionError(leaf)


def spec(formula: Formula, bound: int) -> str:
    """What rtamt is to evaluate for one bound of a formula."""

    def unless(certain: str, told: str) -> str:
        """`told`, but [0, 1] where `certain`."""
        return f"(({told}) or ({certain}))" if bound else f"(({told}) and (not ({certain})))"

    def inside(told: str) -> str:
        """Within [0, 1], where rtamt has infinity for no rows."""
        return f"((({told}) and {TRUE}) or {FALSE})"

    gap = f"(bad_{atoms(formula)} >= 0)"
    match formula:
        case Always(rows, operand):
            past = f"historically{window(rows)}({spec(operand, bound)} or {gap})"
            told = past if bound else unless(short(rows), past)
        case Once(rows, operand):
            past = f"once{window(rows)}({spec(operand, bound)} and not {gap})"
            told = unless(short(rows), past) if bound else past
        case Since(rows, left, right):
            held = f"({spec(left, bound)} or {gap})"
            past = f"({held} since{window(rows)} ({spec(right, bound)} and not {gap}))"
            # Before the start `right` may have held, then `left` decides.
            told = f"({past} or ({short(rows)} and historically({held})))" if bound else past
        case Previously(operand):
            latest = f"({gap} since ({spec(operand, bound)} and not {gap}))"
            told = unless(f"not (once(s_prev(not {gap})))", f"s_prev {latest}")
        case After(step, operand):
            return inside(unless(f"early_{step} >= 0", spec(operand, bound)))
        case Not(operand) if not leaf(formula):
            return f"(not {spec(operand, 1 - bound)})"
        case _:
            told = f"{arithmetic(formula, bound)} >= 0.5"
    return inside(unless(gap, told))


def window(rows: int | None) -> str:
    return "" if rows is None else f"[0:{rows - 1}]"


def short(rows: int | None) -> str:
    return f"(short_{rows or 0} >= 0)"


def leaf(formula: Formula) -> bool:
    return isinstance(formula, Var | Not | Connective) and all(map(leaf, children(formula)))


def subsets() -> Iterator[str]:
    for chosen in range(1, 2 ** len(NAMES)):
        yield "".join(name for i, name in enumerate(NAMES) if chosen >> i & 1)


def signals(rows: np.ndarray, bad: np.ndarray) -> dict[str, list[float]]:
    """The signals that `spec` names, by name; rows [T, atoms, 2], bad [T, atoms]."""
    t = np.arange(len(rows))
    flags = {f"bad_{each}": bad[:, [name in each for name in NAMES]].any(axis=1) for each in subsets()}
    flags |= {f"short_{n}": t < n - 1 for n in (0, *WINDOWS)}
    flags |= {f"early_{n}": t < n for n in range(ROWS)}
    values = {f"{name}{bound}": rows[:, i, bound] for i, name in enumerate(NAMES) for bound in (0, 1)}
    values |= {name: np.where(flag, SURE, -SURE) for name, flag in flags.items()}
    values |= {"zero": np.zeros(len(rows)), "one": np.ones(len(rows))}
    return {name: series.tolist() for name, series in values.items()}


def oracle(text: str, given: dict[str, list[float]]) -> list[float]:
    """The truth [T] that rtamt finds."""
    specification: Any = rtamt.StlDiscreteTimeOfflineSpecification()
    for name in given:
        specification.declare_var(name, "float")
    specification.spec = text
    specification.parse()
    times = list(range(ROWS))
    return [value + 0.5 for _, value in specification.evaluate({"time": times, **given})]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("gaps", [False, True], ids=["every row", "rows left out"])
def test_formulas_drawn_at_random(seed: int, gaps: bool) -> None:
    rng = np.random.default_rng(seed)
    formulas = [draw(rng, int(rng.integers(1, 4))) for _ in range(FORMULAS)]
    rows = intervals((ROWS, len(NAMES), 1), seed)
    bad = rng.random((ROWS, len(NAMES), 1)) < (0.15 if gaps else 0.0)
    got, given = run(formulas, rows, bad), signals(rows[:, :, 0], bad[:, :, 0])
    for i, formula in enumerate(formulas):
        expected = np.transpose([oracle(spec(formula, bound), given) for bound in (0, 1)])
        np.testing.assert_allclose(got[:, i, 0], expected, rtol=0, atol=1e-6, err_msg=str(formula))
