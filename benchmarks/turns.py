"""Loops that take turns, so that a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import jax
import numpy as np


def take_turns(
    runs: Mapping[str, Callable[[int], None]],
    rounds: int,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, np.ndarray]:
    """Times loops; each has a turn before those that count, to compile.

    Args:
        runs: name -> function that takes so many steps and waits until they are done.
        rounds: turns of each.
        steps: of a turn.
        clock: gives seconds.

    Returns:
        Name -> seconds a step, [rounds].
    """
    for run in runs.values():
        run(steps)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            began = clock()
            run(steps)
            seconds[name].append((clock() - began) / steps)
    return {name: np.array(times) for name, times in seconds.items()}


def print_ratios(title: str, seconds: Mapping[str, np.ndarray]) -> None:
    """One table: milliseconds, and ratios to the first loop within each round."""
    bare = next(iter(seconds))
    print(f"{title}, {jax.devices()[0].device_kind}")
    print(f"{'':8}{'ms a step':>12}{f'ratio to {bare}: median':>24}{'quartiles':>18}")
    for name, times in seconds.items():
        low, ratio, high = np.quantile(times / seconds[bare], [0.25, 0.5, 0.75])
        print(f"{name:8}{np.median(times) * 1e3:12.2f}{ratio:24.3f}{f'{low:.3f} .. {high:.3f}':>18}")
