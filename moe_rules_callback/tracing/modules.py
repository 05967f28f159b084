"""Marks the calls of modules while a function is traced.

Around every call of a Linen or NNX module stands `jax.named_scope("module_call:17")`; jax keeps the scope
with each equation, and number 17 tells the module's type, path and attributes. Linen's method interception is
made for this. NNX has none, so a profile function of Python watches for its calls: nothing of NNX is changed.

A framework that was not imported is not looked for. A function that was jitted and called before is not
traced again by jax and shows no modules inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
import numpy as np

_SCOPE = "module_call:"
_numbers = itertools.count()
# For good: jax keeps the traces of jitted functions, with the numbers in them.
_calls: dict[int, ModuleCall] = {}


@dataclasses.dataclass(frozen=True)
class ModuleCall:
    """One call of a module: class name, path from the root, method, and what it was configured with."""

    type: str
    path: tuple[str, ...]
    method: str
    attributes: dict[str, str]


def call_in_scope(scope: str) -> ModuleCall | None:
    """The call that a scope of this name stands for."""
    return _calls[int(scope.removeprefix(_SCOPE))] if scope.startswith(_SCOPE) else None


@contextlib.contextmanager
def marked_modules() -> Iterator[None]:
    """Calls of modules are marked inside."""
    with contextlib.ExitStack() as stack:
        if linen := sys.modules.get("flax.linen"):
            stack.enter_context(linen.intercept_methods(_intercept))
        if nnx := sys.modules.get("flax.nnx"):
            stack.enter_context(_watching(nnx))
        yield


def _scope(module: Any, path: tuple[Any, ...], method: str, fields: dict[str, Any]) -> Any:
    number = next(_numbers)
    attributes = {k: text for k, v in fields.items() if v is not None and (text := as_text(v))}
    _calls[number] = ModuleCall(type(module).__name__, tuple(map(str, path)), method, attributes)
    return jax.named_scope(f"{_SCOPE}{number}")


def _intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    module, method = context.module, context.method_name
    if method == "setup":
        return run(*args, **kwargs)
    names = [f.name for f in dataclasses.fields(module) if f.name not in ("name", "parent")]
    with _scope(module, module.path, method, {n: getattr(module, n) for n in names}):
        return run(*args, **kwargs)


@contextlib.contextmanager
def _watching(nnx: Any) -> Iterator[None]:
    previous = sys.getprofile()
    paths: dict[int, tuple[tuple[Any, ...], Any]] = {}  # and the module, so that its id is not used again
    entered: dict[int, Any] = {}

    def watch(frame: FrameType, event: Any, arg: Any) -> None:
        if previous is not None:
            previous(frame, event, arg)
        code = frame.f_code
        if code.co_name != "__call__" or code.co_flags & inspect.CO_GENERATOR:
            return
        if event == "call" and code.co_argcount:
            module = frame.f_locals.get(code.co_varnames[0])
            if isinstance(module, nnx.Module):
                if id(module) not in paths:
                    paths.update({id(node): (path, node) for path, node in nnx.iter_graph(module)})
                scope = _scope(module, paths[id(module)][0], "__call__", vars(module))
                entered[id(frame)] = scope
                scope.__enter__()
        elif event == "return" and (scope := entered.pop(id(frame), None)):
            scope.__exit__(None, None, None)

    sys.setprofile(watch)
    try:
        yield
    finally:
        sys.setprofile(previous)


def as_text(value: Any) -> str | None:
    """A setting as the text of an XML attribute; None for arrays, modules and the like."""
    if isinstance(value, np.dtype) or (isinstance(value, type) and issubclass(value, np.generic)):
        return np.dtype(value).name
    if isinstance(value, bool | int | float | str | np.generic) or value is None:
        return str(value)
    if isinstance(value, tuple | list):
        parts = [as_text(part) for part in value]
        return None if None in parts else f"({', '.join(map(str, parts))})"
    return None
