"""Receivers of records. Each is a plugin with `on_train_start`, `on_records` and `on_train_end`.

    RuleAuditCallback(rules, logdir="runs/demo", sinks=["zarr", "tensorboard", "console"])
    RuleAuditCallback(rules, sinks=[ZarrSink("my.zarr"), CluSink(writer)])
    RuleAuditCallback(rules, sinks=[writer])       # a CLU writer as it is

Nothing is imported before it is used: naming a sink here costs no tensorboardX and no zarr.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import PluginError, UnknownNameError, closest
from ..hookspecs import PROJECT

if TYPE_CHECKING:
    from .clu import CluSink, TensorBoardXWriter
    from .console import ConsoleSink
    from .tensorboard import TensorBoardSink
    from .zarr import ZarrSink

__all__ = ["CluSink", "ConsoleSink", "TensorBoardSink", "TensorBoardXWriter", "ZarrSink", "make_sink"]

_MODULES = {
    "CluSink": "clu",
    "ConsoleSink": "console",
    "TensorBoardSink": "tensorboard",
    "TensorBoardXWriter": "clu",
    "ZarrSink": "zarr",
}
_NAMED = {"console": "ConsoleSink", "tensorboard": "TensorBoardSink", "zarr": "ZarrSink"}


def make_sink(spec: Any) -> Any:
    """The sink that is meant by a name, a writer of scalars, or a plugin.

    Args:
        spec: "tensorboard", "zarr" or "console"; an object with `write_scalars(step, scalars)`, which
            a `CluSink` wraps; or an object with methods marked `hookimpl`, which is returned.

    Raises:
        UnknownNameError: no sink goes by this name.
        PluginError: the object is none of these.
    """
    if isinstance(spec, str):
        if spec not in _NAMED:
            raise UnknownNameError(
                f"There is no sink {spec!r}.{closest(spec, _NAMED)} There are: {', '.join(_NAMED)}; or pass "
                "an object, such as ZarrSink('my.zarr') or a CLU metric writer."
            )
        return _load(_NAMED[spec])()
    if any(hasattr(getattr(spec, name, None), f"{PROJECT}_impl") for name in dir(spec)):
        return spec
    if callable(getattr(spec, "write_scalars", None)):
        return _load("CluSink")(spec)
    raise PluginError(
        f"{spec!r} cannot receive records: it has neither a method marked with @hookimpl nor "
        "write_scalars(step, scalars). Mark its on_records(self, records) with "
        "moe_rules_callback.hookimpl, or pass the instance if this is a class."
    )


def _load(name: str) -> Any:
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return _load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
