"""What a history holds, told once; the zarr store and the dataset in memory are both built from it.

    for column in columns(schema):
        column.name, column.dims, column.dtype, column.fill, column.attrs
        getattr(records, column.name)          its values in a batch of rows
    coordinates(schema)                        rule, bound, signal, layer, expert
    attributes(schema, config)                 what the rules say, units, versions

Attributes that have a structure are JSON text, so that every file format keeps them:

    json.loads(dataset.attrs["rules"])["load_imbalance"]["threshold"]
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from .formula import Rule
from .records import Schema, State

SCHEMA_VERSION = 1
SHARE = "share of assignments an expert gets; of first choices if k is not known"
BOUNDS = ("lower", "upper")


@dataclass(frozen=True)
class Column:
    """One variable over `step`, named like the attribute of `Records` that holds its values.

    Attributes:
        name: of the variable.
        dims: its dimensions; the first is "step".
        dtype: of its values.
        fill: value of rows that are not written.
        attrs: its xarray attributes.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    fill: float
    attrs: Mapping[str, Any]


def columns(schema: Schema) -> tuple[Column, ...]:
    """All variables over `step`; `step` itself, which says that a row is whole, comes last."""
    nan, flags = float("nan"), {}
    flags["flag_values"] = [int(state) for state in State]
    flags["flag_meanings"] = " ".join(state.name.lower() for state in State)
    share = _column(
        "expert_share",
        "layer expert",
        "float32",
        nan,
        SHARE,
    )
    return (
        _column("truth", "rule bound", "float32", nan, "truth interval: any layer for a risk, else all"),
        _column("truth_layer", "rule layer bound", "float32", nan, "truth interval in each layer"),
        _column("state", "rule", "int8", State.NOT_WRITTEN, "what the threshold makes of the truth", **flags),
        _column("signal_value", "signal layer", "float32", nan, "signal in each layer"),
        _column("signal_pooled", "signal", "float32", nan, "signal from statistics averaged over layers"),
        *([share] if schema.experts else []),
        _column("loss", "", "float32", nan, "training loss"),
        _column("wall_time", "", "float64", nan, "Unix time of the row", units="s"),
        _column("step", "", "int64", -1, "training step"),
    )


def _column(name: str, dims: str, dtype: str, fill: float, long_name: str, **attrs: Any) -> Column:
    return Column(name, ("step", *dims.split()), dtype, fill, {"long_name": long_name, **attrs})


def coordinates(schema: Schema) -> dict[str, np.ndarray]:
    """Coordinates that are known before the first row: one-dimensional, named like their dimension."""
    known = {
        "rule": np.array(schema.rule_names, dtype=np.str_),
        "bound": np.array(BOUNDS),
        "signal": np.array(schema.signal_names, dtype=np.str_),
        "layer": np.array(schema.layers, dtype=np.str_),
    }
    return known | ({"expert": np.arange(schema.experts)} if schema.experts else {})


def attributes(schema: Schema, config: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes of the dataset. What JSON cannot hold in `config` is kept as its `str`."""
    return {
        "title": "Audit of Mixture-of-Experts router rules",
        "schema_version": SCHEMA_VERSION,
        "unwritten_rows": "Rows with step = -1 are declared ahead but not written; "
        "moe_rules_callback.open_history leaves them out.",
        "rules": json.dumps({rule.name: _describe(rule) for rule in schema.rules}),
        "signals": json.dumps({signal.name: asdict(signal) for signal in schema.signals}),
        "predicates": json.dumps({name: asdict(each) for name, each in schema.predicates.items()}),
        "routers": json.dumps(schema.routers),
        "config": json.dumps(dict(config), default=str),
        "moe_rules_callback_version": _version("moe-rules-callback"),
        "jax_version": _version("jax"),
        "numpy_version": np.__version__,
    }


def _describe(rule: Rule) -> dict[str, Any]:
    told = ("text", "threshold", "kind", "warmup", "severity", "description", "cause", "next_step")
    return {"formula": str(rule.formula)} | {name: getattr(rule, name) for name in told}


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:  # a bare checkout on the path
        return "unknown"
