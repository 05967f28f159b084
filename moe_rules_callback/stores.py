"""The zarr stores of a log directory: which there are, what they hold, which can be continued."""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from .columns import attributes, coordinates
from .errors import HistoryError
from .paths import AnyPath, is_there, names_in, zarr_store
from .records import ARRAYS, Records, Schema

if TYPE_CHECKING:
    import zarr

CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "zstd", "configuration": {"level": 0, "checksum": False}},
]
# What zarr raises over what something else wrote.
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, RuntimeError, HistoryError)


def stores(wanted: AnyPath) -> list[AnyPath]:
    """The stores that go by this name, oldest first: audit.zarr, audit-2.zarr, ..."""
    named = (path for _, path in sorted(numbered(wanted).items()))
    return [path for path in named if is_there(path / "zarr.json")]


def written_rows(store: AnyPath) -> int:
    """How many rows of a store are whole.

    Raises:
        HistoryError: it is no history.
    """
    step = arrays(store).get("step")
    if step is None:
        raise HistoryError(
            f"{store} is not a history of moe_rules_callback: it has no array `step`. open_history reads "
            "what ZarrSink wrote; other zarr stores open with xarray.open_zarr."
        )
    chunk = step.chunks[0]  # those that are written are the first ones
    begins = range(0, step.shape[0], chunk)
    after = bisect_left(begins, True, key=lambda begin: cast(np.ndarray, step[begin]) < 0)
    if after == 0:
        return 0
    last = np.asarray(step[begins[after - 1] : begins[after - 1] + chunk])
    return begins[after - 1] + int((last >= 0).sum())


def held(store: AnyPath, records: Records) -> int:
    """How many of these rows, from the first on, a store of their schema holds, see `Records.held`."""
    known = arrays(store)
    steps = np.asarray(known["step"][: written_rows(store)])
    found = np.flatnonzero(steps == records.step[0])
    if not len(found):
        return 0
    rows = slice(int(found[-1]), int(found[-1]) + len(records))
    number = len(steps[rows])
    stored = {name: np.asarray(known[name][rows])[:number] for name in ARRAYS if name in known}
    no_experts = np.zeros((number, *records.expert_share.shape[1:]), np.float32)
    return Records(records.schema, **({"expert_share": no_experts} | stored)).held(records)


def arrays(store: AnyPath, mode: Literal["r", "r+"] = "r") -> dict[str, zarr.Array]:
    """The arrays of a store by name."""
    import zarr

    from .guarded import Guarded

    opened = Guarded(zarr_store(store, read_only=True)) if mode == "r" else zarr_store(store)
    return dict(zarr.open_group(opened, mode=mode, zarr_format=3).arrays())


def numbered(wanted: AnyPath) -> dict[int, AnyPath]:
    """All that goes by this name, whole or not."""
    pattern = re.compile(re.escape(wanted.stem) + r"(?:-(\d+))?" + re.escape(wanted.suffix))
    found = (pattern.fullmatch(name) for name in names_in(wanted.parent))
    return {int(match[1] or 1): wanted.with_name(match[0]) for match in found if match}


def misfit(store: AnyPath, schema: Schema) -> str:
    """Why the rows of `schema` cannot be appended to a store, or ""."""
    try:
        return _misfit(store, schema)
    except OSError:
        raise
    except DAMAGE as error:  # file systems raise others, and are asked again
        return f"it is damaged ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _misfit(store: AnyPath, schema: Schema) -> str:
    import zarr

    from .guarded import Guarded

    told = json.loads((store / "zarr.json").read_bytes()).get("consolidated_metadata", {}).get("metadata", {})
    if "step" in told and (codecs := told["step"]["codecs"]) != CODECS:
        return f"its chunks are encoded by {codecs}"
    opened = Guarded(zarr_store(store, read_only=True))
    group = zarr.open_group(opened, mode="r", zarr_format=3, use_consolidated=False)
    known = dict(group.arrays())
    if "step" not in known:
        return "it is not a history of this package"
    old, new = json.loads(str(group.attrs["rules"])), json.loads(attributes(schema, {})["rules"])
    for name in old | new:
        if name not in old or name not in new:
            return f"rule {name!r} is {'new' if name in new else 'gone'}"
        for what in ("text", "formula", "threshold", "kind"):
            if old[name][what] != new[name][what]:
                return f"the {what} of rule {name!r} was {old[name][what]!r} and is {new[name][what]!r}"
    old, new = (json.loads(str(each["predicates"])) for each in (group.attrs, attributes(schema, {})))
    for name in old.keys() & new.keys():
        if odd := [key for key in new[name] if old[name].get(key) != new[name][key]]:
            return (
                f"the {odd[0]} of predicate {name!r} was {old[name].get(odd[0])} and is {new[name][odd[0]]}"
            )
    for name, values in coordinates(schema).items():
        before = np.asarray(known[name][:]).tolist() if name in known else []
        if before != values.tolist():
            return f"the {name}s were {_few(before)} and are {_few(values.tolist())}"
    if bool(schema.experts) != ("expert" in known):
        return "experts were recorded and are not"
    return "" if told else "its zarr.json does not tell the metadata of its arrays"


def _few(values: list[Any]) -> str:
    shown = ", ".join(map(str, values[:4])) or "none"
    return f"{shown}, .. ({len(values)})" if len(values) > 4 else shown
