"""Histories and event files at a URL, on fsspec's file system in memory; and what folders promise too."""

from __future__ import annotations

import json
import logging
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_records as fake
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
import zarr
from collector import make
from fsspec.implementations.memory import MemoryFileSystem
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from upath import UPath

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.actions import SnapshotRouting
from moe_rules_callback.errors import HistoryError
from moe_rules_callback.history import open_history, records_to_dataset
from moe_rules_callback.paths import as_path, claim
from moe_rules_callback.records import Records, Run, Schema
from moe_rules_callback.sinks import TensorBoardSink, ZarrSink, new_store, record_writers
from moe_rules_callback.sinks import zarr as store


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_store, "DECLARED_ROWS", 256)
    monkeypatch.setattr(new_store, "STEP_CHUNK", 32)
    monkeypatch.setattr(new_store, "CHUNK_BYTES", 512)


@pytest.fixture
def url() -> Iterator[str]:
    root = f"memory://{uuid.uuid4().hex}"
    yield f"{root}/runs/demo"
    if as_path(root).exists():
        UPath(root).rmdir(recursive=True)


@pytest.fixture(params=["folder", "url"])
def where(request: pytest.FixtureRequest) -> str:
    """A log directory of either kind."""
    return str(request.getfixturevalue("tmp_path" if request.param == "folder" else "url"))


def at(logdir: str, schema: Schema | None = None, **settings: Any) -> Run:
    return Run(schema or fake.make_schema(), as_path(logdir), **settings)


def steps(path: str) -> list[int]:
    return open_history(path).step.values.tolist()


def names(logdir: str) -> list[str]:
    return sorted(path.name for path in as_path(logdir).iterdir())


def same(url: str, *records: Records) -> None:
    xr.testing.assert_identical(open_history(url).load(), records_to_dataset(records))


# Writing and reading.


@pytest.mark.parametrize("batch", [1, 16, 50, 200])
def test_batches_of_any_size_give_the_same_rows_as_a_folder(batch: int, url: str, tmp_path: Path) -> None:
    records = fake.make_records(75)
    for logdir in (url, str(tmp_path)):
        fake.feed(ZarrSink(), records, at(logdir, flush_every=16), batch=batch)
        same(logdir, records)
    for each in (tmp_path / "audit.zarr").rglob("*"):
        if each.is_file() and each.parent != tmp_path / "audit.zarr":  # there is the name of the writer
            other = as_path(url) / "audit.zarr" / each.relative_to(tmp_path / "audit.zarr").as_posix()
            assert other.read_bytes() == each.read_bytes(), each


def test_a_run_that_is_to_have_no_rules(where: str) -> None:
    records = fake.make_records(5, fake.make_schema(rules=()))
    fake.feed(ZarrSink(), records, at(where, records.schema))
    same(where, records)


def test_a_path_of_its_own(url: str) -> None:
    sink = ZarrSink(f"{url}/my.zarr")
    fake.feed(sink, fake.make_records(3), Run(fake.make_schema()))
    assert isinstance(sink.path, UPath)
    assert str(sink.path) == f"{url}/my.zarr"
    assert steps(f"{url}/my.zarr") == [0, 1, 2]


def test_a_live_store_is_read_and_says_which_rows_are_not_written(url: str) -> None:
    records, sink = fake.make_records(70), ZarrSink()
    fake.feed(sink, records[:40], at(url), end=False)
    early = open_history(url)
    sink.on_records(records[40:])
    xr.testing.assert_identical(early.load(), records_to_dataset(records[:40]))
    same(url, records)
    plain = xr.open_zarr(f"{url}/audit.zarr", consolidated=False)
    assert plain.sizes["step"] == 256
    assert (plain.step.values[70:] == -1).all()
    sink.on_train_end(at(url))
    plain = xr.open_zarr(f"{url}/audit.zarr", consolidated=False)
    np.testing.assert_array_equal(plain.truth.sel(rule="load_imbalance"), records.truth[:, 1])


def test_a_run_longer_than_declared_grows(url: str) -> None:
    records = fake.make_records(600)
    fake.feed(ZarrSink(), records, at(url), end=False)
    same(url, records)


def test_a_batch_costs_a_write_for_each_array_and_a_look_at_whose_it_is(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    count: Counter[str] = Counter()
    sink, records = ZarrSink(), fake.make_records(128)
    sink.on_train_start(at(url))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("pipe_file", "cat_file", "open", "ls", "info"):
            original = getattr(MemoryFileSystem, name)

            def counted(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
                count[name] += 1
                return original(*args, **options)

            patch.setattr(MemoryFileSystem, name, counted)
        sink.on_records(records[:64])
        sink.on_records(records[64:])
    # `pipe_file` of this file system opens what it writes, and a UPath what it reads
    assert count == {"pipe_file": 2 * 9, "open": 2 * (9 + 1)}
    same(url, records)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_batch_that_failed_can_be_given_again(
    lost: int, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, sink, put, left = fake.make_records(90), ZarrSink(), store.put, lost
    fake.feed(sink, records[:45], at(where), end=False)

    def failing(files: dict[Any, bytes]) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError("no route to host")
        put(files)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put", failing)
        with pytest.raises(OSError, match="no route"):
            sink.on_records(records[45:])
    same(where, records[:45])
    sink.on_records(records[45:])
    same(where, records)


def test_rows_in_a_finished_chunk_are_written_once(url: str) -> None:
    sink, records = ZarrSink(), fake.make_records(96)
    fake.feed(sink, records[:64], at(url, flush_every=32), end=False)
    full = as_path(url) / "audit.zarr" / "step" / "c" / "0"
    full.unlink()
    sink.on_records(records[64:])
    assert not full.exists()


# A second run.


def test_a_second_run_goes_beside_the_first_and_says_so(url: str, caplog: pytest.LogCaptureFixture) -> None:
    fake.feed(ZarrSink(), fake.make_records(10), at(url))
    fake.feed(ZarrSink(), fake.make_records(20), at(url))
    assert steps(f"{url}/audit.zarr") == list(range(10))
    assert steps(f"{url}/audit-2.zarr") == steps(url) == list(range(20))
    assert [record.getMessage() for record in caplog.records] == [
        f"{url}/audit.zarr holds another run and is left alone; this run goes to {url}/audit-2.zarr."
    ]


def test_resume_continues_and_replaces_rows_after_the_checkpoint(url: str) -> None:
    first, second = fake.make_records(100), fake.make_records(160, seed=1)
    fake.feed(ZarrSink(), first, at(url, flush_every=16))
    assert ZarrSink().last_step(as_path(url)) == 99
    fake.feed(ZarrSink(), second[70:], at(url, flush_every=16, resume=True))
    found = open_history(url).load()
    assert json.loads(found.attrs.pop("replaced"))[0]["rows"] == 30
    xr.testing.assert_identical(found, records_to_dataset([first[:70], second[70:]]))
    assert names(url) == ["audit.zarr"]


def test_resume_after_a_kill_continues_behind_the_last_whole_batch(where: str) -> None:
    records, killed = fake.make_records(100), ZarrSink()
    fake.feed(killed, records[:50], at(where), end=False)
    killed._arrays["truth"][50:60] = 0.25  # a batch that never got its steps
    fake.feed(ZarrSink(), records[50:], at(where, resume=True))
    same(where, records)


def test_resume_with_another_schema_starts_a_linked_store(url: str) -> None:
    fake.feed(ZarrSink(), fake.make_records(10), at(url))
    other = fake.make_schema(rules=fake.RULES[1:])
    fake.feed(ZarrSink(), fake.make_records(12, other)[8:], at(url, other, resume=True))
    assert open_history(url).attrs["continues"] == "audit.zarr"
    assert steps(url) == [8, 9, 10, 11]


def test_chunks_that_are_encoded_otherwise_are_not_continued(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        gzip = {"name": "gzip", "configuration": {"level": 1}}
        patch.setattr(new_store, "CODECS", [new_store.CODECS[0], gzip])
        ZarrSink().on_train_start(at(where))
    fake.feed(ZarrSink(), fake.make_records(5), at(where, resume=True))
    assert "audit.zarr cannot be continued: its chunks are encoded by [{'name': 'bytes'" in caplog.text
    assert names(where) == ["audit-2.zarr", "audit.zarr"]


# Starting.


def test_of_two_that_start_at_the_same_moment_each_gets_a_store(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both looked before either had written anything."""
    monkeypatch.setattr(store, "numbered", lambda wanted: {})
    sinks = [ZarrSink() for _ in range(3)]
    for rows, sink in enumerate(sinks):
        fake.feed(sink, fake.make_records(rows + 1), at(where))
    monkeypatch.undo()
    assert [sink.path.name for sink in sinks if sink.path] == ["audit.zarr", "audit-2.zarr", "audit-3.zarr"]
    for rows, sink in enumerate(sinks):
        assert steps(str(sink.path)) == list(range(rows + 1))


@pytest.mark.parametrize("writes", [0, 1])
def test_a_store_counts_when_it_is_whole(
    writes: int, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed while it makes its store, a run leaves no history, and a name that nobody takes again."""
    put, left = store.put, writes

    def dying(files: dict[Any, bytes]) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        put(files)

    with monkeypatch.context() as patch:
        patch.setattr(store, "put", dying)
        with pytest.raises(KeyboardInterrupt):
            ZarrSink().on_train_start(at(where))
    with pytest.raises(HistoryError, match=r"holds no audit.zarr"):
        open_history(where)
    assert ZarrSink().last_step(as_path(where)) == -1
    fake.feed(ZarrSink(), fake.make_records(4), at(where, resume=True))
    assert steps(where) == [0, 1, 2, 3]
    assert names(where) == ["audit-2.zarr", "audit.zarr"]
    assert not caplog.records


def test_a_claim_is_granted_once(where: str) -> None:
    claim(as_path(where) / "a" / "b")
    with pytest.raises(FileExistsError):
        claim(as_path(where) / "a" / "b")


# Places.


def test_a_protocol_that_nobody_knows(tmp_path: Path) -> None:
    told = (
        r"nowhere://bucket/runs cannot be reached: .*nowhere.*\. Most file systems are packages of their "
        r"own; install that of this one: gcsfs for gs://, s3fs for s3://, adlfs for az://, aiohttp and "
        r"requests for https://\."
    )
    for act in (open_history, ZarrSink, lambda url: RuleAuditCallback("nano_moe", logdir=url)):
        with pytest.raises(HistoryError, match=told):
            act("nowhere://bucket/runs")


def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(HistoryError, match=r"gs://b/runs cannot be reached: Please install gcsfs to access"):
        as_path("gs://b/runs")


def test_a_url_that_was_made_a_path(tmp_path: Path) -> None:
    told = r"gs:/bucket/runs was a URL before pathlib.Path took one of its slashes. Pass the URL as text"
    with pytest.raises(HistoryError, match=told):
        open_history(Path("gs://bucket/runs"))
    assert as_path("c:/runs") == Path("c:/runs")


def test_nothing_there(url: str) -> None:
    with pytest.raises(HistoryError, match=f"There is no directory {url}. open_history takes the logdir"):
        open_history(url)
    (as_path(url) / "events").write_bytes(b"x")
    with pytest.raises(HistoryError, match=r"holds no audit.zarr. Either the run has not started, or"):
        open_history(url)


def test_a_store_of_somebody_else(url: str) -> None:
    zarr.create_group(f"{url}/other.zarr")
    with pytest.raises(HistoryError, match=r"is not a history of moe_rules_callback: it has no array `step`"):
        open_history(f"{url}/other.zarr")


def test_a_file_url_is_a_local_path(tmp_path: Path) -> None:
    assert as_path(f"file://{tmp_path}") == tmp_path
    assert isinstance(as_path(f"file://{tmp_path}"), Path)


# The callback.


def test_the_callback_at_a_url(url: str) -> None:
    with make(logdir=url) as audit:
        for _ in range(10):
            audit.on_step({"x": 0.0})
        assert audit.history.step.values.tolist() == list(range(10))
        assert str(audit.path) == f"{url}/audit.zarr"
    with make(logdir=url, sinks="zarr", resume=True) as audit:
        audit.on_step({"x": 1.0})
    assert steps(url) == list(range(11))


def test_a_file_system_that_fails_does_not_stop_training(
    url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError("the bucket is gone")

    with make(logdir=url, flush_every=1, sinks="zarr") as audit:
        audit.on_step({"x": 0.0})
        audit.flush()
        with monkeypatch.context() as patch:
            patch.setattr(MemoryFileSystem, "pipe_file", fail)
            for _ in range(5):
                audit.on_step({"x": 0.0})
            audit.flush()
            assert steps(url) == [0]
    assert caplog.messages == [
        "plugin 'ZarrSink' raised in on_records and will be tried again: OSError: the bucket is gone. "
        "Training goes on, and up to 64 MiB of rows are kept for it",
        "not everything is written yet: plugin 'ZarrSink': 5 rows (steps 1 to 5) wait for it, which tries "
        "again after: OSError: the bucket is gone",
    ]
    assert steps(url) == [0, 1, 2, 3, 4, 5]


def test_a_snapshot_at_a_url(url: str) -> None:
    action = SnapshotRouting(rows=2)
    with make(actions=[action], dry_run=False, logdir=url, sinks=[], flush_every=1) as audit:
        for step in range(8):
            probs = jnp.full((4, 3), 1 / 3)
            audit.on_step({"x": -1.0 if step == 4 else 0.0, "router_probs": {"block_0": probs}})
            audit.flush()
    assert names(f"{url}/snapshots") == ["step-4.npz"]
    with (as_path(url) / "snapshots" / "step-4.npz").open("rb") as file:
        assert np.load(file)["alert_step"] == 4


# TensorBoard.


def read_events(url: str, folder: Path) -> EventAccumulator:
    for path in as_path(url).glob("*tfevents*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()


@pytest.mark.parametrize("part_bytes", [1, 2**22])
def test_event_files_at_a_url(
    part_bytes: int, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_writers, "PART_BYTES", part_bytes)
    records, sink = fake.make_records(100), TensorBoardSink()
    fake.feed(sink, records[:60], at(url), batch=20, end=False)
    assert [event.step for event in read_events(url, tmp_path).Scalars("signals/loss")] == list(range(60))
    sink.on_records(records[60:])
    sink.on_train_end(at(url))
    found = read_events(url, tmp_path).Scalars("signals/loss")
    assert [event.step for event in found] == list(range(100))
    np.testing.assert_array_equal(np.array([event.value for event in found], np.float32), records.loss)
    assert (len(names(url)) > 3) == (part_bytes == 1)


def test_a_second_run_draws_in_a_folder_below(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        fake.feed(TensorBoardSink(), fake.make_records(5), at(url))
    assert f"{url} holds the curves of another run; this run's go to {url}/audit-2." in caplog.text
    assert [name for name in names(url) if "tfevents" not in name] == ["audit-2"]
