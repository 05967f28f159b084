"""Units of logged values, told from the values themselves, or asked for.

    to_signal("router_entropy", values, experts=6)      ->  (values / ln 6, "nats", why)

An entropy may be logged in nats, in bits or as a share of its maximum; an accuracy as a share or in per
cent. What cannot be told is an error that asks.
"""

from __future__ import annotations

import math

import numpy as np

from ..errors import LogError

ENTROPIES = {"router_entropy"}
SHARES = {
    "routing_accuracy", "routing_confidence", "routing_margin", "router_mutual_information",
    "expert_imbalance", "dead_expert_fraction", "dropped_token_fraction", "load_gini", "expert_coactivation",
    "router_gradient_share", "expert_gradient_min_share", "load_cv_normalised",
}  # fmt: skip
UNITS = {"entropy": ("nats", "bits", "share"), "share": ("share", "percent")}
TOLERANCE = 1.001  # of rounded values


def units_of(signal: str) -> tuple[str, ...]:
    """The units that may be named for a signal; none where only one makes sense."""
    if signal in ENTROPIES:
        return UNITS["entropy"]
    return UNITS["share"] if signal in SHARES else ()


def to_signal(
    signal: str, values: np.ndarray, unit: str = "", *, experts: int | None = None, name: str = ""
) -> tuple[np.ndarray, str, str]:
    """Values in the unit of a signal, the unit they were in, and how that is known.

    Args:
        values: float64 [n].
        unit: one of `units_of(signal)`; "" to tell it from the values.
        experts: E, or None if it is not known.
        name: of the signal in the log; may name the unit.

    Raises:
        LogError: the unit cannot be told; the message begins with what is known of the values.
    """
    finite = values[np.isfinite(values)]
    low, top = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    span = f"{low:.4g} .. {top:.4g}"
    if signal in ENTROPIES:
        return _entropy(values, unit, experts, name.lower(), low, top, span)
    if signal not in SHARES:
        return values, "", ""
    why = "as told" if unit else f"values {span}"
    if not unit and ("percent" in name.lower() or "pct" in name.lower() or name.endswith("%")):
        unit, why = "percent", "by its name"
    if not unit:
        if low < 0 or top > 100 * TOLERANCE:
            raise LogError(f"has values {span}, which are neither shares nor per cent")
        unit = "share" if top <= TOLERANCE else "percent"
    return (values / 100 if unit == "percent" else values), unit, why


def _entropy(
    values: np.ndarray, unit: str, experts: int | None, name: str, low: float, top: float, span: str
) -> tuple[np.ndarray, str, str]:
    largest = math.log(experts) if experts and experts > 1 else math.inf
    why = "as told"
    if not unit:
        unit, why = _entropy_unit(name, top, largest, experts, span)
    if low < 0:
        raise LogError(f"has values {span}; an entropy is not negative")
    if unit == "share":
        return values, unit, why
    if largest == math.inf:
        raise LogError(
            f"is in {unit} ({span}) and is to be divided by its maximum: how many --experts are there?"
        )
    scale = largest if unit == "nats" else largest / math.log(2)
    if top > scale * TOLERANCE:
        raise LogError(
            f"has values {span}, above the largest entropy of {experts} experts, {scale:.3f} {unit}"
        )
    return values / scale, unit, why


def _entropy_unit(name: str, top: float, largest: float, experts: int | None, span: str) -> tuple[str, str]:
    """The unit of an entropy, and how it is known."""
    for word, unit in (("normali", "share"), ("bits", "bits"), ("nats", "nats")):
        if word in name:
            return unit, "by its name"
    if name == "router_entropy" and top <= TOLERANCE:
        return "share", "the signal's own name"
    if largest == math.inf and top > TOLERANCE:
        raise LogError(
            f"has values {span} and is not normalised: how many --experts are there? In nats or bits?"
        )
    if top > largest * TOLERANCE:
        return "bits", f"up to {top:.3f}, above ln {experts} = {largest:.3f}"
    if top > TOLERANCE:
        return "nats", f"up to {top:.3f}, at most ln {experts} = {largest:.3f}"
    raise LogError(f"has values {span}: nats, bits, or already a share of the maximum?")
