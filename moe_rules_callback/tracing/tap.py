"""The routers' probabilities out of a function that throws them away.

loss, probs = tap(loss_fn)(params, batch)
probs["layers/router/kernel"]              # [layers, tokens, experts]

(loss, probs), grads = jax.value_and_grad(tap(loss_fn), has_aux=True)(params, batch)
step = jax.jit(tap(train_step))                      # (its results, probs)
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .arguments import Arguments
from .discovery import discover
from .evaluate import Action, Evaluator, Tap
from .flow import Flow, Value
from .logits import Span
from .program import Program, name_of
from .routers import Choice, Router
from .walk import Path, Site

_MANY = 16
Run = Callable[[Arguments], Any]
Change = Callable[[jax.Array], jax.Array]


def tap(fn: Callable[..., Any], *, routers: Choice = None) -> Callable[..., tuple[Any, dict[str, jax.Array]]]:
    """The function with its routers' probabilities as a further result.

    Its own results and gradients stay what they are, under jit to the bit. Works under grad, vmap and scan;
    call it inside your `jax.jit`, or give it a jitted function. Anything else it traces anew in every call.

    Args:
        fn: a forward pass, a loss or a whole training step.
        routers: None for all that `discover_routers` finds, or names, or a function that is asked about each
            `Router`, taken or not.

    Returns:
        A function of the same arguments that returns (result of `fn`, {name: array}). An array is
        [tokens, experts] float, with a leading axis for each scan around the router; leading axes of the
        batch are flattened into tokens. It holds the probabilities where the model has a softmax over
        the experts, else sigmoid scores or logits: `Router.kind` tells. Under `cond` a branch that was not
        taken gives zeros; in a `while` the last turn counts.

    Raises:
        TracingError: when called: no router is found, none has a wanted name, or one lies inside a function
            with its own derivative rule.
    """

    def prepare(program: Program) -> Run:
        chosen = discover(program).chosen(routers)
        evaluator = Evaluator(tapping(program, [(router, lambda x: x) for router in chosen]))
        return functools.partial(program.run, evaluator)

    return instrumented(fn, prepare, "tap")


def instrumented(fn: Callable[..., Any], prepare: Callable[[Program], Run], what: str) -> Callable[..., Any]:
    """The function, run in the way that `prepare` finds for its program.

    Args:
        fn: any function of arrays.
        prepare: called once for each trace.
        what: is done, for a warning.
    """
    kept: list[tuple[Arguments, Run]] = []  # compared: what is no array may have no hash

    @functools.wraps(fn, updated=())  # without `lower`, that of the function as it was
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(fn, args, kwargs)
        # Only a jitted function is bound to what it saw when it was traced.
        concrete = hasattr(fn, "lower") and not any(isinstance(x, Tracer) for x in arguments.arrays)
        for known, run in kept if concrete else ():
            if known.serve(arguments):
                return run(arguments)
        program = Program.of(fn, arguments)
        run = prepare(program)
        if concrete:
            kept.append((program.arguments, run))
            if len(kept) == _MANY:
                warnings.warn(_changing(fn, what), stacklevel=2)
        return run(arguments)

    return wrapped


def _changing(fn: Callable[..., Any], what: str) -> str:
    return (
        f"{what} has traced and compiled {name_of(fn)} for {_MANY} different sets of arguments. Usual cause: "
        "a number of Python that changes in every step, which counts as a part of the function. Pass it as "
        "an array: jnp.asarray(step). Else: batches of ever new shapes."
    )


def tapping(program: Program, changes: Iterable[tuple[Router, Change]]) -> list[Action]:
    """What taps routers, each with a function from its [tokens, experts] to what becomes of them."""
    flow = Flow(program.closed)
    taps: dict[Path, list[Tap]] = {}
    for router, change in changes:
        assert router.tapped is not None  # `chosen` gives only those
        path, result = site_of(flow, router.tapped.value)
        taps.setdefault(path, []).append(Tap(router.name, result, _changed(change, router.tapped.span)))
    return [Action(Site(path), taps=tuple(here)) for path, here in taps.items()]


def _changed(change: Change, span: Span) -> Change:
    return lambda x: change(by_expert(x, span))


def site_of(flow: Flow, value: Value) -> tuple[Path, int]:
    """The outermost equation that returns a value, and the number of the result."""
    return flow.made[flow.lifted(value)]


def by_expert(x: jax.Array, span: Span) -> jax.Array:
    """[.., experts, ..] with the experts in the axes `span`  ->  [tokens, experts]."""
    ahead, experts, behind = x.shape[: span[0]], math.prod(x.shape[slice(*span)]), x.shape[span[1] :]
    x = jnp.moveaxis(x.reshape(*ahead, experts, *behind), len(ahead), -1)
    return x.reshape(-1, experts)
