"""How a predicate reads the signals that a history holds: over a ramp, or over a window of rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..judges import looks_back, ramp_of
from ..predicates import SLOPE, Predicate
from ..signals import Signal, WindowSignal, scalar, shipped

Range = tuple[float, float]
ANY: Range = (-math.inf, math.inf)
SHARES = (
    "router_entropy", "routing_margin", "router_mutual_information", "load_cv_normalised", "expert_imbalance",
    "dead_expert_fraction", "load_gini", "expert_coactivation", "router_gradient_share",
    "expert_gradient_min_share",
)  # fmt: skip
NORMS = ("router_logit_rms", "router_z_loss", "weight_norm", "gradient_norm")
# Where a signal lies by its definition, for E experts of which a token uses k.
RANGES: dict[str, Callable[[int, int], Range]] = {
    **dict.fromkeys(SHARES, lambda experts, k: (0.0, 1.0)),
    **dict.fromkeys(NORMS, lambda experts, k: (0.0, math.inf)),
    "routing_confidence": lambda experts, k: (1 / experts, 1.0),
    "boundary_margin": lambda experts, k: (-1.0, 1.0),
    "load_cv": lambda experts, k: (0.0, math.sqrt(experts / k - 1)),
    "max_violation": lambda experts, k: (0.0, experts / k - 1),
    "effective_experts": lambda experts, k: (1.0, float(experts)),
    "load_balancing_loss": lambda experts, k: (0.0, float(experts)),
    "expert_weight_cosine": lambda experts, k: (-1.0, 1.0),
}


@dataclass(frozen=True)
class Ramp:
    """How a predicate judges a signal in one layer: truth is 1/2 at `offset`, and turns over `scale`."""

    offset: float
    scale: float
    margin: float


def judged(predicate: Predicate) -> tuple[str, Signal]:
    """The recorded signal that a predicate rests on, and what the predicate reads itself."""
    signal = shipped().get(predicate.signal)
    if isinstance(signal, WindowSignal):
        return signal.needs[0], signal
    return predicate.signal, scalar(predicate.signal)


def ramp(predicate: Predicate, size: tuple[int, int | None]) -> Ramp | None:
    """The ramp over the signal itself, for (E, k); None: a window of it is judged."""
    _, signal = judged(predicate)
    if isinstance(signal, WindowSignal) or looks_back(predicate, signal) is not None:
        return None
    slope, offset, margin = ramp_of(predicate, signal, size[0], size[1] or 1)
    return Ramp(offset, SLOPE / abs(slope), margin)


def rows_back(predicate: Predicate) -> int:
    """Rows that a predicate looks at, the current one included."""
    _, signal = judged(predicate)
    look = looks_back(predicate, signal)
    own = signal.rows if isinstance(signal, WindowSignal) else 1
    return own if look is None else look[1] + own - 1


def range_of(signal: str, size: tuple[int, int | None]) -> Range:
    """The least and the greatest value of a signal, for (E, k)."""
    experts, k = size
    return RANGES[signal](experts, k or 1) if signal in RANGES else ANY
