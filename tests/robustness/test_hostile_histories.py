"""Histories that are damaged, cut off or made to harm: read as they are, or refused by name in one line."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_records as fake
import numpy as np
import pytest
import zarr
from numcodecs.zstd import Zstd

from moe_rules_callback.columns import columns
from moe_rules_callback.errors import HistoryError
from moe_rules_callback.guarded import _content_size
from moe_rules_callback.history import open_history
from moe_rules_callback.logs import read_log
from moe_rules_callback.sinks.zarr import ZarrSink
from moe_rules_callback.stores import misfit
from moe_rules_callback.verdicts import verdicts

ARRAYS = [column.name for column in columns(fake.make_schema())] + ["rule", "signal", "layer", "bound"]
Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("whole")
    fake.feed(ZarrSink(), fake.make_records(20), fake.make_run(run))
    return run


@pytest.fixture
def store(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run")) / "audit.zarr"


def refusal(store: Path) -> str:
    """The one line in which a history is refused, on opening or on reading."""
    with pytest.raises(HistoryError) as caught:
        verdicts(open_history(store.parent).load())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700
    return str(caught.value)


def chunk_of(store: Path, array: str) -> Path:
    return next(path for path in (store / array / "c").rglob("*") if path.is_file())


def changed(path: str, **values: Any) -> Change:
    """Replaces parts of a zarr.json; names that end in _ are attributes."""

    def change(store: Path) -> None:
        file = store / path / "zarr.json"
        told = json.loads(file.read_text())
        for name, value in values.items():
            if name.endswith("_"):
                told["attributes"][name[:-1]] = value
            else:
                told[name] = value
        file.write_text(json.dumps(told))

    return change


def grid(*chunk: int) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": chunk}}


def rules(**fields: Any) -> str:
    told = {"text": "a", "formula": "a", "threshold": 0.8, "kind": "risk", "warmup": 0, "severity": "error"}
    told |= {"description": "", "cause": "", "next_step": ""} | fields
    return json.dumps({rule.name: told for rule in fake.RULES})


def nonsense(content: bytes, path: str = "zarr.json") -> Change:
    return lambda store: (store / path).write_bytes(content)


NO_JSON = "is no JSON object of at most 67,108,864 bytes"
NO_RULE = "the attribute rules does not say what 'expert_specialization' is"
METADATA: list[tuple[Change, str]] = [
    (nonsense(b"not json"), f"zarr.json {NO_JSON}"),
    (nonsense(b""), f"zarr.json {NO_JSON}"),
    (nonsense(b"[" * 100_000), f"zarr.json {NO_JSON}"),
    (nonsense(b"\xff", "truth/zarr.json"), f"truth/zarr.json {NO_JSON}"),
    (nonsense(b"[]", "step/zarr.json"), f"step/zarr.json {NO_JSON}"),
    (changed("truth", shape=[2**62, 4, 2]), "conflicting sizes for dimension 'rule'"),
    (changed("truth", shape=[20, 2**62, 2]), "truth has shape [20, 4611686018427387904, 2], more than"),
    (changed("rule", shape=[2**62]), "rule has shape [4611686018427387904], more than a history can hold"),
    (changed("step", shape=[-5]), "step has shape [-5] in chunks of [4096]"),
    (changed("step", shape=[]), "step has shape [] in chunks of [4096]"),
    (changed("step", shape="x"), "step has shape x in chunks of [4096]"),
    (changed("truth", chunk_grid=grid(0, 6, 2)), "truth has shape [20, 6, 2] in chunks of [0, 6, 2]"),
    (changed("truth", chunk_grid=grid(64)), "truth has shape [20, 6, 2] in chunks of [64]"),
    (changed("truth", chunk_grid=grid(2**40, 6, 2)), "truth has chunks of 52,776,558,133,248 bytes"),
    (changed("truth", chunk_grid=grid(7, 3, 1)), "the chunk truth/c/0/0/0 says that it holds 196,608 bytes"),
    (changed("truth", chunk_grid={"name": "other"}), "truth/zarr.json lacks what describes an array"),
    (changed("truth", codecs=[]), "truth/zarr.json lacks what describes an array"),
    (changed("truth", codecs=[{"name": "gzip"}]), "the chunks of truth are encoded by gzip"),
    (changed("step", data_type="float64"), "the array step is float64 ['step'], not int64 ['step']"),
    (changed("step", data_type="quaternion"), "No Zarr data type found that matches 'quaternion'"),
    (changed("truth", dimension_names=["a", "b", "c"]), "the array truth is float32 ['a', 'b', 'c'], not"),
    (changed("step", dimension_names=None), "Zarr object is missing the `dimension_names` metadata"),
    (changed("", rules_="{"), "the attribute rules is no JSON object"),
    (changed("", rules_="[" * 50_000), "the attribute rules is no JSON object"),
    (changed("", rules_=5), "the attribute rules is no JSON object"),
    (changed("", rules_="{}"), NO_RULE),
    (changed("", rules_=rules(threshold=float("nan"))), NO_RULE),
    (changed("", rules_=rules(threshold="1")), NO_RULE),
    (changed("", rules_=rules(warmup=10**30)), NO_RULE),
    (changed("", rules_=rules(kind="x")), NO_RULE),
    (changed("", rules_=rules(cause=5)), NO_RULE),
    (changed("", signals_="{}"), "the attribute signals does not say what 'loss' is"),
    (changed("", predicates_='{"x": {"a": 1}}'), "the attribute predicates says of 'x' that it has a"),
    (changed("", predicates_='{"x": {"signal": "y"}}'), "says of 'x' that it has no signal or no sense"),
    (changed("", routers_="[[1000000000000, 2]]"), "the attribute routers is no list of experts"),
    (changed("", config_="[]"), "the attribute config is no JSON object"),
    (changed("", schema_version_=99), "its layout is number 99, and this release reads number 1"),
    (changed("", numpy_version_=None), "the attribute numpy_version is missing"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "told"), METADATA, ids=[told[:40] for _, told in METADATA])
def test_metadata_that_makes_no_sense(change: Change, told: str, store: Path):
    change(store)
    assert told in refusal(store)


@pytest.mark.parametrize("array", ARRAYS)
def test_an_array_that_is_missing(array: str, store: Path):
    shutil.rmtree(store / array)
    told = refusal(store)
    assert array in told
    assert "missing" in told or "it has no array `step`" in told


def bomb(size: int) -> bytes:
    """A zstd frame in one segment whose header says what it becomes."""
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size) + b"\x01\x00\x00"


@pytest.mark.parametrize("array", ARRAYS)
def test_a_chunk_that_is_cut_off_or_expands_beyond_its_array(array: str, store: Path):
    chunk = chunk_of(store, array)
    key, content = chunk.relative_to(store).as_posix(), chunk.read_bytes()
    for data, told in [
        (content[:-5], "cannot be decoded (Zstd decompression error"),
        (b"", "says nothing of its size"),
        (b"\x00" * 500, "says nothing of its size"),
        (bomb(10 * 2**30), "says that it holds 10,737,418,240 bytes"),
        (bomb(2**62), "says that it holds 4,611,686,018,427,387,904 bytes"),
        (Zstd().encode(bytes(2**26 + 1)), "says that it holds 67,108,865 bytes"),
    ]:
        chunk.write_bytes(data)
        assert f"the chunk {key} {told}" in refusal(store)


def test_text_that_says_it_is_four_thousand_million_texts(store: Path):
    chunk_of(store, "rule").write_bytes(Zstd().encode(b"\xff" * 40))
    assert f"the chunk rule/c/0 does not hold {len(fake.RULES)} texts" in refusal(store)


@pytest.mark.parametrize("value", [-1, 77])
def test_rows_without_a_state_give_no_verdict(value: int, store: Path):
    """Or rules would be said not to have fired."""
    dict(zarr.open_group(store, mode="r+").arrays())["state"][4:] = value
    assert "rows of this history have no state" in refusal(store)


def test_a_chunk_of_states_that_is_gone_gives_no_verdict(store: Path):
    chunk_of(store, "state").unlink()
    assert "chunks of the array `state` are missing or were changed" in refusal(store)


def test_a_length_that_is_declared_and_never_written_costs_nothing(store: Path):
    changed("step", shape=[2**62])(store)
    assert open_history(store).sizes["step"] == 20


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_791, 65_792, 2**20])
def test_the_size_in_a_frame_is_that_of_its_content(size: int):
    assert _content_size(Zstd().encode(np.random.default_rng(0).bytes(size)) + b"\x00" * 20) == size


def test_a_damaged_store_is_not_continued(store: Path):
    assert misfit(store, fake.make_schema()) == ""
    changed("", rules_="{")(store)
    assert misfit(store, fake.make_schema()).startswith("it is damaged (JSONDecodeError")


def test_a_log_that_declares_more_than_fits_is_refused_before_it_is_read(tmp_path: Path):
    from moe_rules_callback.errors import LogError

    group = zarr.create_group(tmp_path / "log.zarr")
    for name in ("step", "loss"):
        group.create_array(name, shape=(2**40,), chunks=(2**10,), dtype="float64", dimension_names=["step"])
    with pytest.raises(LogError, match="values are more than a log can have"):
        read_log(tmp_path / "log.zarr")
