"""Changes values inside a function that nobody here wrote, to see whether the audit notices.

    faulty = intervene(loss_fn, {
        "router/kernel": lambda logits: logits.at[..., 3].set(-1e9),          # expert 3 is dead
        "//top_k": lambda values, indices: (values, (indices + 1) % 8),              # off by one
    })

`jax.lax.stop_gradient` as a change freezes a router; `lambda logits: 10 * logits` makes it sure of itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from ..errors import TracingError
from .arguments import Arguments
from .change import checked, outside_rules
from .discovery import discover
from .evaluate import Action, Evaluator
from .flow import Flow, Value
from .modules import marked_modules
from .program import Program
from .query import find
from .routers import Discovery, Router
from .tree import Trace
from .walk import Path, Site, dtype_of

_VALUES = ("logits", "probabilities", "indices")


def intervene(fn: Callable[..., Any], changes: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The function with values at some sites replaced.

    Args:
        fn: a forward pass, a loss or a whole training step.
        changes: site -> function from the value there to the one that takes its place, of the same shape and
            dtype. A site is
            - the name of a router: its logits, in the shape that the model has them;
            - that name with `@logits`, `@probabilities` or `@indices` after it;
            - an XPath, beginning with `/`: the results of what it selects, as so many arguments.

    Returns:
        A function of the same arguments. It traces `fn` in every call: use it inside a `jax.jit`.

    Raises:
        TracingError: when called: there is no such site, or a change returns another shape or dtype.
    """

    @functools.wraps(fn, updated=())
    def changed(*args: Any, **kwargs: Any) -> Any:
        arguments = Arguments(fn, args, kwargs)
        with marked_modules():
            program = Program.of(fn, arguments)
        flow = Flow(program.closed)
        found: dict[Site, list[Callable[[list[Any]], list[Any]]]] = {}
        routers = discover(program) if any(not key.startswith("/") for key in changes) else Discovery([])
        for key, change in changes.items():
            if key.startswith("/"):
                for site in _matching(program, flow, key):
                    found.setdefault(site, []).append(functools.partial(_all, change=change, what=key))
            else:
                path, result = _router_site(flow, routers, key)
                apply = functools.partial(_single, change=change, result=result, what=key)
                found.setdefault(Site(path), []).append(apply)
        actions = [Action(site, functools.partial(_changed, applied)) for site, applied in found.items()]
        return program.run(Evaluator(actions), arguments)[0]

    return changed


def _changed(
    applied: list[Callable[[list[Any]], list[Any]]], compute: Callable[..., list[Any]], inputs: list[Any]
) -> list[Any]:
    outs = compute(*inputs)
    for change in applied:
        outs = change(outs)
    return outs


def _types(values: list[Any]) -> list[tuple[tuple[int, ...], Any]]:
    return [(jnp.shape(x), jnp.result_type(x)) for x in values]


def _all(outs: list[Any], change: Callable[..., Any], what: str) -> list[Any]:
    return checked(change(*outs), _types(outs), what)


def _single(outs: list[Any], change: Callable[..., Any], result: int, what: str) -> list[Any]:
    new = checked(change(outs[result]), _types(outs[result : result + 1]), what)
    return [*outs[:result], *new, *outs[result + 1 :]]


def _matching(program: Program, flow: Flow, xpath: str) -> list[Site]:
    sites = [outside_rules(flow, node.site) for node in find(Trace(program), xpath)]
    if not sites:
        raise TracingError(
            f"Nothing in the function matches {xpath!r}. print(trace(fn, ..)) shows what there is."
        )
    return sites


def _router_site(flow: Flow, routers: Discovery, key: str) -> tuple[Path, int]:
    name, at, which = key.rpartition("@")
    if not at or which not in _VALUES:
        name, which = key, "logits"
    (router,) = routers.chosen([name])
    if which == "indices":
        results = flow.results(router.path)
        index = next(i for i, v in enumerate(results) if jnp.issubdtype(dtype_of(v.var), jnp.integer))
        return router.path, index
    return _owned(flow, _value(router, which).value)


def _value(router: Router, which: str) -> Any:
    if which == "probabilities" and router.kind == "logits":
        raise TracingError(
            f"{router.name} has no probabilities over its experts: its gate is {router.gate!r}. "
            f"Change {router.name}@logits instead."
        )
    return router.tapped if which == "probabilities" else router.logits


def _owned(flow: Flow, value: Value) -> tuple[Path, int]:
    """The equation that returns a value, outside of the bodies that only hand it on."""
    while not flow.uses[value]:
        around = value.frame[:-1]
        out = [v for v in flow.after[value] if v.frame == around[:-1]]
        if len(out) != 1 or flow.lifted(value) == value:
            break
        value = out[0]
    return flow.made[value]
