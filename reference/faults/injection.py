"""A fault at work in a run: what it hands to each step."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from ..config import Config
from ..data import Corpus, load_corpus
from .catalogue import find
from .knobs import Knobs


def afflicted(config: Config) -> Config:
    """The configuration with the settings that its fault needs and the step of its onset, if it has one."""
    if not config.fault:
        return config
    fault = find(config.fault)
    onset = fault.onset if config.fault_step < 0 else config.fault_step
    return dataclasses.replace(config, **fault.needs, fault_step=onset)


class Injection:
    """The fault that a configuration names, or none.

    Attributes:
        config: as `afflicted` makes it.
    """

    def __init__(self, config: Config, corpus: Corpus) -> None:
        self._fault = find(config.fault) if config.fault else None
        self.config, self._corpus = afflicted(config), corpus

    @functools.cached_property
    def _tables(self) -> Corpus:
        return load_corpus("tables")

    def knobs(self, step: int) -> Knobs:
        """Those of a step, healthy before the onset."""
        age = step - self.config.fault_step
        return Knobs() if self._fault is None or age < 0 else self._fault.knobs(age)

    def batch(
        self, rng: np.random.Generator, size: int, context: int, *, step: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The batch of a step, as `Corpus.batch` gives it."""
        age = step - self.config.fault_step
        text = "train" if self._fault is None or age < 0 else self._fault.text(age)
        if text != "tables":
            return self._corpus.batch(rng, size, context, held_out=text == "held_out")
        tokens, domain = self._tables.batch(rng, size, context)
        known = self._corpus.domains
        return tokens, domain + (known.index("tables") if "tables" in known else 0)
