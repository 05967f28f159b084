"""Runs a jaxpr again, with something done at chosen sites.

Equations that contain no site are bound as they stand, so their results, gradients and custom rules are
what they were. Equations around a site are built anew by the public function that makes them, with the taps
as further results:

    jit         jax.jit            taps are results
    scan        jax.lax.scan       taps are stacked, [length, ..]
    while       jax.lax.while_loop the last value, zeros before the first
    cond        jax.lax.switch     zeros from a branch that taps nothing
    remat       jax.checkpoint     the same policy
    shard_map   jax.shard_map      the devices' parts side by side

A site inside a function with its own derivative rule (custom_jvp, custom_vjp) is refused: its rule knows
nothing of further results or of another function.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.sharding import PartitionSpec

from ..errors import TracingError
from .sharding import varying_axes
from .walk import Path, Site, bodies, boundary, enclosing, tag

Values = list[Any]
Taps = dict[str, Any]


class Tap(NamedTuple):
    """A result of a site that becomes a tap.

    Attributes:
        name: under which it is returned.
        result: number of the site's result.
        change: what is done with it, the first axis of its outcome being that of the tokens.
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
        self._actions: Mapping[Path, Action] = {action.site.path: action for action in actions}
        self._around = {path for site in self._actions for path in enclosing(site)}
        self._jitted: dict[Path, Callable[..., Any]] = {}

    def run(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], frame: Path = ()
    ) -> tuple[Values, Taps]:
        """(outputs, taps) of the jaxpr that stands at `frame`."""
        env = dict(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else env[atom]

        taps: Taps = {}
        i = 0
        while i < len(jaxpr.eqns):
            path = (*frame, i)
            action = self._actions.get(path)
            count = action.site.count if action else 1
            inputs, outputs = boundary(jaxpr, i, count) if count > 1 else _one(jaxpr.eqns[i])
            values = [read(atom) for atom in inputs]
            if action is None:
                outs, more = self._equation(jaxpr.eqns[i], path, values)
            else:
                outs, more = self._act(action, jaxpr, i, values)
            env.update(zip(outputs, outs, strict=True))
            taps |= more
            i += count
        return [read(atom) for atom in jaxpr.outvars], taps

    def _act(self, action: Action, jaxpr: Jaxpr, i: int, values: Values) -> tuple[Values, Taps]:
        path, count, eqn = action.site.path, action.site.count, jaxpr.eqns[i]
        taps: Taps = {}

        def compute(*inputs: Any) -> Values:
            if count > 1:
                return run_group(jaxpr, i, count, inputs)
            outs, more = self._equation(eqn, path, list(inputs))
            taps.update(more)
            return outs

        if action.replace is None:
            outs = compute(*values)
        else:
            # What replaces a module's call stays in its scope, so that a second query finds it there.
            scopes = eqn.source_info.name_stack[: shared_scopes(jaxpr, i, count)]
            with source_info_util.set_name_stack(source_info_util.current_name_stack() + scopes):
                outs = action.replace(compute, values)
        return outs, taps | {tap.name: tap.change(outs[tap.result]) for tap in action.taps}

    def _equation(self, eqn: JaxprEqn, path: Path, values: Values) -> tuple[Values, Taps]:
        if path not in self._around:
            return bind(eqn, values), {}
        kind = tag(eqn)
        build = getattr(self, f"_{kind}", None)
        if build is None:
            raise TracingError(_refusal(kind, eqn))
        with _where(eqn):
            return build(eqn, path, values)

    def _inside(self, eqn: JaxprEqn, path: Path, number: int = 0) -> Callable[..., tuple[Values, Taps]]:
        body = bodies(eqn)[number]
        return lambda *values: self.run(body.jaxpr, body.consts, values, (*path, number))

    def _taps_under(self, path: Path) -> list[tuple[Action, Tap]]:
        acts = (action for site, action in self._actions.items() if site[: len(path)] == path)
        return [(action, tap) for action in acts for tap in action.taps if action.site.path != path]

    def _jit(self, eqn: JaxprEqn, path: Path, values: Values) -> tuple[Values, Taps]:
        if path not in self._jitted:
            inside, params = self._inside(eqn, path), eqn.params
            name = params["name"]

            def call(*values: Any) -> tuple[Values, Taps]:
                return inside(*values)

            call.__name__ = call.__qualname__ = name
            options: dict[str, Any] = {}
            given = [_sharding(s) for s in params["in_shardings"]]
            wanted = [_sharding(s) for s in params["out_shardings"]]
            if any(s is not None for s in given):
                options["in_shardings"] = tuple(given)
            if any(s is not None for s in wanted):
                options["out_shardings"] = (wanted, None)
            self._jitted[path] = jax.jit(
                call,
                donate_argnums=[i for i, donated in enumerate(params["donated_invars"]) if donated],
                keep_unused=params["keep_unused"],
                inline=params["inline"],
                compiler_options=dict(params["compiler_options_kvs"]) or None,
                **options,
            )
        return self._jitted[path](*values)

    def _closed_call(self, eqn: JaxprEqn, path: Path, values: Values) -> tuple[Values, Taps]:
        return self._inside(eqn, path)(*values)

    _core_call = _call = _closed_call

    def _remat(self, eqn: JaxprEqn, path: Path, values: Values) -> tuple[Values, Taps]:
        if eqn.params["differentiated"]:
            raise TracingError(_refusal("the recomputation of a remat", eqn))
        options = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
        return jax.checkpoint(self._inside(eqn, path), **options)(*values)

    def _scan(self, eqn: JaxprEqn, path: Path, values: Values) -> tuple[Values, Taps]:
        params, inside = eqn.params, self._inside(eqn, path)
        consts, carries = params["num_consts"], params["num_carry"]
        fixed = values[:consts]

        def body(carry: Values, xs: Values) -> tuple[Values, tuple[Values, Taps]]:
            outs, taps = inside(*fixed, *carry, *xs)
            return outs[:carries], (outs[carries:], taps)

        options = {key: params[key] for key in ("length", "reverse", "unroll", "_split_transpose") if key in params}
        start, xs = values[consts : consts + carries], values[consts + carries :]
        carry, (ys, taps) = jax.lax.scan(body, start, xs, **options)
        return [*carry, *ys], taps

    def _while(self, eqn: JaxprEqn, path: Path, values: Values) -> tuple[Values, Taps]:
        if any(site[: len(path) + 1] == (*path, 0) for site in self._actions):
            raise TracingError(_refusal("the condition of a while loop", eqn))
        conds, bodys = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        tested, fixed, start = values[:conds], values[conds : conds + bodys], values[conds + bodys :]
        condition, inside = self._inside(eqn, path, 0), self._inside(eqn, path, 1)
        shapes = jax.eval_shape(lambda *carry: inside(*fixed, *carry)[1], *start)
        zeros = jax.tree.map(_zeros, shapes)
        return jax.lax.while_loop(
            lambda carry: condition(*tested, *carry[0])[0][0],
            lambda carry: inside(*fixed, *carry[0]),
            (start, zeros),
        )

    def _cond(self, eqn: JaxprEqn, path: Path, values: Values) -> tuple[Values, Taps]:
        if eqn.params.get("branches_platforms") is not None:
            raise TracingError(_refusal("platform_dependent", eqn))
        index, *operands = values
        branches = [self._inside(eqn, path, i) for i in range(len(eqn.params["branches"]))]
        shapes: Taps = {}
        for branch in branches:
            shapes |= jax.eval_shape(lambda *xs, branch=branch: branch(*xs)[1], *operands)

        def with_all(branch: Callable[..., tuple[Values, Taps]]) -> Callable[..., tuple[Values, Taps]]:
            def call(*operands: Any) -> tuple[Values, Taps]:
                outs, taps = branch(*operands)
                return outs, {name: taps.get(name, _zeros(shapes[name])) for name in shapes}

            return call

        return jax.lax.switch(index, [with_all(branch) for branch in branches], *operands)

    def _shard_map(self, eqn: JaxprEqn, path: Path, values: Values) -> tuple[Values, Taps]:
        params, specs = eqn.params, {}
        for action, tap in self._taps_under(path):
            axes = varying_axes(eqn, action.site.path[len(path) :], tap.result)
            stacked = self._stacked(eqn, action.site.path[len(path) :])
            specs[tap.name] = PartitionSpec(*[None] * stacked, axes or None)
        manual = params.get("manual_axes", params.get("newly_manual_axes"))
        run = jax.shard_map(
            self._inside(eqn, path),
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=(list(params["out_specs"]), specs),
            axis_names=set(manual),
            check_vma=params["check_vma"],
        )
        return run(*values)

    def _stacked(self, eqn: JaxprEqn, below: Path) -> int:
        """How many scans stand between an equation and a site under it."""
        count = 0
        while below[1:]:
            eqn = bodies(eqn)[below[0]].jaxpr.eqns[below[1]]
            below = below[2:]
            count += bool(below) and tag(eqn) == "scan"
        return count


def shared_scopes(jaxpr: Jaxpr, start: int, count: int) -> int:
    """How many of the outermost scopes consecutive equations have in common."""
    stacks = [eqn.source_info.name_stack.stack for eqn in jaxpr.eqns[start : start + count]]
    same = takewhile(lambda names: len(set(names)) == 1, zip(*stacks, strict=False))
    return sum(1 for _ in same)


def bind(eqn: JaxprEqn, values: Sequence[Any]) -> Values:
    """The results of one equation, untouched: same primitive, parameters, names and source line."""
    bound: Any = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a pair before jax 0.8
    with _where(eqn):
        out = eqn.primitive.bind(*functions, *values, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def run_group(jaxpr: Jaxpr, start: int, count: int, inputs: Sequence[Any]) -> Values:
    """The results of consecutive equations, for what `boundary` says that they read."""
    reads, results = boundary(jaxpr, start, count)
    env = {atom: value for atom, value in zip(reads, inputs, strict=True) if not isinstance(atom, Literal)}
    if count == 1:
        return bind(jaxpr.eqns[start], inputs)
    for eqn in jaxpr.eqns[start : start + count]:
        outs = bind(eqn, [v.val if isinstance(v, Literal) else env[v] for v in eqn.invars])
        env.update(zip(eqn.outvars, outs, strict=True))
    return [env[v] for v in results]


def _one(eqn: JaxprEqn) -> tuple[Sequence[Any], Sequence[Any]]:
    return eqn.invars, eqn.outvars


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


def _sharding(value: Any) -> Any:
    """A sharding, or None where jax is to choose."""
    return value if isinstance(value, jax.sharding.Sharding) else None


def _zeros(shape: Any) -> Any:
    return jnp.zeros(shape.shape, shape.dtype)


def _refusal(kind: str, eqn: JaxprEqn) -> str:
    names = {
        "custom_jvp_call": "a function with its own derivative rule (jax.custom_jvp)",
        "custom_vjp_call": "a function with its own derivative rule (jax.custom_vjp)",
    }
    where = source_info_util.summarize(eqn.source_info)
    return (
        f"The value asked for lies inside {names.get(kind, kind)}, at {where}. Rebuilding it with a further or "
        "another result would lose that rule. Usual cause: the loss or the model was wrapped before it was "
        "differentiated. Wrap the whole training step instead, the function that calls value_and_grad: there "
        "the rule has been applied."
    )
