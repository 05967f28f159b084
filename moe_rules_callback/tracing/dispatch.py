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

import jax.numpy as jnp

from .flow import Flow, Use, Value
from .logits import ELEMENTWISE, Chain
from .walk import Path, dtype_of, shape_of, tag

Onward = list[tuple[Value, str]]  # what to follow next, and what it is

_COMPARED = "compared with an argument, as an accuracy is"
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge"}
MOVES = {
    *("reshape", "broadcast_in_dim", "squeeze", "transpose", "slice", "concatenate", "convert_element_type"),
    *("dynamic_slice", "rev", "pad", "copy", "copy_p", "stop_gradient", "optimization_barrier", "split"),
    *("sharding_constraint", "all_gather", "all_to_all", "pvary", "pcast", "device_put", "psum", "name"),
    *("reshard", "mesh_cast", "unstack", "all_gather_invariant", "psum_invariant", "ppermute"),
}
_SUMS = {"reduce_sum", "reduce_max", "reduce_or", "cumsum", "reduce_min", "reduce_and", "cummax", "argmax"}
_RANDOM = {"random_bits", "threefry2x32", "rng_uniform", "rng_bit_generator", "random_gamma", "random_wrap"}


def is_random(flow: Flow, value: Value) -> bool:
    """Whether a value is made of random bits, by elementwise operations."""
    through = ELEMENTWISE | MOVES | _RANDOM | {"bitcast_convert_type", "shift_right_logical", "or", "xor"}
    near = flow.back([value], lambda eqn: tag(eqn) in through, most=200)
    return any((made := flow.maker(v)) and tag(made[1]) in _RANDOM for v in near)


class Dispatch:
    """The forward search from one selection.

    Args:
        chain: the way of the scores to the selection.
        choices: how many there are to choose from.
        may_choose_tokens: whether the choice can be one among tokens, by the experts.

    Attributes:
        found: the primitive that dispatches and its place, or None.
        by_choice: the chosen indices themselves do it, not the order that a sort of them gives.
        seen: what was met instead, in words for the reader.
    """

    def __init__(
        self, flow: Flow, selection: Path, chain: Chain, choices: int, may_choose_tokens: bool
    ) -> None:
        self._flow, self._choices = flow, choices
        self._scores = {step.value for step in chain.steps}
        start = [chain.weights] if may_choose_tokens else []
        self._tokens = set(flow.back(start, lambda eqn: tag(eqn) in MOVES))
        self.found: tuple[str, Path] | None = None
        self.by_choice = False
        self.seen: list[str] = []
        for result in flow.results(selection):
            integer = jnp.issubdtype(dtype_of(result.var), jnp.integer)
            if not self.found:
                self._follow(result, "index" if integer else "value")

    def _follow(self, start: Value, role: str) -> None:
        """Follows a value, which is an index, the order of sorted indices, a mask or a chosen value."""
        queue, done = deque([(start, role)]), set()
        while queue and self.found is None and len(done) < 2000:
            value, role = queue.popleft()
            if (value, role) in done:
                continue
            done.add((value, role))
            queue.extend((v, role) for v in self._flow.after[value])
            for use in self._flow.uses[value]:
                queue.extend(self._step(use, role))
                if self.found:
                    self.by_choice = role == "index"
                    break

    def _step(self, use: Use, role: str) -> Onward:
        kind, results = tag(self._flow.equations[use.path]), self._flow.results(use.path)
        onward = [(v, role) for v in results]
        if kind in MOVES:
            return self._step_move(use, kind, role, onward)
        if role == "mask":
            return self._step_mask(use, kind, onward)
        if role != "value":
            return self._step_index(use, kind, onward)
        if kind in _COMPARISONS:
            return [(v, "mask") for v in results]
        return onward if kind in ("reduce_min", "min") else []

    def _step_move(self, use: Use, kind: str, role: str, onward: Onward) -> Onward:
        is_index = role in ("index", "order")
        if is_index and kind == "dynamic_slice" and use.number and self._is_data(use.path, 0):
            return self._reads(use.path, kind)
        if is_index and jnp.issubdtype(dtype_of(onward[0][0].var), jnp.floating):
            return self._ends("used as a number")
        return [onward[use.number]] if kind == "optimization_barrier" else onward

    def _step_index(self, use: Use, kind: str, onward: Onward) -> Onward:
        if kind == "gather":
            if use.number == 0:
                return onward
            if self._is_data(use.path, 0):
                return self._reads(use.path, kind)
            integer = jnp.issubdtype(dtype_of(onward[0][0].var), jnp.integer)
            return onward if integer else self._ends("used to read the chosen scores")
        if kind.startswith("scatter"):
            if use.number == 1 and self._is_data(use.path, 2):
                return self._dispatches(kind, use.path)
            return [*onward, *_as_mask(onward)]  # counts, or ones put where the choice is
        if kind.startswith("ragged_"):
            return self._dispatches(kind.removesuffix("_general"), use.path)
        if kind == "cond":
            return self._dispatches("switch", use.path) if use.number == 0 else []
        if kind in _COMPARISONS:
            other = self._flow.operands(use.path)[1 - use.number]
            if other is not None and self._is_iota(other):
                return _as_mask(onward)
            return self._ends(_COMPARED) if self._is_argument(other) else onward
        if kind == "select_n" and use.number == 0:  # a vmapped switch
            cases = range(1, len(self._flow.operands(use.path)))
            if any(self._is_data(use.path, k) for k in cases):
                return self._dispatches("switch", use.path)
            return onward
        if kind == "sort":
            return [(v, "order") for v, _ in onward]
        return onward if kind in ELEMENTWISE | _SUMS or kind == "dynamic_update_slice" else []

    def _step_mask(self, use: Use, kind: str, onward: Onward) -> Onward:
        operands = self._flow.operands(use.path)
        if kind == "dot_general":
            with_data = self._is_data(use.path, 1 - use.number)
            return self._dispatches("one-hot matmul", use.path) if with_data else onward
        if kind in ("mul", "select_n"):
            if any(self._is_data(use.path, k) for k in range(len(operands)) if k != use.number):
                return self._dispatches("product with a mask", use.path)
            return onward
        if kind in ("gather", "sort", "cond") or kind.startswith(("scatter", "ragged_")):
            return self._step_index(use, kind, onward)
        if kind in _COMPARISONS and any(self._is_argument(v) for v in operands):
            return self._ends(_COMPARED)
        return onward if kind in ELEMENTWISE | _SUMS else []

    def _reads(self, path: Path, kind: str) -> Onward:
        """A dispatch, unless rows (not matrices) of a parameter with one row per choice are read."""
        table, eqn = self._flow.operands(path)[0], self._flow.equations[path]
        assert table is not None  # it holds data
        near = set(self._flow.back([table], lambda eqn: tag(eqn) in MOVES))
        is_parameter = near & (self._flow.inputs.keys() | self._flow.constants) and not near & self._tokens
        rows = sum(size > 1 for size in eqn.params["slice_sizes"]) < 2
        if rows and is_parameter and self._choices in shape_of(table.var):
            return self._ends("used to read a row of a table, as a token's embedding is")
        return self._dispatches(kind, path)

    def _dispatches(self, what: str, path: Path) -> Onward:
        self.found = what, path
        return []

    def _ends(self, what: str) -> Onward:
        if what not in self.seen:
            self.seen.append(what)
        return []

    def _is_argument(self, value: Value | None) -> bool:
        """Whether a value is an argument of the function, perhaps reshaped: labels."""
        near = self._flow.back([value] if value else [], lambda eqn: tag(eqn) in MOVES)
        return any(v in self._flow.inputs for v in near)

    def _is_iota(self, value: Value) -> bool:
        near = self._flow.back([value], lambda eqn: tag(eqn) in MOVES, most=20)
        return any((made := self._flow.maker(v)) and tag(made[1]) == "iota" for v in near)

    def _is_data(self, path: Path, operand: int) -> bool:
        """Whether an operand holds floats that are neither constants, nor random, nor the scores."""
        value = self._flow.operands(path)[operand]
        if value is None or not shape_of(value.var) or not jnp.issubdtype(dtype_of(value.var), jnp.floating):
            return False
        near = list(self._flow.back([value], lambda eqn: tag(eqn) in ELEMENTWISE | MOVES | _SUMS, most=100))
        if not self._scores.isdisjoint(near):
            return False
        made = [self._flow.maker(v) for v in near]
        computed = any(m and tag(m[1]) not in ELEMENTWISE | MOVES | _SUMS | {"iota"} for m in made)
        given = (v for v in near if v in self._flow.inputs or v in self._flow.constants)
        return computed or any(jnp.issubdtype(dtype_of(v.var), jnp.floating) for v in given)


def _as_mask(onward: Onward) -> Onward:
    return [(value, "mask") for value, _ in onward]
