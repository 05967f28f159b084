"""What predicates read in the rows of a run, taken from the evaluator itself by replay."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..errors import FitError
from ..formula import Rule, variables
from ..judges import looks_back
from ..predicates import Predicate
from ..records import Records
from ..replay import Replay
from ..rulebook import Rulebook
from ..runs import Recording, read_recording
from ..signals import TOKENS, Signal, WindowSignal, scalar, shipped
from ..trends import Function, Lookbacks

if TYPE_CHECKING:
    import xarray as xr

    Run = xr.Dataset | Recording | str | os.PathLike[str]

Size = tuple[int, int]


@dataclass(frozen=True)
class Rows:
    """A run of n rows and Y layers under some rules.

    Attributes:
        rules: as they were evaluated on it, by name.
        predicates: those of the rules, by name.
        steps: int [n].
        sizes: (experts, experts per token) of each layer.
        features: float32 [n, Y] by predicate, what its ramp is laid over; NaN where it is not known.
        sampled: float32 [n, Y] by predicate, by how much sampling noise widens its margin.
        bad: bool [n, Y] by predicate, whether the signal below is not finite.
        truth: float32 [n, 2] by rule, over all layers.
    """

    rules: Mapping[str, Rule]
    predicates: Mapping[str, Predicate]
    steps: np.ndarray
    sizes: tuple[Size, ...]
    features: Mapping[str, np.ndarray]
    sampled: Mapping[str, np.ndarray]
    bad: Mapping[str, np.ndarray]
    truth: Mapping[str, np.ndarray]


def replayed(run: Run, name: str, book: Rulebook) -> Records:
    """The rules of a book over a run; a rule without its signals is an error that names the run."""
    try:
        if isinstance(run, str | os.PathLike):
            run = read_recording(os.fspath(run))
        replay = run.replay(book) if isinstance(run, Recording) else Replay.of_history(run, book)
        return Records.joined(replay)
    except Exception as error:
        error.add_note(f"This was raised by the run '{name}'.")
        raise


def read_rows(run: Run, name: str, book: Rulebook) -> Rows:
    """See `Rows`."""
    records = replayed(run, name, book)
    schema = records.schema
    order = list(schema.signal_names)
    values = {signal: records.signal_value[:, i] for i, signal in enumerate(order)}
    known = schema.predicates
    used = [(rule.name, atom) for rule in schema.rules for atom in variables(rule.formula)]
    if concluded := [pair for pair in used if pair[1] not in known]:
        raise FitError(
            "rule '{}' is about '{}', which is concluded and not measured. A fit is of rules over predicates "
            "only.".format(*concluded[0])
        )
    looks = {name: looks_back(each, signal_of(each)) for name, each in known.items()}
    wanted = [(*look, order.index(known[name].signal)) for name, look in looks.items() if look]
    trends = iter(np.moveaxis(_look_back(wanted, records.signal_value), 1, 0))
    features = {name: next(trends) if look else values[known[name].signal] for name, look in looks.items()}
    sizes = tuple((experts, k or 1) for experts, k in schema.routers) or ((1, 1),)
    return Rows(
        {rule.name: rule for rule in schema.rules},
        known,
        records.step,
        sizes,
        features,
        {name: _sampled(known[name], x, values.get(TOKENS), sizes) for name, x in features.items()},
        {name: ~np.isfinite(values[_below(each)]) for name, each in known.items()},
        {name: records.truth[:, i] for i, name in enumerate(schema.rule_names)},
    )


def signal_of(predicate: Predicate) -> Signal:
    """What a predicate judges; those of plugins have their ramps written out by now."""
    return shipped().get(predicate.signal) or scalar(predicate.signal)


def _below(predicate: Predicate) -> str:
    signal = signal_of(predicate)
    return signal.needs[0] if isinstance(signal, WindowSignal) else predicate.signal


def _sampled(
    predicate: Predicate, x: np.ndarray, tokens: np.ndarray | None, sizes: Sequence[Size]
) -> np.ndarray:
    """Half widths that the predicate asks for because of noise, as `judges` adds them; 0 where not known."""
    widths, noise = np.zeros_like(x), signal_of(predicate).noise
    if tokens is None or noise is None or predicate.sense not in ("high", "low"):
        return widths
    for layer, size in enumerate(sizes):
        of = noise(jnp.asarray(x[:, layer]), jnp.maximum(tokens[:, layer], 1), *size)
        widths[:, layer] = predicate.sampling * np.nan_to_num(of)
    return widths


def _look_back(wanted: Sequence[tuple[Function, int, int]], signals: np.ndarray) -> np.ndarray:
    """float32 [n, wanted, Y] of signals [n, S, Y]."""
    lookbacks = Lookbacks(wanted)

    def look(rings: Any, row: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        return lookbacks.update(rings, *row)

    scan = jax.jit(lambda rings, rows: jax.lax.scan(look, rings, rows)[1])
    return np.asarray(scan(lookbacks.init(signals.shape[2]), (signals, jnp.arange(len(signals)))))
