"""Whether what was opened is a whole history: its arrays, and what its attributes say of them.

Whatever reads a history afterwards (verdicts, replay, reports) relies on this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .columns import BOUNDS, SCHEMA_VERSION, columns
from .errors import HistoryError, RulebookError
from .formula import Rule, Var
from .records import Schema
from .rulekeys import MAX_STEP, unfit

if TYPE_CHECKING:
    import xarray as xr

MAX_EXPERTS = 2**20  # of a layer
TEXTS = ("text", "formula", "description", "cause", "next_step")


def damaged(store: Any, what: str) -> HistoryError:
    """The error for a store that cannot be read."""
    return HistoryError(
        f"{store} is damaged: {what}. Usual causes: it was copied in part, or something else wrote into it. "
        "Copy it again; to look at what is left, open it with xarray.open_zarr."
    )


def damage(dataset: xr.Dataset) -> str:
    """What a dataset lacks to be a history, or ""."""
    version = dataset.attrs.get("schema_version", SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        return f"its layout is number {str(version)[:40]}, and this release reads number {SCHEMA_VERSION}"
    return _arrays(dataset) or _attributes(dataset)


def _arrays(dataset: xr.Dataset) -> str:
    for column in columns(Schema((), (), (), experts=int("expert" in dataset.dims))):
        if column.name not in dataset.variables:
            return f"the array {column.name} is missing"
        found = dataset[column.name]
        if found.dims != column.dims or found.dtype != column.dtype:
            have = f"{found.dtype} {list(map(str, found.dims))}"
            return f"the array {column.name} is {have}, not {column.dtype} {list(column.dims)}"
    for name in ("rule", "signal", "layer", "bound"):
        if name not in dataset.coords or (len(dataset[name]) and dataset[name].dtype.kind != "U"):
            return f"the names in {name} are missing"
    if dataset["bound"].values.tolist() != list(BOUNDS):
        return "the array bound does not say lower, upper"
    return ""


def _attributes(dataset: xr.Dataset) -> str:
    told: dict[str, Any] = {}
    optional = {"predicates": "{}", "routers": "[]"}  # older releases wrote none
    for name in ("rules", "signals", "config", *optional):
        kind = list if name == "routers" else dict
        try:
            told[name] = json.loads(dataset.attrs.get(name, optional.get(name)))
        except (ValueError, TypeError, RecursionError):
            told[name] = None
        if not isinstance(told[name], kind):
            return f"the attribute {name} is no JSON {'list' if kind is list else 'object'}"
    for version in ("moe_rules_callback_version", "jax_version", "numpy_version"):
        if not isinstance(dataset.attrs.get(version), str):
            return f"the attribute {version} is missing"
    for name in dataset["rule"].values.tolist():
        if not _is_rule(name, told["rules"].get(name)):
            return f"the attribute rules does not say what {name[:80]!r} is"
    for name in dataset["signal"].values.tolist():
        if not _is_signal(told["signals"].get(name)):
            return f"the attribute signals does not say what {name[:80]!r} is"
    for name, predicate in told["predicates"].items():
        if reason := unfit(predicate):
            return f"the attribute predicates says of {name[:80]!r} that {reason}"
    if not all(map(_is_size, told["routers"])):
        return "the attribute routers is no list of experts and experts per token"
    return ""


def _is_rule(name: str, told: Any) -> bool:
    try:
        Rule(name, Var(""), told["threshold"], kind=told["kind"], severity=told["severity"])
        warmup, texts = told["warmup"], [told[text] for text in TEXTS]
    except (KeyError, TypeError, RulebookError):
        return False
    return type(warmup) is int and 0 <= warmup <= MAX_STEP and all(isinstance(text, str) for text in texts)


def _is_signal(told: Any) -> bool:
    kinds = {"long_name": str, "units": str, "per_layer": bool}
    return isinstance(told, Mapping) and all(isinstance(told.get(key), kind) for key, kind in kinds.items())


def _is_size(told: Any) -> bool:
    """[E, k], where k may be None."""
    if not (isinstance(told, list) and len(told) == 2):
        return False
    experts, k = told
    return type(experts) is int and 0 <= experts <= MAX_EXPERTS and (k is None or (type(k) is int and k > 0))
