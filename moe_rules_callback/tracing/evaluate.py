"""Runs a jaxpr again, with something done at chosen sites.

Equations that contain no site are bound as they stand, so their results, gradients and custom rules are
what they were. Those around a site are built anew, see `rebuild`, with the taps as further results.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from .rebuild import Inside, Taps, Values, rebuild
from .walk import Path, Site, bodies, boundary, enclosing


class Tap(NamedTuple):
    """A result of a site that becomes a tap.

    Attributes:
        name: under which it is returned.
        result: number of the site's result.
        change: what is done with it; the first axis of its outcome is that of the tokens.
    """

    name: str
    result: int
    change: Callable[[Any], Any]


class Action(NamedTuple):
    """What to do at a site: replace the results, or tap them, or both.

    `replace(compute, inputs)` gives the results; `compute(*inputs)` runs what stands there.
    """

    site: Site
    replace: Callable[[Callable[..., Values], Values], Values] | None = None
    taps: tuple[Tap, ...] = ()


class Evaluator:
    """Interprets a jaxpr under whatever transformations the caller is in."""

    def __init__(self, actions: Iterable[Action] = ()) -> None:
        self._actions: dict[Path, list[Action]] = defaultdict(list)
        for action in sorted(actions, key=lambda action: -action.site.count):  # outer ones first
            self._actions[action.site.path].append(action)
        self._around = {path for site in self._actions for path in enclosing(site)}
        # Compiled functions by path: an evaluator that is called again finds them.
        self._jitted: dict[Path, Callable[..., Any]] = {}

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], frame: Path = ()
    ) -> tuple[Values, Taps]:
        """(outputs, taps) of the jaxpr that stands at `frame`."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        taps = self._span(jaxpr, range(len(jaxpr.eqns)), env, frame)
        return [_read(env, atom) for atom in jaxpr.outvars], taps

    def _span(self, jaxpr: Jaxpr, numbers: range, env: dict[Any, Any], frame: Path, entered: int = 0) -> Taps:
        """Runs some equations, into `env`; `entered` of the actions at the first one are under way."""
        taps: Taps = {}
        i = numbers.start
        while i in numbers:
            path = (*frame, i)
            under_way = entered if i == numbers.start else 0
            waiting = self._actions.get(path, [])[under_way:]
            count = waiting[0].site.count if waiting else 1
            inputs, outputs = boundary(jaxpr, i, count)
            values = [_read(env, atom) for atom in inputs]
            if waiting:
                outs, more = self._act(waiting[0], jaxpr, i, values, under_way + 1)
            else:
                outs, more = self._equation(jaxpr.eqns[i], path, values)
            env.update(zip(outputs, outs, strict=True))
            taps |= more
            i += count
        return taps

    def _act(self, action: Action, jaxpr: Jaxpr, i: int, values: Values, entered: int) -> tuple[Values, Taps]:
        path, count, eqn = action.site.path, action.site.count, jaxpr.eqns[i]
        taps: Taps = {}

        def compute(*inputs: Any) -> Values:
            if count == 1:
                outs, more = self._equation(eqn, path, list(inputs))
                taps.update(more)
                return outs
            reads, results = boundary(jaxpr, i, count)
            env = dict(zip(reads, inputs, strict=True))
            taps.update(self._span(jaxpr, range(i, i + count), env, path[:-1], entered))
            return [env[var] for var in results]

        if action.replace is None:
            outs = compute(*values)
        else:
            # What replaces a module's call stays in its scope, so that a second query finds it there.
            scopes = eqn.source_info.name_stack[: _shared_scopes(jaxpr, i, count)]
            with source_info_util.set_name_stack(source_info_util.current_name_stack() + scopes):
                outs = action.replace(compute, values)
        return outs, taps | {tap.name: tap.change(outs[tap.result]) for tap in action.taps}

    def _equation(self, eqn: JaxprEqn, path: Path, values: Values) -> tuple[Values, Taps]:
        if path not in self._around:
            return bind(eqn, values), {}
        if path in self._jitted:
            with _where(eqn):
                return self._jitted[path](*values)

        def body(number: int) -> Callable[..., tuple[Values, Taps]]:
            inner = bodies(eqn)[number]
            return lambda *values: self.run(inner.jaxpr, inner.consts, values, (*path, number))

        below = {
            tap.name: (site[len(path) :], tap.result)
            for site, actions in self._actions.items()
            if site[: len(path)] == path and site != path
            for action in actions
            for tap in action.taps
        }
        changed = {site[len(path)] for site in self._actions if site[: len(path)] == path and site != path}
        with _where(eqn):
            return rebuild(eqn, values, Inside(body, below, changed, path, self._jitted))


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> Values:
    """The results of one equation, untouched: same primitive, parameters, names and source line."""
    bound: Any = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a pair in older releases
    with _where(eqn):
        out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def run_group(jaxpr: Jaxpr, start: int, count: int, inputs: Sequence[Any]) -> Values:
    """The results of consecutive equations, for what `boundary` says that they read."""
    if count == 1:
        return bind(jaxpr.eqns[start], inputs)
    reads, results = boundary(jaxpr, start, count)
    env = dict(zip(reads, inputs, strict=True))
    for eqn in jaxpr.eqns[start : start + count]:
        outs = bind(eqn, [_read(env, atom) for atom in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [env[v] for v in results]


def _read(env: Mapping[Any, Any], atom: Any) -> Any:
    return atom.val if isinstance(atom, Literal) else env[atom]


def _shared_scopes(jaxpr: Jaxpr, start: int, count: int) -> int:
    """How many of the outermost scopes consecutive equations have in common."""
    stacks = [eqn.source_info.name_stack.stack for eqn in jaxpr.eqns[start : start + count]]
    return sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*stacks, strict=False)))


@contextlib.contextmanager
def _where(eqn: JaxprEqn) -> Iterator[None]:
    """The equation's place in the names of profiles and in tracebacks, its mesh and its configuration."""
    info, stack = eqn.source_info, source_info_util.current_name_stack()
    inside = info.name_stack
    # In a replacement its scopes have been entered already.
    entered = max((n for n in range(1, len(inside) + 1) if stack.stack[-n:] == inside.stack[:n]), default=0)
    stack += inside[entered:]
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield
