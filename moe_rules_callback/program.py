"""Rules compiled to a few array operations: all connectives of one depth are one gather and one sum.

    program = Program([parse_formula("a & ~b"), parse_formula("once[8](a) -> b")])
    program.atoms                              # ("a", "b")
    state = program.init(layers=1)
    state, truth = program.update(state, atoms, bad, row=0, step=0)   # truth [rules, layers, 2]

The nodes of all formulas are merged where they are equal, sorted by depth, and evaluated depth by depth
into one growing array [nodes, layers, 2]. So a hundred rules compile and run about as fast as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from . import logic
from .formula import After, Always, Connective, Formula, Not, Once, Previously, Since, Var, children
from .temporal import UNKNOWN, Operator, Windows

States = tuple[tuple[jax.Array, ...], ...]


@dataclass
class _Stage:
    """Nodes of one depth and one sort. `operands` [nodes, fan-in] index the array of all nodes."""

    operands: np.ndarray
    members: np.ndarray  # bool [nodes, atoms]: which atoms a node rests on


@dataclass
class _Affine(_Stage):
    bias: np.ndarray
    coefficient: np.ndarray
    corner: np.ndarray


@dataclass
class _Pair(_Stage):
    connect: Callable[[jax.Array, jax.Array], jax.Array]


@dataclass
class _Gate(_Stage):
    step: np.ndarray


@dataclass
class _Past(_Stage):
    windows: Windows


class Program:
    """Formulas over named atoms, evaluated together.

    Args:
        formulas: one for each rule.

    Attributes:
        atoms: the predicates that occur, in order of first occurrence.
        stages: length of the states.
    """

    def __init__(self, formulas: Sequence[Formula]) -> None:
        formulas = [_simplify(formula) for formula in formulas]
        depth: dict[Formula, int] = {}
        for formula in formulas:
            _measure(formula, depth)
        names = [node.name for node in depth if isinstance(node, Var)]
        self.atoms: tuple[str, ...] = tuple(names)
        self._index: dict[Formula, int] = {Var(name): i for i, name in enumerate(names)}
        self._members: list[np.ndarray] = list(np.eye(len(names), dtype=bool))
        self._stages: list[_Stage] = []
        for level in range(1, max(depth.values(), default=0) + 1):
            nodes = [node for node, d in depth.items() if d == level]
            self._add([n for n in nodes if _is_affine(n)], self._affine)
            for kind in _PAIRS:
                self._add([n for n in nodes if isinstance(n, Connective) and n.kind == kind], self._pair)
            self._add([n for n in nodes if isinstance(n, After)], self._gate)
            self._add([n for n in nodes if isinstance(n, Always | Once | Since)], self._past)
            self._add([n for n in nodes if isinstance(n, Previously)], _Stage)
        self._rules = np.array([self._index[formula] for formula in formulas], int)

    @property
    def stages(self) -> int:
        return len(self._stages)

    def init(self, layers: int) -> States:
        """State before the first row."""
        states: list[tuple[jax.Array, ...]] = []
        for stage in self._stages:
            match stage:
                case _Past():
                    states.append(stage.windows.init(layers))
                case _Affine() | _Pair() | _Gate():
                    states.append(())
                case _:
                    states.append((jnp.broadcast_to(UNKNOWN, (len(stage.operands), layers, 2)),))
        return tuple(states)

    def update(
        self, states: States, atoms: jax.Array, bad: jax.Array, row: jax.Array, step: jax.Array
    ) -> tuple[States, jax.Array]:
        """Take in one row.

        Args:
            states: of `init` or the row before.
            atoms: float32 [atoms, layers, 2], truth intervals of the predicates.
            bad: bool [atoms, layers]: the metric under a predicate was not finite. Everything that
                rests on it is [0, 1] in this row and is passed over by later windows.
            row: int32, number of rows before this one.
            step: int32, number of the training step.

        Returns:
            The new states and the truth of the rules, float32 [rules, layers, 2].
        """
        values = atoms
        new: list[tuple[jax.Array, ...]] = []
        for stage, state in zip(self._stages, states, strict=True):
            operands = values[stage.operands]  # [nodes, fan-in, layers, 2]
            match stage:
                case _Affine():
                    x = jnp.moveaxis(operands, 1, 2)
                    rows = (stage.bias[:, None], stage.coefficient[:, None], stage.corner[:, None])
                    truth = logic.affine(*rows, x)
                case _Pair():
                    truth = stage.connect(operands[:, 0], operands[:, 1])
                case _Gate():
                    early = step < stage.step[:, None, None]
                    truth = jnp.where(early, UNKNOWN, operands[:, 0])
                case _Past():
                    skip = _any(stage.members, bad)
                    state, truth = stage.windows.update(state, operands[:, 0], operands[:, -1], skip, row)
                case _:
                    skip = _any(stage.members, bad)[..., None]
                    truth = jnp.where(skip, UNKNOWN, state[0])
                    state = (jnp.where(skip, state[0], operands[:, 0]),)
            new.append(state)
            values = jnp.concatenate([values, truth])
        members = np.array([self._members[i] for i in self._rules]).reshape(len(self._rules), len(self.atoms))
        unknown = _any(members, bad)[..., None]
        return tuple(new), jnp.where(unknown, UNKNOWN, values[self._rules])

    def _add(self, nodes: list, build) -> None:
        if not nodes:
            return
        members = np.array([self._rests_on(node) for node in nodes])
        groups = [[self._index[child] for child in _operands(node)] for node in nodes]
        width = max(map(len, groups))
        padded = np.array([group + group[-1:] * (width - len(group)) for group in groups])
        stage = build(padded, members) if build is _Stage else build(nodes, padded, members)
        for node, row in zip(nodes, members, strict=True):
            self._index[node] = len(self._index)
            self._members.append(row)
        self._stages.append(stage)

    def _rests_on(self, node: Formula) -> np.ndarray:
        return np.any([self._members[self._index[child]] for child in _operands(node)], axis=0)

    def _affine(self, nodes: list[Not | Connective], operands: np.ndarray, members: np.ndarray) -> _Stage:
        bias = np.empty(len(nodes), np.float32)
        coefficient, corner = np.zeros(operands.shape, np.float32), np.zeros(operands.shape, np.float32)
        for i, node in enumerate(nodes):
            kind, weights = ("not", (1.0,)) if isinstance(node, Not) else (node.kind, node.weights)
            bias[i], *rows = logic.coefficients(kind, weights)
            for j, (child, c, at) in enumerate(zip(children(node), *rows, strict=True)):
                # A negated operand is seen from the other corner: c ((1 - x) - at) = -c (x - (1 - at)).
                coefficient[i, j], corner[i, j] = (-c, 1 - at) if isinstance(child, Not) else (c, at)
        return _Affine(operands, members, bias, coefficient, corner)

    def _pair(self, nodes: list[Connective], operands: np.ndarray, members: np.ndarray) -> _Stage:
        return _Pair(operands, members, _PAIRS[nodes[0].kind])

    def _gate(self, nodes: list[After], operands: np.ndarray, members: np.ndarray) -> _Stage:
        return _Gate(operands, members, np.array([node.step for node in nodes], np.int32))

    def _past(self, nodes: list[Always | Once | Since], operands: np.ndarray, members: np.ndarray) -> _Stage:
        windows = Windows([(_OPERATOR[type(node)], node.rows) for node in nodes])
        return _Past(operands, members, windows)


# Made of other connectives; written out as such, a chain of n would be a tree of 2^n nodes.
_PAIRS = {"iff": logic.equivalence, "xor": logic.exclusive_disjunction}
_OPERATOR: dict[type, Operator] = {Always: "always", Once: "once", Since: "since"}


def _any(members: np.ndarray, bad: jax.Array) -> jax.Array:
    """bool [nodes, layers]: does a node rest on an atom [atoms, layers] that is bad?"""
    return jnp.asarray(members, jnp.float32) @ bad.astype(jnp.float32) > 0


def _is_affine(node: Formula) -> bool:
    """Whether a node is one clamped affine map of its operands."""
    return isinstance(node, Not) or (isinstance(node, Connective) and node.kind not in _PAIRS)


def _operands(node: Formula) -> tuple[Formula, ...]:
    """Operands as they are evaluated: under an affine connective a negation is seen through."""
    if _is_affine(node):
        return tuple(child.operand if isinstance(child, Not) else child for child in children(node))
    return children(node)


def _simplify(node: Formula) -> Formula:
    """Drop double negations."""
    match node:
        case Var():
            return node
        case Not(Not(inner)):
            return _simplify(inner)
        case Connective(kind, operands, weights):
            return Connective(kind, tuple(map(_simplify, operands)), weights)
        case Since(rows, left, right):
            return Since(rows, _simplify(left), _simplify(right))
        case _:
            return replace(node, operand=_simplify(node.operand))


def _measure(node: Formula, depth: dict[Formula, int]) -> int:
    """Depth of each node over the atoms, negations under a connective not counted."""
    if node not in depth:
        below = [_measure(child, depth) for child in _operands(node)]
        depth[node] = 1 + max(below) if below else 0
    return depth[node]
