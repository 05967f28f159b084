"""Ramps from healthy runs: where a signal leaves the range in which it is when all is well.

    calibration = calibrate([open_history("runs/healthy-0"), open_history("runs/healthy-1")], "router_health")
    print(calibration)                             # what moved, how sure that is, alarms on runs left out
    write_rules(calibration.rules, "mine.toml")    # of `rulewriter`

For `high_X` the tail is the value that healthy rows reach with probability .01 (for `low_X` downwards). It
is estimated from few runs, whose rows resemble each other, and so it is uncertain: runs (with fewer than
three, blocks of 50 rows) are drawn again and again with replacement (Efron 1979, Ann. Statist. 7), and the
95 % range of the tail becomes the margin of the predicate. The width of its interval is what the calibration
does not know; the noise of a small batch comes on top, two standard errors of it (`Predicate.sampling`).
Truth is .05 at the tail and .5 as far beyond it as the tail is from the median; towards a bound of the signal
(0 where all values are positive, 1 for shares) far is meant as a ratio, so that it can be reached.

What holds in healthy rows, such as "the validation loss is near", is no sign of illness and stays as it is;
so do predicates that are judged by their own past, and those whose signal never varies or reaches its bound.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .alerts import firing
from .conclusions import concluded
from .errors import HistoryError
from .formula import variables
from .judges import ramp_of
from .predicates import Predicate, is_measured, resolve
from .replay import replay_history
from .rulebook import Rulebook, Source, load_rules
from .signals import Signal, scalar, shipped

if TYPE_CHECKING:
    import xarray as xr

TAIL = 1e-2  # of healthy rows beyond
LEAST = 200  # values from which a tail can be guessed at all
BLOCK, DRAWS = 50, 400
STEEP = math.log(0.95 / 0.05)  # from truth .05 to .5
SIZE = 8, 2  # experts, and experts a token: any will do for a predicate with an offset of its own
SHARES = frozenset(  # signals in 0..1
    [
        "router_entropy",
        "routing_confidence",
        "routing_margin",
        "router_mutual_information",
        "load_cv_normalised",
        "load_cv_living",
        "expert_imbalance",
        "expert_coactivation",
        "router_gradient_share",
        "expert_weight_cosine",
        "dropped_token_fraction",
        "router_noise_repetition",
        "routing_flip_rate",
        "router_saturation",
    ]
)


@dataclass(frozen=True)
class Calibrated:
    """A predicate and the healthy range of its signal.

    Attributes:
        name, before, after: the predicate; `before.offset` is None where its shipped ramp stood.
        values, runs: how many were seen.
        median, tail: of the healthy values.
        low, high: 95 % range of the tail.
    """

    name: str
    before: Predicate
    after: Predicate
    values: int
    runs: int
    median: float
    tail: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """Rules with calibrated predicates.

    Attributes:
        rules: the book.
        predicates: what was calibrated.
        skipped: name of a predicate that was not -> why.
        alarms: rule -> rows in which it fired on runs that were left out, each judged by rules calibrated on
            the others; None with fewer than two runs.
        rows: rows that were judged so.
    """

    rules: Rulebook
    predicates: tuple[Calibrated, ...]
    skipped: Mapping[str, str]
    alarms: Mapping[str, int] | None
    rows: int

    def __str__(self) -> str:
        """A table, what was skipped, and alarms on runs left out."""
        lines = [f"{'predicate':34}{'median':>9}{'tail':>9}{'95 % range':>19}{'offset':>9}"]
        lines += [
            f"{c.name:34}{c.median:9.3g}{c.tail:9.3g}{f'{c.low:.3g} .. {c.high:.3g}':>19}"
            f"{c.after.offset:9.3g}"
            for c in self.predicates
        ]
        lines += [f"{name}: not calibrated, {why}" for name, why in self.skipped.items()]
        if self.alarms is None:
            lines.append("One run: false alarms on others cannot be told. Give two or more.")
        else:
            fired = {name: rows for name, rows in self.alarms.items() if rows}
            told = ", ".join(f"{name} in {rows:,}" for name, rows in fired.items()) or "no rule"
            lines.append(f"On runs left out, {self.rows:,} rows after warm-up: {told} fired.")
        return "\n".join(lines)


def calibrate(runs: Sequence[xr.Dataset], rules: Source = None, *, after: int = 100) -> Calibration:
    """Set the ramps of a book's `high_` and `low_` predicates by healthy runs.

    Args:
        runs: histories of healthy runs of the model that is to be watched; E, k and batch as it has them.
        rules: the book; None: "router_health".
        after: first step that counts; before it runs are not yet what they will be.

    Raises:
        HistoryError: no runs, or none with a step from `after` on.
    """
    runs = [run.isel(step=run["step"].values >= after) for run in runs]
    if not any(run.sizes["step"] for run in runs):
        raise HistoryError(
            f"there is nothing to calibrate with: no run has a row from step {after} on. Give longer runs, "
            "or a smaller after= (--after)."
        )
    book = load_rules(rules)
    found, skipped = _calibrated(runs, book)
    alarms, rows = (None, 0) if len(runs) < 2 else _left_out(runs, book)
    return Calibration(_with(book, found), tuple(found), skipped, alarms, rows)


def _with(book: Rulebook, found: Sequence[Calibrated]) -> Rulebook:
    return dataclasses.replace(book, predicates={**book.predicates, **{c.name: c.after for c in found}})


def _left_out(runs: Sequence[xr.Dataset], book: Rulebook) -> tuple[dict[str, int], int]:
    """Rows in which rules fire on each run, calibrated on the others."""
    alarms: dict[str, int] = {}
    rows = 0
    for i, run in enumerate(runs):
        if not run.sizes["step"]:
            continue
        found, _ = _calibrated([other for j, other in enumerate(runs) if j != i], book)
        records = replay_history(run, _with(book, found))
        rows += len(records)
        for rule, fired in zip(records.schema.rule_names, firing(records).sum(0).tolist(), strict=True):
            alarms[rule] = alarms.get(rule, 0) + fired
    return alarms, rows


def _calibrated(runs: Sequence[xr.Dataset], book: Rulebook) -> tuple[list[Calibrated], dict[str, str]]:
    known: dict[str, Signal] = shipped()
    for run in runs:
        known |= {name: scalar(name) for name in run["signal"].values.tolist()}
    names = concluded(book.rules, lambda name: is_measured(name, book.predicates))
    found, skipped = [], {}
    for name in dict.fromkeys(atom for rule in book.rules for atom in variables(rule.formula)):
        if name in names:
            continue
        predicate = resolve(name, book.predicates, known)
        signal = known.get(predicate.signal)
        if predicate.sense not in ("high", "low"):
            skipped[name] = "it is judged by the trend of its signal"
        elif signal is None or (predicate.offset is None and signal.ramps is None):
            skipped[name] = "it is judged by the past of its signal"
        else:
            values = [_values(run, predicate.signal) for run in runs]
            enough = [v for v in values if len(v)]
            if sum(map(len, enough)) < LEAST:
                skipped[name] = f"its signal '{predicate.signal}' has fewer than {LEAST} values in these runs"
            elif isinstance(fitted := _fitted(name, predicate, signal, enough), str):
                skipped[name] = fitted
            else:
                found.append(fitted)
    return found, skipped


def _values(run: xr.Dataset, signal: str) -> np.ndarray:
    """float64 [values], those of all layers that are finite, layers of a row next to each other."""
    if signal not in run["signal"].values:
        return np.zeros(0)
    values = run["signal_value"].sel(signal=signal).transpose("step", "layer").values.astype(np.float64)
    return values[np.isfinite(values).all(axis=1)].ravel()


def _fitted(name: str, predicate: Predicate, signal: Signal, runs: Sequence[np.ndarray]) -> Calibrated | str:
    """The predicate calibrated, or why it cannot be."""
    healthy = float(np.median(np.concatenate(runs)))
    slope, offset, _ = ramp_of(predicate, signal, *SIZE)
    if predicate.offset is not None and slope * (healthy - offset) > 0:
        return "it holds in these runs; if it should not, give it an offset beyond them first"
    # Upwards throughout: a low_X is a high one of the negative signal.
    sign = 1.0 if predicate.sense == "high" else -1.0
    units = [sign * run for run in runs]
    if len(units) < 3:
        units = [block for run in units for block in np.array_split(run, max(len(run) // BLOCK, 1))]
    everything = np.concatenate(units)
    median, tail = float(np.median(everything)), float(np.quantile(everything, 1 - TAIL))
    rng = np.random.default_rng(0)
    drawn = [
        np.quantile(np.concatenate([units[i] for i in rng.integers(len(units), size=len(units))]), 1 - TAIL)
        for _ in range(DRAWS)
    ]
    low, high = (float(q) for q in np.quantile(drawn, [0.025, 0.975]))
    if high - median <= 1e-6 * max(abs(median), 1.0):
        return "its signal does not vary in these runs"
    bound = _bound(predicate, everything, sign)
    if bound is None:
        reach = high - median
    elif bound - max(tail, high) <= 0:
        return "its signal reaches its bound in these runs"
    else:  # the distance to the bound shrinks beyond the tail by the factor by which it shrinks up to it
        reach = (bound - tail) * (1 - (bound - high) / (bound - median))
    after = dataclasses.replace(
        predicate,
        offset=sign * (tail + reach),
        slope=STEEP / reach,
        margin=(high - low) / 2,
        sampling=predicate.sampling or 2.0,
    )
    if sign < 0:
        low, high = high, low
    return Calibrated(
        name,
        predicate,
        after,
        len(everything),
        len(runs),
        sign * median,
        sign * tail,
        sign * low,
        sign * high,
    )


def _bound(predicate: Predicate, signed: np.ndarray, sign: float) -> float | None:
    """What the signal, times the sign, cannot exceed, if anything is known."""
    if sign < 0:
        return 0.0 if signed.max() <= 0 and predicate.signal != "boundary_margin" else None
    return 1.0 if predicate.signal in SHARES else None
