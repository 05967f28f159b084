"""Puts other functions in the place of parts of a traced one.

    substitute(traced, '//pjit[@name="relu"]', jax.nn.gelu)

    def lora(call, x, kernel, bias):
        a, b = adapters[call.attributes["path"]]
        return call(x, kernel, bias) + x @ a @ b

    adapted = substitute(traced, '//module_call[@type="Dense"]', lora, with_call=True)

The replacement may close over further arrays, those of a `jax.grad` around it too: so adapters learn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..errors import TracingError
from .change import checked, outside_rules
from .evaluate import Action, Evaluator
from .flow import Flow
from .query import find
from .tree import Node, Trace
from .walk import Site


def substitute(trace: Trace, xpath: str, fn: Callable[..., Any], *, with_call: bool = False) -> Trace:
    """A trace with everything that matches replaced; the one given stays as it is.

    Args:
        trace: from `trace`, or from `substitute`.
        xpath: selects modules, scopes, calls or primitives, see `find`.
        fn: gets the inputs of the match (`Node.inputs`) and returns its outputs, of the same shapes and
            dtypes. The inputs of a primitive or a jitted function are its operands; those of a module are
            the values it reads, parameters among them, in order of first use.
        with_call: `fn` gets the `Node` first; calling that runs what stood there.

    Raises:
        TracingError: nothing matches, matches lie inside each other, shapes or dtypes differ, or a match
            lies inside a function with its own derivative rule.
    """
    matches = find(trace, xpath)
    if not matches:
        raise TracingError(
            f"Nothing in the trace matches {xpath!r}. print(trace) shows what there is; a function that jax "
            "has inlined, or one that was jitted and called before, shows no module."
        )
    flow = Flow(trace.program.closed)
    sites = {outside_rules(flow, node.site): node for node in matches}
    _check_apart(list(sites), xpath)
    actions = [Action(site, replace=_replacement(node, fn, with_call)) for site, node in sites.items()]
    return Trace(trace.program.changed(Evaluator(actions)))


def _replacement(node: Node, fn: Callable[..., Any], with_call: bool) -> Callable[..., list[Any]]:
    def replace(compute: Callable[..., list[Any]], inputs: list[Any]) -> list[Any]:
        new = fn(node, *inputs) if with_call else fn(*inputs)
        return checked(new, node.types, f"{node.tag} {node.attributes.get('name', '')}".strip())

    return replace


def _check_apart(sites: list[Site], xpath: str) -> None:
    for a in sites:
        for b in sites:
            n = len(a.path)
            same_body = len(b.path) >= n and b.path[: n - 1] == a.path[:-1]
            if a != b and same_body and a.path[-1] <= b.path[n - 1] < a.path[-1] + a.count:
                raise TracingError(
                    f"Two matches of {xpath!r} lie inside each other, at {a.path} and {b.path}. Usual cause: "
                    "a module inside a module of the same type. Let the query tell them apart, by @path."
                )
