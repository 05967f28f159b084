"""The table of what is recorded: faults and healthy controls, in a set to tune rules on and one held out.

    [run.name for run in RUNS if run.split == "tuning" and run.fault]

The sets share no text and no seed. A run's rows before `WARM` belong to its beginning and are not counted as
healthy ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ..config import Config
from .catalogue import FAULTS

WARM = 150
STEPS, LONG = 500, 2000


@dataclass(frozen=True)
class Run:
    """One run of the benchmark.

    Attributes:
        split: "tuning" or "held_out".
        fault: of the catalogue, or "" for a control.
        seed, experts, top_k, gate, dataset, steps: its configuration.
    """

    split: str
    fault: str
    seed: int
    experts: int
    top_k: int
    gate: str
    dataset: str
    steps: int = STEPS

    @property
    def name(self) -> str:
        """Unique within the split."""
        what = self.fault or "healthy"
        shape = f"e{self.experts}-k{self.top_k}-{self.gate}"
        return f"{what}-{shape}-{self.dataset}-{self.steps}-s{self.seed}"

    @property
    def illness(self) -> str:
        """What a doctor should say, "" for nothing."""
        return FAULTS[self.fault].illness if self.fault else ""

    @property
    def healthy_rows(self) -> int:
        """Rows after the warm-up, of a run without illness."""
        return 0 if self.illness else self.steps - WARM

    @property
    def config(self) -> Config:
        """Small enough for a step of some milliseconds, and balanced so that no expert dies in health."""
        balance_weight = 0.1 if self.gate == "sigmoid" else 0.03 * max(1, self.experts / 8)
        return Config(
            steps=self.steps, seed=self.seed, dataset=self.dataset, experts=self.experts, top_k=self.top_k,
            gate=self.gate, fault=self.fault, layers=2, width=64, context=64, expert_width=32, batch=8,
            capacity_factor=2.0, eval_every=50, eval_batches=4, groups=1,
            balance_weight=balance_weight,
        )  # fmt: skip


def _faulty(split: str, seed: int, experts: int, top_k: int, gate: str, dataset: str) -> Iterator[Run]:
    for name, fault in FAULTS.items():
        if fault.illness and fault.needs.get("top_k", top_k) == top_k:
            yield Run(split, name, seed, experts, top_k, gate, dataset)


def _controls(split: str, seeds: range, experts: int, top_k: int, gate: str, dataset: str) -> Iterator[Run]:
    """The last seeds belong to harmless changes, one each."""
    harmless = [name for name, fault in FAULTS.items() if not fault.illness]
    plain = len(seeds) - len(harmless)
    for seed, fault in zip(seeds, [""] * plain + harmless, strict=True):
        yield Run(split, fault, seed, experts, top_k, gate, dataset)


def _tuning() -> Iterator[Run]:
    shapes = ((8, 2), (4, 1), (8, 1))
    for experts, top_k in shapes:
        yield from _faulty("tuning", 0, experts, top_k, "softmax", "python")
    yield from _faulty("tuning", 1, 8, 2, "sigmoid", "python")
    for gate, (experts, top_k) in product(("softmax", "sigmoid"), shapes):
        yield from _controls("tuning", range(2, 6), experts, top_k, gate, "python")
    for dataset, seed in product(("prose", "code"), (10, 11)):
        yield Run("tuning", "", seed, 8, 2, "softmax", dataset)
        yield Run("tuning", "", seed, 4, 1, "sigmoid", dataset)
    for experts, top_k in ((8, 2), (8, 1)):
        yield Run("tuning", "", 12, experts, top_k, "softmax", "python", LONG)


def _held_out() -> Iterator[Run]:
    text = "tinyshakespeare"
    for experts, top_k in ((16, 2), (8, 2), (4, 2)):
        yield from _faulty("held_out", 100, experts, top_k, "softmax", text)
    yield from _faulty("held_out", 101, 8, 2, "sigmoid", text)
    yield Run("held_out", "top1_renormalised", 100, 8, 1, "softmax", text)
    shapes = ((4, 1), (4, 2), (8, 1), (8, 2), (16, 2))
    for gate, (experts, top_k) in product(("softmax", "sigmoid"), shapes):
        yield from _controls("held_out", range(102, 107), experts, top_k, gate, text)
    for seed, shape in product((110, 111), ((8, 2, "softmax"), (16, 2, "sigmoid"), (4, 1, "softmax"),
                                            (4, 2, "sigmoid"))):  # fmt: skip
        yield Run("held_out", "", seed, *shape, text, LONG)


RUNS = (*_tuning(), *_held_out())
