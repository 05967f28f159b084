"""What a signal is, by where it comes from; see `signals`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax

from .statistics import NEED_K, NEED_LOGITS

Ramp = tuple[float, float]  # offset, scale: truth .5 at the offset, certain half a scale away
Ramps = Callable[[int, int], Mapping[str, Ramp]]  # of (E, k): ramps for "high" and "low"
Noise = Callable[[jax.Array, jax.Array, int, int], jax.Array]  # (value, tokens, E, k) -> standard error


@dataclass(frozen=True)
class Signal:
    """A named scalar of a step.

    Attributes:
        compute: the metrics of the step -> scalar.
        needs: the metrics that it reads; "*" for all.
        long_name, units: for histories and plots.
        ramps: where `high_` and `low_` turn, by (E, k); None: judged by its own rolling history.
        noise: standard error of the value because it is measured on so many tokens; None: not known.
    """

    compute: Callable[..., jax.Array]
    needs: tuple[str, ...]
    long_name: str = ""
    units: str = "1"
    ramps: Ramps | None = None
    noise: Noise | None = None

    def missing(self, metrics: frozenset[str], k_known: bool) -> str:
        """What to pass so that the signal can be computed, or "" when it can."""
        return ", ".join(f"'{need}'" for need in self.needs if need not in metrics | {"*"})


@dataclass(frozen=True)
class RouterSignal(Signal):
    """A signal of each layer: `compute` is given `Statistics`, and gives float32 [layers + 1], the pooled
    value last; `needs` names the statistics."""

    def missing(self, metrics: frozenset[str], k_known: bool) -> str:
        if not metrics & {"router_probs", "router_logits"}:
            return "'router_probs' (or 'router_logits')"
        if NEED_LOGITS & set(self.needs) and "router_logits" not in metrics:
            return "'router_logits'"
        if NEED_K & set(self.needs) and not k_known:
            return "'expert_index' or top_k="
        return ""


@dataclass(frozen=True)
class WindowSignal(Signal):
    """What the last `rows` of one other signal say, the current row included: `compute` is one of `trends`,
    `needs` holds that signal's name."""

    rows: int = 32


@dataclass(frozen=True)
class RecordedSignal(Signal):
    """A signal of each layer that was computed before: `compute` gives float32 [layers + 1]."""


def unit_ramps(high: float, low: float, scale: float = 1.0) -> Ramps:
    """The same ramps whatever E and k are."""
    return lambda experts, k: {"high": (high, scale), "low": (low, scale)}
