"""Predicates: a signal through a fuzzy ramp into a truth interval.

    high_X    x = value           low_X          falls with the value
    increasing_X                  decreasing_X   x = confidence in 0..1 that X rises (falls), see `trends`
    stable_X                      x = 1 - 10 |relative change over the window|

    L = sigmoid(slope (x - (offset + margin)))     U = sigmoid(slope (x - (offset - margin)))

which is the ramp of the JLNN tutorial with slope 12 and margin .05 on x in 0..1. For signals of another
range the shipped ramps scale both, so that truth always turns over the same part of the range.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from .errors import UnknownNameError, closest
from .signals import Signal

Sense = Literal["high", "low", "increasing", "decreasing", "stable"]
SENSES: tuple[Sense, ...] = get_args(Sense)
SLOPE, MARGIN, WINDOW = 12.0, 0.05, 32


@dataclass(frozen=True)
class Predicate:
    """A signal and the ramp that judges it.

    Attributes:
        signal: name of the signal.
        sense: what about it is judged.
        offset: where truth is one half: for high and low a value of the signal in its own units, for
            the others a degree in 0..1. None: the shipped ramp of the signal; a signal without one is
            judged high (low) when it is 3 standard deviations above (below) the mean of its last rows.
        slope: steepness, per unit of the signal.
        margin: half the width of the interval, in units of the signal.
        window: rows that trends, and signals without a shipped ramp, look back.
        sampling: standard errors by which the margin is widened, of the noise that a signal has because it
            is measured on so many tokens; few tokens then make a wide interval. Applies where the noise of
            the signal and the number of tokens are known.
    """

    signal: str
    sense: Sense
    offset: float | None = None
    slope: float = SLOPE
    margin: float = MARGIN
    window: int = WINDOW
    sampling: float = 0.0


ALIASES = {"activation_entropy": "router_entropy", "weight_magnitude": "weight_norm"}

# The JLNN tutorial's predicates with its offsets; its low_X is 1 - X above the offset.
TUTORIAL = {
    "high_routing_confidence": Predicate("routing_confidence", "high", 0.35),
    "low_activation_entropy": Predicate("router_entropy", "low", 1 - 0.4),
    "high_expert_imbalance": Predicate("expert_imbalance", "high", 0.2),
    "low_expert_imbalance": Predicate("expert_imbalance", "low", 1 - 0.5),
    "increasing_weight_magnitude": Predicate("weight_norm", "increasing", 0.5),
    "stable_loss": Predicate("loss", "stable", 0.5),
    "decreasing_loss": Predicate("loss", "decreasing", 0.4),
}


def is_measured(name: str, own: Mapping[str, Predicate]) -> bool:
    """Whether a name in a rule can only be that of a predicate; any other may be concluded."""
    return name in own or name in TUTORIAL or name.partition("_")[0] in SENSES


def resolve(name: str, own: Mapping[str, Predicate], signals: Mapping[str, Signal]) -> Predicate:
    """The predicate that a rule means by `name`.

    Args:
        name: as it stands in the rule.
        own: predicates of rule files and plugins; they win.
        signals: all that are known: shipped, of plugins, and scalars of the step.

    Raises:
        UnknownNameError: nobody defines it; the closest names are given.
    """
    if (found := own.get(name, TUTORIAL.get(name))) is not None:
        return found
    sense, _, rest = name.partition("_")
    signal = rest if rest in signals else ALIASES.get(rest, rest)
    if sense in SENSES and signal in signals:
        return Predicate(signal, sense)
    known = {*own, *TUTORIAL, *(f"{sense}_{s}" for sense in SENSES for s in (*signals, *ALIASES))}
    if sense in SENSES:
        advice = f"'{rest}' is neither a shipped signal nor a scalar that this step passes"
    else:
        advice = f"a predicate is one of {', '.join(f'{s}_X' for s in SENSES)} for a signal X"
    concluded = "" if is_measured(name, own) else f", or conclude it by a rule, evidence -> {name}"
    raise UnknownNameError(
        f"no predicate is called '{name}': {advice}.{closest(name, known)} Define it under "
        f"[predicates.{name}] in a rule file, or pass the scalar in the metrics of every step{concluded}."
    )
