"""Makes an equation anew around a body that was changed, by the public function of jax that makes such ones.

    jit         jax.jit            taps are results
    scan        jax.lax.scan       taps are stacked, [length, ..]
    while       jax.lax.while_loop the last value, zeros before the first
    cond        jax.lax.switch     zeros from a branch that taps nothing
    remat       jax.checkpoint     the same policy
    shard_map   jax.shard_map      the devices' parts side by side

A function with its own derivative rule (custom_jvp, custom_vjp) is refused: its rule knows nothing of further
results or of another function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jax.sharding import PartitionSpec

from ..errors import TracingError
from .sharding import varying_axes
from .walk import Path, scan_split, scans_around, source_of, tag

Values = list[Any]
Taps = dict[str, Any]
Run = Callable[..., tuple[Values, Taps]]


@dataclass(frozen=True)
class Inside:
    """What a rebuilt equation runs.

    Attributes:
        body: number of a body -> function of its inputs that gives (outputs, taps).
        taps: name -> (path below the equation, number of the result) of each tap inside.
        changed: numbers of the bodies in which something is done.
        path: of the equation.
        jitted: path -> function that is compiled, to be called when the evaluator comes here again.
    """

    body: Callable[[int], Run]
    taps: Mapping[str, tuple[Path, int]]
    changed: set[int]
    path: Path
    jitted: dict[Path, Run]


def rebuild(eqn: JaxprEqn, values: Values, inside: Inside) -> tuple[Values, Taps]:
    """(results, taps) of an equation with something done inside.

    Raises:
        TracingError: equations of this kind cannot be made anew.
    """
    kind = tag(eqn)
    if kind in _RULES:
        raise _rule_refusal(eqn, _RULES[kind])
    return _REBUILD[kind](eqn, values, inside)


def _refusal(eqn: JaxprEqn, construct: str) -> TracingError:
    return TracingError(
        f"The value asked for lies inside {construct}, at {source_of(eqn)}, which cannot be made anew with a "
        "further or another result. Ask for a value that goes into it or comes out of it instead."
    )


def _rule_refusal(eqn: JaxprEqn, rule: str) -> TracingError:
    return TracingError(
        f"The value asked for lies inside a function with its own derivative rule ({rule}), at "
        f"{source_of(eqn)}. Rebuilding it with a further or another result would lose that rule. Usual "
        "cause: the loss or the model was wrapped before it was differentiated. Wrap the whole training "
        "step instead, the function that calls value_and_grad: there the rule has been applied."
    )


def _jit(eqn: JaxprEqn, values: Values, inside: Inside) -> tuple[Values, Taps]:
    body, params = inside.body(0), eqn.params

    def call(*values: Any) -> tuple[Values, Taps]:
        return body(*values)

    call.__name__ = call.__qualname__ = params["name"]
    given = [_sharding(s) for s in params["in_shardings"]]
    wanted = [_sharding(s) for s in params["out_shardings"]]
    options: dict[str, Any] = {}
    if any(s is not None for s in given):
        options["in_shardings"] = tuple(given)
    if any(s is not None for s in wanted):
        options["out_shardings"] = (wanted, None)
    jitted = inside.jitted[inside.path] = jax.jit(
        call,
        donate_argnums=[i for i, donated in enumerate(params["donated_invars"]) if donated],
        keep_unused=params["keep_unused"],
        inline=params["inline"],
        compiler_options=dict(params["compiler_options_kvs"]) or None,
        **options,
    )
    return jitted(*values)


def _sharding(value: Any) -> Any:
    """A sharding, or None where jax is to choose."""
    return value if isinstance(value, jax.sharding.Sharding) else None


def _call(eqn: JaxprEqn, values: Values, inside: Inside) -> tuple[Values, Taps]:
    return inside.body(0)(*values)


def _remat(eqn: JaxprEqn, values: Values, inside: Inside) -> tuple[Values, Taps]:
    if eqn.params["differentiated"]:
        raise _refusal(eqn, "the backward pass of a jax.checkpoint")
    options = {key: eqn.params[key] for key in ("prevent_cse", "policy")}
    return jax.checkpoint(inside.body(0), **options)(*values)


def _scan(eqn: JaxprEqn, values: Values, inside: Inside) -> tuple[Values, Taps]:
    run, (consts, carries) = inside.body(0), scan_split(eqn)

    def turn(carry: Values, xs: Values) -> tuple[Values, tuple[Values, Taps]]:
        outs, taps = run(*values[:consts], *carry, *xs)
        return outs[:carries], (outs[carries:], taps)

    known = ("length", "reverse", "unroll", "_split_transpose")
    options = {key: eqn.params[key] for key in known if key in eqn.params}
    start, xs = values[consts : consts + carries], values[consts + carries :]
    carry, (ys, taps) = jax.lax.scan(turn, start, xs, **options)
    return [*carry, *ys], taps


def _while(eqn: JaxprEqn, values: Values, inside: Inside) -> tuple[Values, Taps]:
    if 0 in inside.changed:
        raise _refusal(eqn, "the condition of a while loop")
    conds, bodys = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    tested, fixed, start = values[:conds], values[conds : conds + bodys], values[conds + bodys :]
    condition, run = inside.body(0), inside.body(1)
    shapes = jax.eval_shape(lambda *carry: run(*fixed, *carry)[1], *start)
    return jax.lax.while_loop(
        lambda state: condition(*tested, *state[0])[0][0],
        lambda state: run(*fixed, *state[0]),
        (start, jax.tree.map(_zeros, shapes)),
    )


def _cond(eqn: JaxprEqn, values: Values, inside: Inside) -> tuple[Values, Taps]:
    if eqn.params.get("branches_platforms") is not None:
        raise _refusal(eqn, "jax.lax.platform_dependent")
    index, *operands = values
    branches = [inside.body(number) for number in range(len(eqn.params["branches"]))]
    shapes: Taps = {}
    for branch in branches:
        shapes |= jax.eval_shape(lambda *xs, branch=branch: branch(*xs)[1], *operands)

    def with_all_taps(branch: Run) -> Run:
        def call(*operands: Any) -> tuple[Values, Taps]:
            outs, taps = branch(*operands)
            return outs, {name: taps.get(name, _zeros(shape)) for name, shape in shapes.items()}

        return call

    return jax.lax.switch(index, [with_all_taps(branch) for branch in branches], *operands)


def _zeros(shape: Any) -> jax.Array:
    return jnp.zeros(shape.shape, shape.dtype)


def _shard_map(eqn: JaxprEqn, values: Values, inside: Inside) -> tuple[Values, Taps]:
    params = eqn.params

    def spec(below: Path, result: int) -> PartitionSpec:
        stacked = [None] * scans_around(eqn, below)
        return PartitionSpec(*stacked, varying_axes(eqn, below, result) or None)

    taps = {name: spec(below, result) for name, (below, result) in inside.taps.items()}
    run = jax.shard_map(
        inside.body(0),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=(list(params["out_specs"]), taps),
        axis_names=set(params["manual_axes" if "manual_axes" in params else "newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return run(*values)


_REBUILD: dict[str, Callable[[JaxprEqn, Values, Inside], tuple[Values, Taps]]] = {
    "jit": _jit,
    "closed_call": _call,
    "core_call": _call,
    "call": _call,
    "remat": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}

_RULES = {"custom_jvp_call": "jax.custom_jvp", "custom_vjp_call": "jax.custom_vjp"}
