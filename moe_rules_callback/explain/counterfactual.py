"""What would have made a rule say something else: one signal of one row, changed as little as possible.

    moment = Moment(history, rules, layer=0)       the audit of a history, stopped before its last row
    changes(moment, 3, names, False)               for each signal its smallest change, least first

Nothing is inverted: candidates go through the audit itself, with all that it remembers of former rows,
and each change that is reported was evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ..predicates import Predicate
from ..records import State
from .moment import BATCH, Moment
from .readings import judged, ramp, range_of, rows_back

ROUNDS = 4  # of candidates that close in: 64^4 places are all that float32 can tell apart
BEYOND = 1.5  # scales past its offset a ramp is 0 or 1 in float32
DEVIATIONS = 6.0  # the scale of a signal without a ramp of its own: what `judges` takes for it
WIDE = 10.0  # scales in which it is searched


@dataclass(frozen=True)
class Change:
    """Other values of one signal in one row, and what the rule says of them.

    Attributes:
        signal: its name.
        layers: those in which it changes; all of them together. Empty for a signal of the whole model.
        before, after: its values there, one for each layer.
        size: the largest change in scales of the signal's ramp, over which truth goes from 0 to 1; of a
            signal that is judged by its own past in 6 standard deviations of it.
        state, truth: of the rule after the change.
    """

    signal: str
    layers: tuple[str, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    size: float
    state: State
    truth: tuple[float, float]


def changes(moment: Moment, rule: int, names: Iterable[str], concludes: bool) -> list[Change]:
    """For each signal of a rule the smallest change that gives the rule another state.

    The search goes outwards in steps of 1/64 of its reach and then closes in. For ramps over the signal
    itself truth is monotone and nothing is passed over; what a window makes of its newest row need not be,
    nor what axioms on both sides make of one signal.

    Args:
        moment: the audit, stopped before the row.
        rule: number of the rule.
        names: of the predicates that it rests on.
        concludes: whether conclusions are among what it rests on: only they can contradict each other.

    Returns:
        The least first. A signal is absent if no value that was tried is enough.
    """
    reads: dict[str, list[Predicate]] = {}
    for name in names:
        predicate = moment.rules.predicates[name]
        reads.setdefault(judged(predicate)[0], []).append(predicate)
    searches = [_Search(moment, rule, signal, predicates) for signal, predicates in reads.items()]
    found = [search.least(concludes) for search in searches]
    return sorted(filter(None, found), key=lambda change: change.size)


def _targets(now: State, risk: bool, concludes: bool) -> Iterator[tuple[set[State], bool]]:
    """States of a layer that would change the headline, and whether all layers must have one of them."""
    match now:
        case State.TRUE:
            yield {State.FALSE, State.UNKNOWN}, risk
        case State.FALSE:
            yield {State.TRUE, State.UNKNOWN}, not risk
        case State.UNKNOWN:
            yield {State.TRUE}, not risk
            yield {State.FALSE}, risk
        case State.CONTRADICTORY:
            yield {State.TRUE, State.FALSE, State.UNKNOWN}, True
    if concludes and now != State.CONTRADICTORY:
        # It may be hidden by what another layer says, so each change is judged by its headline.
        yield {State.CONTRADICTORY}, False


class _Search:
    """Over the values of one signal: V of them, one for each layer or one for the model."""

    def __init__(self, moment: Moment, rule: int, signal: str, predicates: list[Predicate]) -> None:
        self._moment, self._rule, self._signal = moment, rule, signal
        values = moment.value(signal)
        self._before = values if moment.layered(signal) else values[:1]
        width = len(self._before)
        ramps = [(i, ramp(p, size)) for p in predicates for i, size in enumerate(moment.sizes[:width])]
        self._scale, self._reach = np.full(width, np.inf), np.zeros(width)
        for i, over in ramps:
            if over is not None:
                far = abs(self._before[i] - over.offset) + over.margin + BEYOND * over.scale
                self._scale[i], self._reach[i] = min(self._scale[i], over.scale), max(self._reach[i], far)
        if backward := [p for p in predicates if ramp(p, moment.sizes[0]) is None]:
            noise = DEVIATIONS * self._deviation(max(map(rows_back, backward)))
            self._scale = np.where(np.isfinite(self._scale), self._scale, noise)
            self._reach = np.maximum(self._reach, WIDE * noise)
        self._range = np.array([range_of(signal, size) for size in moment.sizes[:width]]).T

    def least(self, concludes: bool) -> Change | None:
        """The smallest change, if any is enough."""
        now, _ = self._moment.verdict(self._rule, self._moment.now[self._rule])
        risk = self._moment.rules.rules[self._rule].kind == "risk"
        found = [self._change(now, *target) for target in _targets(now, risk, concludes)]
        return min(filter(None, found), key=lambda change: change.size, default=None)

    def _change(self, now: State, wanted: set[State], everywhere: bool) -> Change | None:
        """The smallest change to a wanted state."""
        after = self._nearest(wanted, everywhere)
        size = np.abs(after.astype(float) - self._before) / self._scale
        layered = self._moment.layered(self._signal)
        if layered and everywhere:
            picked = np.flatnonzero(~self._met(self._before[None], wanted, everywhere)[0])
        else:
            picked = size.argsort()[:1]  # NaN comes last
        if not len(picked) or not np.isfinite(size[picked]).all():
            return None
        values = self._before.copy()
        values[picked] = after[picked]
        truth = self._moment.supposing(self._rule, self._signal, self._spread(values[None]))[0]
        state, whole = self._moment.verdict(self._rule, truth)
        if state == now:
            return None
        return Change(
            self._signal,
            tuple(self._moment.layers[i] for i in picked) if layered else (),
            tuple(self._before[picked].tolist()),
            tuple(after[picked].tolist()),
            float(size[picked].max()),
            state,
            whole,
        )

    def _nearest(self, wanted: set[State], everywhere: bool) -> np.ndarray:
        """float32 [V]: the values nearest to those of the row that are enough, NaN where none is."""
        best, columns = np.full_like(self._before, np.nan), np.arange(len(self._before))
        for sign in (1, -1):
            near, far = self._before.astype(float), np.clip(self._before + sign * self._reach, *self._range)
            for _ in range(ROUNDS):
                part = np.linspace(0, 1, BATCH + 1)[:, None]
                points = (near + (far - near) * part).astype(np.float32)
                met = self._met(points[1:], wanted, everywhere)
                first = met.argmax(0)
                near, far = points[first, columns], np.where(met.any(0), points[first + 1, columns], np.nan)
            nearer = ~(np.abs(far - self._before) >= np.abs(best - self._before))
            best = np.where(nearer & np.isfinite(far), far, best)
        return best.astype(np.float32)

    def _met(self, values: np.ndarray, wanted: set[State], everywhere: bool) -> np.ndarray:
        """bool [n, V]: whether values [n, V] give a wanted state, in each layer or in the model."""
        truth = self._moment.supposing(self._rule, self._signal, self._spread(values))
        met = np.asarray(np.isin(self._moment.states(self._rule, truth), list(wanted)))
        if self._moment.layered(self._signal):
            return met
        return np.asarray((met.all if everywhere else met.any)(axis=1, keepdims=True))

    def _spread(self, values: np.ndarray) -> np.ndarray:
        """[n, layers] of [n, V]."""
        return np.broadcast_to(values, (len(values), len(self._moment.layers)))

    def _deviation(self, rows: int) -> np.ndarray:
        """Standard deviation of the last rows [V]; where it is 0, the size of the value."""
        values = self._moment.history["signal_value"].sel(signal=self._signal).isel(step=slice(-rows, None))
        values = values.transpose("step", "layer").values[:, : len(self._before)].astype(float)
        spread = np.ma.masked_invalid(values).std(axis=0).filled(0)
        return np.where(spread > 0, spread, np.abs(np.nan_to_num(values[-1])) + 1e-6)
