"""Which value is made from which, across all nested jaxprs of a program.

A `Value` is a variable together with the path of the body it lives in: a jaxpr that is called twice has two
of each. Where a value only changes its name, entering or leaving a body, the two are linked as aliases. The
link from the end of a loop's turn back to the start of the next is left out: what a turn chooses is told
from what the next does with it.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from .walk import Body, Path, bodies, scan_split, shape_of, tag


class Value(NamedTuple):
    """A variable in the body at `frame`; `()` is the outermost jaxpr."""

    frame: Path
    var: Var


class Use(NamedTuple):
    """Operand or result `number` of the equation at `path`."""

    path: Path
    number: int


# Values that go through unchanged, or almost: from a parameter to the matmul that uses it.
_STILL_THE_PARAMETER = {
    *("convert_element_type", "transpose", "reshape", "squeeze", "broadcast_in_dim", "slice", "split"),
    *("dynamic_slice", "copy", "copy_p", "stop_gradient", "sharding_constraint", "reduce_precision", "name"),
    *("mul", "div", "add", "sub", "sqrt", "rsqrt", "max", "reduce_sum", "integer_pow", "square", "neg"),
    *("optimization_barrier", "all_gather", "all_gather_invariant", "pvary", "pcast", "device_put"),
    *("reshard", "mesh_cast", "dynamic_update_slice", "rev", "pad", "tanh", "select_n", "concatenate"),
    *("unstack",),
}


class Flow:
    """Makers, users and aliases of every value of a program.

    Attributes:
        equations: every equation by its path.
    """

    def __init__(self, closed: ClosedJaxpr) -> None:
        self.equations: dict[Path, JaxprEqn] = {}
        self.made: dict[Value, Use] = {}
        self.uses: dict[Value, list[Use]] = defaultdict(list)
        self.before: dict[Value, list[Value]] = defaultdict(list)
        self.after: dict[Value, list[Value]] = defaultdict(list)
        self.inputs = {Value((), var): i for i, var in enumerate(closed.jaxpr.invars)}
        self.constants = {Value((), var) for var in closed.jaxpr.constvars}
        self._visit(closed.jaxpr, ())

    def _visit(self, jaxpr: Jaxpr, frame: Path) -> None:
        for i, eqn in enumerate(jaxpr.eqns):
            path = (*frame, i)
            self.equations[path] = eqn
            inside = bodies(eqn)
            for j, atom in enumerate(eqn.invars):
                if not isinstance(atom, Literal):
                    self.uses[Value(frame, atom)].append(Use(path, j))
            for j, var in enumerate(eqn.outvars):
                self.made[Value(frame, var)] = Use(path, j)
            for number, body in enumerate(inside):
                below = (*path, number)
                self.constants |= {Value(below, var) for var in body.jaxpr.constvars}
                changing = _changing(eqn, body)
                for operand, var in zip(body.operands, body.jaxpr.invars, strict=True):
                    self._link(eqn.invars[operand], frame, var, below, back=var not in changing)
                for atom, result in zip(body.jaxpr.outvars, body.results, strict=True):
                    if result >= 0:
                        self._link(atom, below, eqn.outvars[result], frame)
                self._visit(body.jaxpr, below)

    def _link(self, source: Var | Literal, frame: Path, target: Var, into: Path, back: bool = True) -> None:
        if not isinstance(source, Literal):
            a, b = Value(frame, source), Value(into, target)
            self.after[a].append(b)
            if back:
                self.before[b].append(a)

    def operands(self, path: Path) -> list[Value | None]:
        """Operands of an equation; None for a literal."""
        return [None if isinstance(a, Literal) else Value(path[:-1], a) for a in self.equations[path].invars]

    def results(self, path: Path) -> list[Value]:
        """Results of an equation."""
        return [Value(path[:-1], var) for var in self.equations[path].outvars]

    def maker(self, value: Value) -> tuple[Use, JaxprEqn] | None:
        """The equation that computes a value; None for an input, and where it comes out of a body."""
        use = self.made.get(value)
        if use is None or bodies(eqn := self.equations[use.path]):
            return None
        return use, eqn

    def lifted(self, value: Value) -> Value:
        """The same value where it stands outermost: as the result of the call that returns it."""
        while len(value.frame) >= 2:
            around = value.frame[:-1]
            eqn = self.equations[around]
            out = [v for v in self.after[value] if v.frame == around[:-1] and self.made[v].path == around]
            if not out or tag(eqn) in ("scan", "while", "cond", "shard_map"):
                break
            value = out[0]
        return value

    def back(
        self, start: Iterable[Value], through: Callable[[JaxprEqn], bool], most: int = 400
    ) -> Iterator[Value]:
        """Values that the given ones are made from, nearest first, going back through some equations only."""
        queue, seen = deque(start), set()
        while queue and len(seen) < most:
            value = queue.popleft()
            if value in seen:
                continue
            seen.add(value)
            yield value
            queue.extend(self.before[value])
            made = self.maker(value)
            if made and through(made[1]):
                queue.extend(v for v in self.operands(made[0].path) if v is not None)

    def parameter(self, value: Value) -> Value | None:
        """The input, or closed-over constant, of which a value is a view, a cast or a simple function."""
        return next(self._ends(value), None)

    def weights(self, value: Value) -> Value | None:
        """The same for the weights of a matmul: an input at least as large, not the scale of a norm."""
        size = math.prod(shape_of(value.var))
        return next((v for v in self._ends(value) if math.prod(shape_of(v.var)) >= size), None)

    def _ends(self, value: Value) -> Iterator[Value]:
        near = self.back([value], lambda eqn: tag(eqn) in _STILL_THE_PARAMETER)
        return (v for v in near if v in self.inputs or v in self.constants)

    def origin(self, value: Value) -> Value:
        """The outermost name of a value that was only handed on, cast or not."""
        *_, last = self.back([value], lambda eqn: tag(eqn) == "convert_element_type", most=50)
        return last


def _changing(eqn: JaxprEqn, body: Body) -> set[Var]:
    """Inputs of a loop's body that differ from turn to turn."""
    if tag(eqn) == "scan":
        first, carries = scan_split(eqn)
    elif tag(eqn) == "while" and body.results[0] >= 0:
        first, carries = eqn.params["body_nconsts"], len(body.jaxpr.outvars)
    else:
        return set()
    pairs = zip(body.jaxpr.invars[first : first + carries], body.jaxpr.outvars, strict=False)
    return {before for before, after in pairs if before is not after}
