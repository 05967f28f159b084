"""Obvious NumPy twins of everything numeric: float64, loops, one token and one row after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe_rules_callback.formula import After, Always, Connective, Formula, Not, Once  # isort: skip
from moe_rules_callback.formula import Previously, Since, Var, variables  # isort: skip

Interval = tuple[float, float]
Row = Mapping[str, Interval | None]  # None: the metric under the predicate was not finite
UNKNOWN: Interval = (0.0, 1.0)


# Logic: Riegel et al. 2020 with beta = 1, each bound by itself.


def clamp(x: float) -> float:
    return min(1.0, max(0.0, x))


def negation(a: Interval) -> Interval:
    return 1 - a[1], 1 - a[0]


def conjunction(*operands: Interval, weights: Sequence[float] | None = None) -> Interval:
    w = weights or [1.0] * len(operands)
    pairs = list(zip(w, operands, strict=True))
    lower, upper = (clamp(1 - sum(wi * (1 - x[i]) for wi, x in pairs)) for i in (0, 1))
    return lower, upper


def disjunction(*operands: Interval, weights: Sequence[float] | None = None) -> Interval:
    w = weights or [1.0] * len(operands)
    pairs = list(zip(w, operands, strict=True))
    lower, upper = (clamp(sum(wi * x[i] for wi, x in pairs)) for i in (0, 1))
    return lower, upper


def negated_conjunction(*operands: Interval, weights: Sequence[float] | None = None) -> Interval:
    return negation(conjunction(*operands, weights=weights))


def negated_disjunction(*operands: Interval, weights: Sequence[float] | None = None) -> Interval:
    return negation(disjunction(*operands, weights=weights))


def implication(a: Interval, b: Interval, weight: float = 1.0) -> Interval:
    return disjunction(negation(a), b, weights=[1.0, weight])


def equivalence(a: Interval, b: Interval) -> Interval:
    return conjunction(implication(a, b), implication(b, a))


def exclusive_disjunction(a: Interval, b: Interval) -> Interval:
    return conjunction(disjunction(a, b), negation(conjunction(a, b)))


CONNECTIVES = {
    "and": conjunction, "or": disjunction, "nand": negated_conjunction, "nor": negated_disjunction,
    "implies": implication, "iff": equivalence, "xor": exclusive_disjunction,
}  # fmt: skip


def connect(kind: str, operands: Sequence[Interval], weights: Sequence[float]) -> Interval:
    if kind == "implies":
        return implication(*operands, weight=weights[1])
    if kind in ("iff", "xor"):
        return CONNECTIVES[kind](*operands)
    return CONNECTIVES[kind](*operands, weights=weights)


def classify(truth: Interval, threshold: float) -> int:
    lower, upper, alpha = (np.float32(x) for x in (*truth, threshold))
    if lower > upper:
        return 3
    if lower >= alpha:
        return 1
    return 0 if np.float32(1) - upper >= alpha else 2


# Time: the truth of a formula at row t, from all rows so far, by looking at each row of each window.


def truth(formula: Formula, rows: Sequence[Row], steps: Sequence[int] | None = None) -> list[Interval]:
    """Truth at every row. A row in which a predicate of a formula is None is no row for that formula."""
    steps = range(len(rows)) if steps is None else steps

    def bad(node: Formula, t: int) -> bool:
        return any(rows[t][name] is None for name in variables(node))

    def window(node: Formula, n: int | None, t: int) -> list[int]:
        """Rows that count at row t, oldest first; negative: before the start."""
        first = 0 if n is None else t - n + 1
        return [s for s in range(first, t + 1) if s < 0 or not bad(node, s)]

    known: dict[tuple[Formula, int], Interval] = {}

    def at(node: Formula, t: int) -> Interval:
        if t < 0:
            return UNKNOWN
        if (node, t) not in known:
            known[node, t] = UNKNOWN if bad(node, t) else compute(node, t)
        return known[node, t]

    def compute(node: Formula, t: int) -> Interval:
        match node:
            case Var(name):
                value = rows[t][name]
                assert value is not None
                return value
            case Not(a):
                return negation(at(a, t))
            case Connective(kind, operands, weights):
                return connect(kind, [at(x, t) for x in operands], weights)
            case Always(n, a):
                values = [at(a, s) for s in window(node, n, t)]
                return min(v[0] for v in values), min(v[1] for v in values)
            case Once(n, a):
                values = [at(a, s) for s in window(node, n, t)]
                return max(v[0] for v in values), max(v[1] for v in values)
            case Since(n, left, right):
                seen = window(node, n, t)
                lower, upper = (
                    max(
                        min([at(right, s)[i], *(at(left, later)[i] for later in seen[place + 1 :])])
                        for place, s in enumerate(seen)
                    )
                    for i in (0, 1)
                )
                return lower, upper
            case Previously(a):
                before = [s for s in range(t) if not bad(a, s)]
                return at(a, before[-1]) if before else UNKNOWN
            case After(step, a):
                return UNKNOWN if steps[t] < step else at(a, t)

    return [at(formula, t) for t in range(len(rows))]


# Predicates.


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def ramp(x: float, offset: float, slope: float = 12.0, margin: float = 0.05) -> Interval:
    """The tutorial's fuzzy ramp, rising with x."""
    return sigmoid(slope * (x - (offset + margin))), sigmoid(slope * (x - (offset - margin)))


# Signals of one router layer.


def entropy(p: np.ndarray) -> float:
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def gini(q: np.ndarray) -> float:
    """Mean absolute difference over twice the mean."""
    return sum(abs(a - b) for a in q for b in q) / (2 * len(q) ** 2 * q.mean())


def top(p: np.ndarray, k: int) -> list[int]:
    """The k largest, the first of equals first."""
    return sorted(range(len(p)), key=lambda e: (-p[e], e))[:k]


def router_signals(affinity: Any, k: int, index: Any = None, mask: Any = None) -> dict[str, Any]:
    """Every signal of diagnostics.md that probabilities [T, E] and indices [T, k] give."""
    affinity = np.asarray(affinity, np.float64)
    tokens = [t for t in range(len(affinity)) if mask is None or mask[t]]
    p = [affinity[t] / affinity[t].sum() for t in tokens]
    used = [top(x, k) for x in p] if index is None else [[int(e) for e in index[t]] for t in tokens]
    n, experts = len(p), affinity.shape[1]
    q, first, together = np.zeros(experts), np.zeros(experts), np.zeros((experts, experts))
    margins, boundaries = [], []
    for x, chosen in zip(p, used, strict=True):
        first[top(x, 1)[0]] += 1 / n
        for e in chosen:
            q[e] += 1 / (n * k)
            for other in chosen:
                together[e, other] += 1
        ordered = sorted(x, reverse=True)
        margins.append(ordered[0] - (ordered[1] if experts > 1 else 0))
        left = [x[e] for e in range(experts) if e not in chosen]
        boundaries.append(min(x[e] for e in chosen) - max(left) if left else 0)
    mean_p, mean_h = np.mean(p, axis=0), np.mean([entropy(x) for x in p])
    log_e = math.log(experts) if experts > 1 else math.nan
    cv, worst = q.std() / q.mean(), math.sqrt(experts / k - 1)
    alive = q[q >= 0.1 / experts]
    worst_alive = math.sqrt(max(len(alive) / k - 1, 0))
    pairs = [
        together[i, j] / together[i, i]
        for i in range(experts) for j in range(experts) if i != j and together[i, i]
    ]  # fmt: skip
    return {
        "router_entropy": mean_h / log_e,
        "routing_confidence": np.mean([x.max() for x in p]),
        "routing_margin": np.mean(margins),
        "boundary_margin": np.mean(boundaries),
        "router_mutual_information": (entropy(mean_p) - mean_h) / log_e,
        "load_cv": cv,
        "load_cv_normalised": cv / worst if worst else 0.0,
        "load_cv_living": alive.std() / alive.mean() / worst_alive if worst_alive else 0.0,
        "expert_imbalance": first.std() / (math.sqrt(experts - 1) / experts) if experts > 1 else 0.0,
        "max_violation": q.max() / q.mean() - 1,
        "effective_experts": math.exp(entropy(q)),
        "dead_expert_fraction": np.mean(q < 0.1 / experts),
        "load_gini": gini(q),
        "load_balancing_loss": experts * sum(q * mean_p),
        "expert_coactivation": max(pairs, default=0.0),
        "router_tokens": len(p),
    }


def logit_signals(logits: Any) -> dict[str, Any]:
    logits = np.asarray(logits, np.float64)
    z = [math.log(sum(math.exp(x) for x in row)) for row in logits]
    return {"router_logit_rms": math.sqrt((logits**2).mean()), "router_z_loss": np.mean(np.square(z))}


# Trends of one series, oldest value first.


def rising(y: Any) -> float:
    """Phi of the least-squares slope over its standard error, beyond 2 of them.

    The error is larger by (1 + r) / (1 - r) in its square, r the lag-1 autocorrelation of the residuals.
    """
    y = np.asarray(y, np.float64)
    x = np.arange(len(y))[np.isfinite(y)]
    y = y[np.isfinite(y)]
    design = np.stack([np.ones(len(x)), x], axis=1)
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    left = dict(zip(x.tolist(), (y - design @ solution).tolist(), strict=True))
    squares = sum(e**2 for e in left.values())
    r = sum(e * left.get(i - 1, 0.0) for i, e in left.items()) / squares
    r = min(max(r, 0.0), 0.95)
    variance = squares / (len(y) - 2) * (1 + r) / (1 - r)
    z = solution[1] / math.sqrt(variance * np.linalg.inv(design.T @ design)[1, 1])
    beyond = math.copysign(max(abs(z) - 2, 0), z)
    return 0.5 * (1 + math.erf(beyond / math.sqrt(2)))


def steadiness(y: Any) -> float:
    """1 - 10 |relative change of the fitted line over the window|."""
    y = np.asarray(y, np.float64)
    slope = np.polyfit(np.arange(len(y))[np.isfinite(y)], y[np.isfinite(y)], 1)[0]
    return max(0.0, 1 - 10 * abs(slope * (len(y) - 1) / np.nanmean(y)))
