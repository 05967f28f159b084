"""A function as a jaxpr that can be called like the function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr

from ..errors import TracingError
from .arguments import Arguments, Results, taken
from .evaluate import Evaluator


class Program:
    """What `fn` does with arguments of these shapes.

    Attributes:
        closed: the jaxpr, over the arrays among the arguments.
        names: of each input, a key path such as `layers/0/moe/router/kernel`.
        arguments: the arguments it was traced with, shapes in the place of arrays.
    """

    def __init__(
        self, fn: Callable[..., Any], arguments: Arguments, closed: ClosedJaxpr, results: Results
    ) -> None:
        self.fn, self.arguments, self.closed, self._results = fn, arguments.abstract(), closed, results
        self.names = arguments.names

    @classmethod
    def of(cls, fn: Callable[..., Any], arguments: Arguments) -> Program:
        """Traces `fn`, which is not run."""
        taken_apart: list[Results] = []

        def flat(*arrays: Any) -> list[Any]:
            results, arrays_out = taken(arguments.call(fn, arrays))
            taken_apart.append(results)
            return arrays_out

        closed = jax.make_jaxpr(flat)(*arguments.arrays)
        return cls(fn, arguments, closed, taken_apart[-1])

    def changed(self, evaluator: Evaluator) -> Program:
        """The program with the evaluator's replacements in it."""
        jaxpr, consts = self.closed.jaxpr, self.closed.consts
        closed = jax.make_jaxpr(lambda *xs: evaluator.run(jaxpr, consts, xs)[0])(*self.arguments.arrays)
        return Program(self.fn, self.arguments, closed, self._results)

    def same(self, arguments: Arguments) -> None:
        """Check that the program can be run on these arguments.

        Raises:
            TracingError: they differ in structure, shapes, dtypes or static values.
        """
        if not self.arguments.serve(arguments):
            raise TracingError(
                f"These arguments are not like those that {name_of(self.fn)} was traced with: "
                f"{_difference(self.arguments, arguments)}. A trace holds for one structure, one set of "
                "shapes and dtypes and one value of everything that is no array. Trace again with these."
            )

    def run(self, evaluator: Evaluator, arguments: Arguments) -> tuple[Any, dict[str, Any]]:
        """(result of the function, what was tapped) on other arrays; NNX objects get their new state."""
        outs, taps = evaluator.run(self.closed.jaxpr, self.closed.consts, arguments.arrays)
        result, state = self._results.rebuild(outs)
        arguments.write_back(state)
        return result, taps


def name_of(fn: Callable[..., Any]) -> str:
    """How a function is called in messages."""
    return getattr(fn, "__name__", type(fn).__name__)


def _difference(before: Arguments, now: Arguments) -> str:
    if before.names != now.names:
        lost, new = set(before.names) - set(now.names), set(now.names) - set(before.names)
        return f"missing {sorted(lost)[:3]}, new {sorted(new)[:3]}"
    for name, a, b in zip(before.names, before.arrays, now.arrays, strict=True):
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{name} was {a.dtype}{list(a.shape)} and is {b.dtype}{list(b.shape)}"
    return "a value that is no array differs"
