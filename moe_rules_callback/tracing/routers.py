"""What a search for routers gives.

>>> print(discover_routers(loss, params, batch))
layers/router/kernel  8 experts, top 2, softmax, 12 layers
    top_k at model.py:41 (moe) chooses over the output of this matmul, and a gather dispatches by it
not taken:
head/kernel  argmax at train.py:20 (accuracy): compared with an argument, as an accuracy is
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import TracingError, closest
from .logits import Step
from .walk import Path

Choice = Callable[["Router"], bool] | Iterable[str] | None


@dataclass(frozen=True)
class Router:
    """A selection, taken for a router or not.

    Attributes:
        name: key path of the matmul's weights, `layers/0/moe/router/kernel`.
        taken: whether it is a router.
        reason: why, or why not.
        selection: the primitive that chooses.
        source: file, line and function of it.
        k: experts per token, or tokens per expert under expert choice; None where a sort does not tell.
        experts: number of experts.
        gate: "softmax" or "sigmoid" of the logits before the choice, "softmax after" it, or "none".
        noisy: random numbers are added to the logits.
        biased: a parameter is added to the scores after the gate, to balance the load.
        expert_choice: experts choose tokens.
        layers: lengths of the scans around it, outermost first: () for a router of one layer.
        kind: what a tap returns: "probabilities" (softmax), "scores" (sigmoid) or "logits" (without noise).
        tapped: the value that a tap returns, as a step of the chain from the selection to the matmul.
        logits: the logits, likewise.
        path, matmul: where the selection and the matmul stand.
    """

    name: str
    taken: bool
    reason: str
    selection: str
    source: str
    k: int | None
    experts: int
    gate: str = "none"
    noisy: bool = False
    biased: bool = False
    expert_choice: bool = False
    layers: tuple[int, ...] = ()
    kind: str = "logits"
    tapped: Step | None = field(default=None, repr=False)
    logits: Step | None = field(default=None, repr=False)
    path: Path = field(default=(), repr=False)
    matmul: Path = field(default=(), repr=False)

    def __str__(self) -> str:
        if not self.taken:
            return f"{self.name or '(no parameter)'}  {self.selection} at {self.source}: {self.reason}"
        top = "capacity" if self.expert_choice else "top"
        traits = [f"{self.experts} experts", f"{top} {self.k}", self.gate]
        traits += [t for t in ("noisy", "biased") if getattr(self, t)]
        traits += ["expert choice"] * self.expert_choice
        traits += [f"{math.prod(self.layers)} layers"] * bool(self.layers)
        return f"{self.name}  {', '.join(traits)}\n    {self.selection} at {self.source} {self.reason}"


class Discovery(Sequence[Router]):
    """The routers of a function, in the order in which they run.

    Attributes:
        rejected: selections that were not taken, each with its reason.
        opaque: kernels and the like that were not looked into, with their places.
    """

    def __init__(self, candidates: Iterable[Router], opaque: Iterable[str] = ()) -> None:
        candidates, self.opaque = list(candidates), list(opaque)
        self._taken = [c for c in candidates if c.taken]
        self.rejected = [c for c in candidates if not c.taken]

    def __getitem__(self, index: Any) -> Any:
        return self._taken[index]

    def __len__(self) -> int:
        return len(self._taken)

    def __str__(self) -> str:
        lines = [str(router) for router in self._taken] or ["no router found"]
        if self.rejected:
            lines += ["not taken:", *map(str, self.rejected)]
        if self.opaque:
            lines += ["not looked into:", *self.opaque]
        return "\n".join(lines)

    __repr__ = __str__

    def chosen(self, choice: Choice) -> list[Router]:
        """The routers that the user wants.

        Args:
            choice: None for all that were taken; names, also of selections that were not; or a function of a
                `Router`, asked about each selection that goes back to a matmul.

        Raises:
            TracingError: there is none, or none of a given name.
        """
        known = [c for c in (*self._taken, *self.rejected) if c.tapped is not None]
        if choice is None:
            wanted = self._taken
        elif callable(choice):
            wanted = [c for c in known if choice(c)]
        else:
            by_name, names = {c.name: c for c in known}, [choice] if isinstance(choice, str) else list(choice)
            for name in names:
                if name not in by_name:
                    raise TracingError(
                        f"No selection is fed by {name}.{closest(name, by_name)} What was found:\n{self}"
                    )
            wanted = [by_name[name] for name in names]
        if not wanted:
            raise TracingError(
                "No router was found: no top_k, argmax or sort over the output of a matmul goes on to "
                "dispatch. Usual causes: the function does not run the model, or its router chooses in "
                f"another way. Choose by name with routers=[..] from what was found:\n{self}"
            )
        return wanted
