"""One rule on given truth intervals, for trying it out.

    interval, state = evaluate("0.85 :: a & ~b", {"a": (0.9, 0.95), "b": (0.2, 0.3)})

gives the interval [.6, .75] to float32 precision, and State.UNKNOWN.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from . import logic
from .errors import MetricsError, UnknownNameError, closest
from .formula import Rule
from .language import parse_rule
from .program import Program
from .records import State


class Interval(NamedTuple):
    """Bounds on a truth value."""

    lower: float
    upper: float


class Evaluation(NamedTuple):
    """What a rule says: its truth interval, and the state that its threshold makes of it."""

    interval: Interval
    state: State


def evaluate(rule: str | Rule, truth: Mapping[str, Any]) -> Evaluation:
    """Evaluate a rule at the first row of a run.

    Args:
        rule: text such as "0.85 :: a & ~b", or a `Rule`.
        truth: for each predicate its interval: a pair (lower, upper), one number for both, an array of
            either, or an object that holds one as `.value` or `.output`. lower > upper is a
            contradiction and is allowed.

    Raises:
        RuleSyntaxError: the text cannot be read.
        UnknownNameError: a predicate of the rule has no interval.
        MetricsError: an interval is not one or two numbers in 0..1.
    """
    rule = rule if isinstance(rule, Rule) else parse_rule(rule)
    program = Program([rule.formula])
    for name in program.atoms:
        if name not in truth:
            raise UnknownNameError(
                f"the rule uses '{name}', for which no interval was given.{closest(name, truth)} "
                f"Pass one for each of: {', '.join(program.atoms)}."
            )
    atoms = jnp.array([[_interval(name, truth[name])] for name in program.atoms], jnp.float32)
    bad = jnp.zeros(atoms.shape[:2], bool)
    _, result = program.update(program.init(1), atoms, bad, jnp.int32(0), jnp.int32(0))
    state = logic.classify(result[0, 0], rule.threshold)
    lower, upper = np.asarray(result[0, 0]).tolist()
    return Evaluation(Interval(lower, upper), State(int(state)))


def _interval(name: str, given: Any) -> np.ndarray:
    for attribute in ("output", "value"):
        given = getattr(given, attribute, given)
    try:
        values = np.broadcast_to(np.asarray(given, np.float32).ravel(), 2)
    except (TypeError, ValueError):
        values = np.full(2, np.nan, np.float32)
    if not ((values >= 0) & (values <= 1)).all():
        raise MetricsError(
            f"the truth of '{name}' is {given!r}; expected (lower, upper) with both in 0..1, or one number."
        )
    return values
