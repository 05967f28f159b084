"""What the user says of columns: `--map column=signal`, `column=signal:unit`, `column=-`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..errors import LogError, closest
from ..metrics import ROUTER_METRICS, TREES
from .names import LOAD
from .units import units_of

LEFT_OUT = "-"


@dataclass(frozen=True)
class Choice:
    """A signal ("" to leave the column out), its layer and its unit ("" if not told)."""

    signal: str
    layer: str = ""
    unit: str = ""


def read_choices(maps: Iterable[str], columns: Mapping[str, np.ndarray]) -> dict[str, Choice]:
    """The choice for each column that is named.

    Raises:
        LogError: a text is not of these forms, or does not fit the columns.
    """
    choices: dict[str, Choice] = {}
    for text in maps:
        column, equals, target = text.rpartition("=")
        if not (equals and column and target):
            raise LogError(
                f"--map {text!r} is not of the form column=signal, column=signal:unit or column=-, "
                "for example entropy=router_entropy:nats"
            )
        if column not in columns:
            raise LogError(
                f"--map {text!r}: the log has no column '{column}'.{closest(column, columns)} "
                f"There are: {', '.join(columns)}."
            )
        choices[column] = _choice(text, target, columns[column])
    targets = [(choice.signal, choice.layer) for choice in choices.values() if choice.signal]
    if twice := [target for i, target in enumerate(targets) if target in targets[:i]]:
        raise LogError(
            f"--map names two columns for {twice[0][0]}. Give one; loads of several layers are named "
            f"{LOAD}/LAYER."
        )
    return choices


def _choice(text: str, target: str, values: np.ndarray) -> Choice:
    if target == LEFT_OUT:
        return Choice("")
    name, _, unit = target.partition(":")
    signal, _, layer = name.partition("/")
    if values.ndim > 1 and signal != LOAD:
        raise LogError(
            f"--map {text!r}: the column holds lists of {values.shape[1]}, and only {LOAD} is one. Map it to "
            f"{LOAD} (or {LOAD}/LAYER), or leave it out with '-'."
        )
    if values.ndim == 1 and signal == LOAD:
        raise LogError(
            f"--map {text!r}: {LOAD} has a number for each expert, the column a single one. Columns of "
            "single experts are joined when they are called load_0, load_1, .."
        )
    if not re.fullmatch(r"[A-Za-z_]\w*", signal, re.ASCII) or (layer and signal != LOAD):
        raise LogError(
            f"--map {text!r}: {name!r} is no name that a rule can speak: letters, digits and underscores."
        )
    if signal in {*ROUTER_METRICS, *TREES} - {LOAD}:
        raise LogError(
            f"--map {text!r}: {signal} is an array of the training step, which no log holds. Map the column "
            "to a signal, such as router_entropy; `moe-rules rules BOOK` shows what rules are about."
        )
    if unit and unit not in units_of(signal):
        known = ", ".join(units_of(signal))
        raise LogError(
            f"--map {text!r}: {unit!r} is no unit of {signal}. "
            + (f"It has: {known}." if known else "It has but one: leave the unit out.")
        )
    return Choice(signal, layer, unit)
