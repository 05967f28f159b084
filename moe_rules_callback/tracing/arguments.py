"""The arguments of a function as arrays, what is no array, and names for the arrays.

    step(state, batch)  ->  [.., f32[64,8], ..]  named  params/layers/0/moe/router/kernel

Arrays may change from call to call; everything else (numbers of Python, strings, functions) is part of the
function, as under `static_argnums`. Flax NNX objects are split into their state and put together again, so
that what the function changes in them reaches the caller's objects.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.tree_util import (
    FlattenedIndexKey,
    GetAttrKey,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
    tree_unflatten,
)


def is_array(leaf: Any) -> bool:
    """Arrays, tracers and `jax.ShapeDtypeStruct`; no numbers of Python."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _nnx() -> Any:
    return sys.modules.get("flax.nnx")


def _is_object(leaf: Any) -> bool:
    nnx = _nnx()
    return nnx is not None and isinstance(leaf, (nnx.Pytree, nnx.Variable))


class Arguments:
    """One call's arguments, taken apart.

    Attributes:
        arrays: the arrays among the leaves.
        names: of each array its key path without the argument's name, which is added where two arguments
            have the same paths; the argument's name alone where it is an array itself.
        key: what a second call must equal for the same trace to serve it: structure, shapes, static leaves.
    """

    def __init__(self, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        call = (tuple(args), kwargs)
        pairs, self._tree = tree_flatten_with_path(call, is_leaf=_is_object)
        leaves = [leaf for _, leaf in pairs]
        self._objects = [leaf for leaf in leaves if _is_object(leaf)]
        if self._objects:
            self._graph, state = _nnx().split(self._objects)
            inside, self._state_tree = tree_flatten_with_path(state)
        else:
            self._graph, inside, self._state_tree = None, [], None
        self._static = [None if is_array(leaf) or _is_object(leaf) else leaf for leaf in leaves]
        self._dynamic = [is_array(leaf) for leaf in leaves]
        self._object = [_is_object(leaf) for leaf in leaves]
        self.arrays = [leaf for leaf in leaves if is_array(leaf)] + [leaf for _, leaf in inside]
        named = _argument_names(fn, args)
        paths = [_split_path(path, named) for path, leaf in pairs if is_array(leaf)]
        objects = [_split_path(path, named) for path, leaf in pairs if _is_object(leaf)]
        for path, _ in inside:
            argument, above = objects[getattr(path[0], "key", getattr(path[0], "idx", 0))]
            paths.append((argument, _joined(above, _trimmed(path[1:]))))
        self.names = _unique(paths)
        avals = tuple((x.shape, x.dtype, getattr(x, "weak_type", False)) for x in self.arrays)
        self.key = (self._tree, self._state_tree, self._graph, tuple(self._static), avals)

    def abstract(self) -> Arguments:
        """The same without hold on the caller's arrays and objects."""
        copied = copy.copy(self)
        copied._objects = [None] * len(self._objects)
        copied.arrays = [_shape(x) for x in self.arrays]
        return copied

    def call(self, fn: Callable[..., Any], arrays: Sequence[Any]) -> tuple[Any, list[Any]]:
        """fn on the arguments with other arrays in them: (its result, state of the NNX objects after it)."""
        arrays = list(arrays)
        n = sum(self._dynamic)
        plain, objects = iter(arrays[:n]), iter(())
        merged = None
        if self._objects:
            state = tree_unflatten(self._state_tree, arrays[n:])
            merged = _nnx().merge(self._graph, state)
            objects = iter(merged)
        leaves = [
            next(plain) if dynamic else next(objects) if is_object else static
            for dynamic, is_object, static in zip(self._dynamic, self._object, self._static, strict=True)
        ]
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
