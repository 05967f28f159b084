"""Which lists of a log are the loads of experts, and what they count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .chosen import Choice
from .names import LOAD, load_layer


def choose_loads(columns: Mapping[str, np.ndarray], choices: Mapping[str, Choice]) -> dict[str, str]:
    """Layer ("" if it has no name) of each column of lists that is a load.

    Columns that the user names win and are all; else of two for the same layer the one with the surer name,
    and a column without a layer only where none has one.
    """
    told = {column: choice.layer for column, choice in choices.items() if choice.signal == LOAD}
    if told:
        return told
    best: dict[str, tuple[int, str]] = {}
    for column, values in columns.items():
        guessed = load_layer(column) if values.ndim == 2 and column not in choices else None
        if guessed and np.isfinite(values).any():
            rank, layer = guessed
            if layer not in best or rank < best[layer][0]:
                best[layer] = rank, column
    named = {column: layer for layer, (_, column) in best.items() if layer}
    return named or {column: "" for _, column in best.values()}


def describe_loads(loads: Sequence[np.ndarray]) -> tuple[str, int | None]:
    """Unit of the loads, and the experts that a token uses where they tell.

    Loads that sum to a whole k from 2 on are shares of tokens that use an expert; an expert with more than
    half of all assignments means that a token uses one. The unit is shown only: `replay` normalises.
    """
    sums = np.concatenate([load.sum(axis=1) for load in loads])
    sums = sums[np.isfinite(sums) & (sums > 0)]
    if not len(sums):
        return "", None
    total, experts = float(np.median(sums)), loads[0].shape[1]
    steady = bool((np.abs(sums / total - 1) < 0.02).mean() > 0.95)
    whole = all(bool((load[np.isfinite(load)] % 1 == 0).all()) for load in loads)
    if whole and total > 1:
        return "counts", None
    if abs(total / 100 - 1) < 0.02 and steady:
        return "percent", None
    k = round(total)
    if 2 <= k <= experts and abs(total - k) < 0.02 * k and steady:
        return "shares of tokens", k
    return "shares", None
