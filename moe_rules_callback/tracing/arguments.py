"""The arguments of a function as arrays, what is no array, and names for the arrays.

    step(state, batch)  ->  [.., f32[64,8], ..]  named  params/layers/0/moe/router/kernel

Arrays may change from call to call; everything else (numbers of Python, strings, functions) is part of the
function, as under `static_argnums`. Flax NNX objects are split into their state and put together again, so
that what the function changes in them reaches the caller's objects.
"""

from __future__ import annotations

import copy
import inspect
import operator
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer
from jax.tree_util import (
    FlattenedIndexKey,
    GetAttrKey,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)

_STATIC, _ARRAY, _OBJECT = range(3)
_KINDS: dict[type, int] = {}  # of leaves by their type, where that tells


def is_array(leaf: Any) -> bool:
    """Arrays, tracers and `jax.ShapeDtypeStruct`; no numbers of Python."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _nnx() -> Any:
    return sys.modules.get("flax.nnx")


def _kind(leaf: Any) -> int:
    if (known := _KINDS.get(type(leaf))) is not None:
        return known
    nnx = _nnx()
    is_object = nnx is not None and isinstance(leaf, (nnx.Pytree, nnx.Variable))
    kind = _OBJECT if is_object else _ARRAY if is_array(leaf) else _STATIC
    if not isinstance(leaf, Tracer):  # which may stand for what is no array
        _KINDS[type(leaf)] = kind
    return kind


def _is_object(leaf: Any) -> bool:
    return _kind(leaf) == _OBJECT


class Arguments:
    """One call's arguments, taken apart. Done in each step, perhaps for thousands of arrays; what only a
    trace needs, the names, is made when it is asked for.

    Attributes:
        arrays: the arrays among the leaves.
    """

    def __init__(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._fn, self._call = fn, (tuple(args), kwargs)
        # Python is asked at every node, so only where there may be such objects.
        leaves, self._tree = tree_flatten(self._call, is_leaf=_is_object if _nnx() else None)
        self._kinds = kinds = [_kind(leaf) for leaf in leaves]
        self.arrays = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == _ARRAY]
        self._static = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == _STATIC]
        self._objects = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == _OBJECT]
        self._graph = self._state = self._state_tree = None
        if self._objects:
            self._graph, self._state = _nnx().split(self._objects)
            inside, self._state_tree = tree_flatten(self._state)
            self.arrays += inside
        self._types = [_type(x) for x in self.arrays]

    @cached_property
    def names(self) -> list[str]:
        """Of each array its key path without the argument's name, which is added where two arguments have the
        same paths; the argument's name alone where it is an array itself."""
        pairs = tree_flatten_with_path(self._call, is_leaf=_is_object)[0]
        named = _argument_names(self._fn, self._call[0])
        split = [(kind, _split_path(path, named)) for kind, (path, _) in zip(self._kinds, pairs, strict=True)]
        paths = [path for kind, path in split if kind == _ARRAY]
        objects = [path for kind, path in split if kind == _OBJECT]
        for path, _ in tree_flatten_with_path(self._state)[0]:
            argument, above = objects[getattr(path[0], "key", getattr(path[0], "idx", 0))]
            paths.append((argument, _joined(above, _trimmed(path[1:]))))
        return _unique(paths)

    def serve(self, others: Arguments) -> bool:
        """Whether a trace with these serves others: the same structure, shapes, dtypes and static leaves."""
        mine, theirs = ((x._tree, x._state_tree, x._graph, x._kinds, x._static) for x in (self, others))
        if mine != theirs or len(self._types) != len(others._types):
            return False
        if not all(map(operator.is_, self._types, others._types)):
            for a, b in zip(self._types, others._types, strict=True):
                if (a.shape, a.dtype, a.weak_type) != (b.shape, b.dtype, b.weak_type):
                    return False
            self._types = others._types  # what a step gets from itself has the very same
        return True

    def abstract(self) -> Arguments:
        """The same without hold on the caller's arrays and objects."""
        _ = self.names
        copied = copy.copy(self)
        copied._call, copied._state = ((), {}), None
        copied._objects = [None] * len(self._objects)
        copied.arrays = [_shape(x) for x in self.arrays]
        return copied

    def call(self, fn: Callable[..., Any], arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        """fn on the arguments with other arrays in them: (its result, state of the NNX objects after it)."""
        arrays = list(arrays)
        n = self._kinds.count(_ARRAY)
        merged: Any = None
        if self._objects:
            state = tree_unflatten(self._state_tree, arrays[n:])
            merged = _nnx().merge(self._graph, state)
        of_kind = {_STATIC: iter(self._static), _ARRAY: iter(arrays[:n]), _OBJECT: iter(merged or ())}
        leaves = [next(of_kind[kind]) for kind in self._kinds]
        args, kwargs = tree_unflatten(self._tree, leaves)
        result = fn(*args, **kwargs)
        return result, [] if merged is None else [_nnx().split(merged)[1]]

    def write_back(self, state: list[Any]) -> None:
        """Give the caller's NNX objects the state that the function left."""
        if state:
            _nnx().update(self._objects, state[0])


@dataclass(frozen=True)
class Results:
    """The result of a function without its arrays: its structure, and everything else in it."""

    tree: Any
    dynamic: list[bool]
    static: list[Any]

    def rebuild(self, arrays: Sequence[Any]) -> Any:
        """The result with arrays in it."""
        values = iter(arrays)
        pairs = zip(self.dynamic, self.static, strict=True)
        return tree_unflatten(self.tree, [next(values) if dynamic else static for dynamic, static in pairs])


def taken(result: Any) -> tuple[Results, list[Any]]:
    """(the rest, the arrays) of what a function returned."""
    leaves, tree = tree_flatten(result)
    dynamic = [is_array(leaf) for leaf in leaves]
    static = [None if is_array(leaf) else leaf for leaf in leaves]
    return Results(tree, dynamic, static), [leaf for leaf in leaves if is_array(leaf)]


class _Type(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any
    weak_type: bool


def _type(x: Any) -> Any:
    """JAX's own type of an array, or what else tells shape, dtype and weak_type."""
    aval = getattr(x, "aval", None)
    return _Type(x.shape, x.dtype, getattr(x, "weak_type", False)) if aval is None else aval


def _shape(x: Any) -> jax.ShapeDtypeStruct:
    weak = getattr(x, "weak_type", False)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None), weak_type=weak)


def _argument_names(fn: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    """Names of the positional arguments, `args[3]` where the signature does not tell."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in plain]
    return [names[i] if i < len(names) else f"args[{i}]" for i in range(len(args))]


def _split_path(path: Any, names: Sequence[str]) -> tuple[str, str]:
    """(name of the argument, key path inside it) of a leaf of (args, kwargs)."""
    argument = str(names[path[1].idx] if path[0].idx == 0 else path[1].key)
    return argument, _trimmed(path[2:])


def _trimmed(path: Any) -> str:
    """The key path as text, without what only names the box around an array, such as `.value`."""
    while path and _is_box(path[-1]):
        path = path[:-1]
    return keystr(tuple(path), simple=True, separator="/")


def _joined(*parts: str) -> str:
    return "/".join(part for part in parts if part)


def _is_box(key: Any) -> bool:
    is_value = isinstance(key, GetAttrKey) and key.name in ("value", "raw_value", "data_array")
    return is_value or isinstance(key, FlattenedIndexKey)


def _unique(paths: Sequence[tuple[str, str]]) -> list[str]:
    seen = Counter(path for _, path in paths)
    return [path if path and seen[path] == 1 else _joined(argument, path) for argument, path in paths]
