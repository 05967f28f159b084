"""What becomes of a selection: does it send tokens to experts, or is it only counted, compared or sampled?

Followed are the indices, as long as they are indices, and masks made of them:

    indices -> gather, scatter, dynamic_slice of data; group sizes of a ragged_dot; the index of a switch
    indices == iota -> one-hot mask -> dot_general, or a product with data
    chosen values -> threshold (>=) -> mask -> the same

A gather out of the scores themselves (the weights of the chosen experts) is no dispatch, nor is one out of
integers (a sampled token).
"""

from __future__ import annotations

from collections import deque
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from .flow import Flow, Use, Value
from .logits import ELEMENTWISE
from .walk import Path, tag

_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
_MOVES = {
    *("reshape", "broadcast_in_dim", "squeeze", "transpose", "slice", "concatenate", "convert_element_type"),
    *("dynamic_slice", "rev", "pad", "copy", "copy_p", "stop_gradient", "optimization_barrier", "split"),
    *("sharding_constraint", "all_gather", "all_to_all", "pvary", "pcast", "device_put", "psum", "name"),
    *("reshard", "mesh_cast", "expand_dims", "all_gather_invariant", "psum_invariant", "ppermute"),
}
_SUMS = {"reduce_sum", "reduce_max", "reduce_or", "cumsum", "reduce_min", "reduce_and", "cummax", "argmax"}
_RANDOM = {"random_bits", "threefry2x32", "rng_uniform", "rng_bit_generator", "random_gamma", "random_wrap"}


def is_random(flow: Flow, value: Value) -> bool:
    """Whether a value is made of random bits, by elementwise operations."""
    through = ELEMENTWISE | _MOVES | _RANDOM | {"bitcast_convert_type", "shift_right_logical", "or", "xor"}
    near = flow.back([value], lambda eqn: tag(eqn) in through, most=200)
    return any((made := flow.maker(v)) and tag(made[1]) in _RANDOM for v in near)


class Dispatch:
    """The forward search from one selection.

    Attributes:
        found: the primitive that dispatches and its place, or None.
        seen: what was met instead, in words for the reader.
    """

    def __init__(self, flow: Flow, selection: Path, operand: Value) -> None:
        self._flow = flow
        self._scores = set(flow.back([operand], lambda eqn: tag(eqn) in ELEMENTWISE | _MOVES | _SUMS))
        self.found: tuple[str, Path] | None = None
        self.seen: list[str] = []
        eqn = flow.equations[selection]
        for number, result in enumerate(flow.results(selection)):
            integer = jnp.issubdtype(result.var.aval.dtype, jnp.integer)
            if tag(eqn) == "sort" and number and integer:
                self._follow(result, "index")
            elif integer:
                self._follow(result, "index")
            elif tag(eqn) != "argmax":
                self._follow(result, "value")
            if self.found:
                break

    def _follow(self, start: Value, role: str) -> None:
        queue, done = deque([(start, role)]), set()
        while queue and self.found is None and len(done) < 2000:
            value, role = queue.popleft()
            if (value, role) in done:
                continue
            done.add((value, role))
            queue.extend((v, role) for v in self._flow.after[value])
            for use in self._flow.uses[value]:
                queue.extend(self._step(use, value, role))
        if self.found is None and not self.seen and role != "value":
            self.seen.append("returned as it is")

    def _step(self, use: Use, value: Value, role: str) -> list[tuple[Value, str]]:
        eqn = self._flow.equations[use.path]
        kind, results = tag(eqn), self._flow.results(use.path)

        def on(role: str) -> list[tuple[Value, str]]:
            return [(v, role) for v in results]

        if kind in _MOVES:
            if role == "index" and kind == "dynamic_slice" and use.index and self._is_data(use.path, 0):
                return self._dispatches("dynamic_slice", use.path)
            floating = jnp.issubdtype(results[0].var.aval.dtype, jnp.floating)
            if role == "index" and kind == "convert_element_type" and floating:
                return self._ends("used as a number")
            return [(results[use.index], role)] if kind == "optimization_barrier" else on(role)
        if role == "value":
            return on("mask") if kind in _COMPARISONS else on(role) if kind in ("reduce_min", "min") else []
        if role == "index":
            return self._step_index(use, eqn, kind, results)
        return self._step_mask(use, kind, results)

    def _step_index(
        self, use: Use, eqn: JaxprEqn, kind: str, results: list[Value]
    ) -> list[tuple[Value, str]]:
        onward = [(v, "index") for v in results]
        if kind == "gather":
            if use.index == 0:
                return onward
            if self._is_data(use.path, 0):
                return self._dispatches("gather", use.path)
            integer = jnp.issubdtype(results[0].var.aval.dtype, jnp.integer)
            return onward if integer else self._ends("used to read the chosen scores")
        if kind.startswith("scatter"):
            if use.index == 1 and self._is_data(use.path, 2):
                return self._dispatches(kind, use.path)
            return [(v, "mask") for v in results] + onward
        if kind in ("ragged_dot", "ragged_dot_general"):
            return self._dispatches("ragged_dot", use.path)
        if kind == "ragged_all_to_all":
            return self._dispatches(kind, use.path)
        if kind == "cond":
            return self._dispatches("switch", use.path) if use.index == 0 else []
        if kind in _COMPARISONS:
            other = self._flow.operands(use.path)[1 - use.index]
            if other is None or self._is_iota(other):
                return [(v, "mask") for v in results] if other else onward
            near = set(self._flow.back([other], lambda eqn: tag(eqn) in _MOVES))
            if near & self._flow.inputs.keys():
                return self._ends("compared with an argument, as an accuracy is")
            return onward
        if kind == "select_n" and use.index == 0:
            return self._step_mask(use, kind, results)
        if kind in ELEMENTWISE | _SUMS or kind in ("sort", "iota", "dynamic_update_slice", "sub"):
            return onward
        return []

    def _step_mask(self, use: Use, kind: str, results: list[Value]) -> list[tuple[Value, str]]:
        onward = [(v, "mask") for v in results]
        if kind == "dot_general":
            other = self._flow.operands(use.path)[1 - use.index]
            return self._dispatches("one-hot matmul", use.path) if other and self._is_float(other) else onward
        if kind in ("mul", "select_n"):
            others = [k for k in range(len(self._flow.operands(use.path))) if k != use.index]
            if any(self._is_data(use.path, k) for k in others):
                return self._dispatches("product with a mask", use.path)
            return onward
        if kind in ("cond", "ragged_dot", "ragged_dot_general"):
            return self._dispatches(kind, use.path)
        if kind in ("gather", "sort") or kind.startswith("scatter"):
            return self._step_index(use, self._flow.equations[use.path], kind, results)
        if kind in _COMPARISONS and any(
            v is not None and v in self._flow.inputs for v in map(self._origin, self._flow.operands(use.path))
        ):
            return self._ends("compared with an argument, as an accuracy is")
        return onward if kind in ELEMENTWISE | _SUMS else []

    def _origin(self, value: Value | None) -> Value | None:
        return None if value is None else self._flow.origin(value)

    def _dispatches(self, what: str, path: Path) -> list[Any]:
        self.found = what, path
        return []

    def _ends(self, what: str) -> list[Any]:
        if what not in self.seen:
            self.seen.append(what)
        return []

    def _is_float(self, value: Value) -> bool:
        return jnp.issubdtype(value.var.aval.dtype, jnp.floating)

    def _is_iota(self, value: Value) -> bool:
        near = self._flow.back([value], lambda eqn: tag(eqn) in _MOVES, most=20)
        return any((made := self._flow.maker(v)) and tag(made[1]) == "iota" for v in near)

    def _is_data(self, path: Path, operand: int) -> bool:
        """Whether an operand holds floats that are neither constants, nor random, nor the scores."""
        value = self._flow.operands(path)[operand]
        if value is None or not self._is_float(value) or not value.var.aval.shape:
            return False
        near = list(self._flow.back([value], lambda eqn: tag(eqn) in ELEMENTWISE | _MOVES | _SUMS, most=100))
        if not self._scores.isdisjoint(near):
            return False
        made = [self._flow.maker(v) for v in near]
        computed = any(m and tag(m[1]) not in ELEMENTWISE | _MOVES | _SUMS | {"iota"} for m in made)
        return computed or any(v in self._flow.inputs or v in self._flow.constants for v in near)
