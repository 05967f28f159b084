from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import fake_records as fake
import numpy as np
import pytest
import xarray as xr
import zarr

from moe_rules_callback.errors import HistoryError
from moe_rules_callback.history import open_history, records_to_dataset
from moe_rules_callback.sinks import ZarrSink, new_store
from moe_rules_callback.sinks import zarr as store


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few rows declared ahead and in a chunk, so that small runs cross all borders."""
    monkeypatch.setattr(new_store, "DECLARED_ROWS", 256)
    monkeypatch.setattr(new_store, "STEP_CHUNK", 32)
    monkeypatch.setattr(new_store, "CHUNK_BYTES", 512)


def steps(path: Path) -> list[int]:
    return open_history(path).step.values.tolist()


@pytest.mark.parametrize("batch", [1, 7, 16, 50, 200])
def test_batches_of_any_size_give_the_same_rows(batch, tmp_path):
    records = fake.make_records(75)
    fake.feed(ZarrSink(), records, fake.make_run(tmp_path, flush_every=16), batch=batch)
    xr.testing.assert_identical(open_history(tmp_path).load(), records_to_dataset(records))


def test_plain_xarray_opens_a_closed_store(tmp_path):
    records = fake.make_records(40)
    fake.feed(ZarrSink(), records, fake.make_run(tmp_path))
    plain = xr.open_zarr(tmp_path / "audit.zarr", consolidated=False)
    lower = plain.truth.sel(rule="load_imbalance", bound="lower")
    np.testing.assert_array_equal(lower, records.truth[:, 1, 0])
    assert plain.sizes["step"] == 40
    assert plain.layer.values.tolist() == ["block_0/moe", "block_1/moe"]
    xr.testing.assert_identical(xr.open_zarr(tmp_path / "audit.zarr").load(), plain.load())


def test_a_live_store_says_which_rows_are_not_written(tmp_path):
    fake.feed(ZarrSink(), fake.make_records(40), fake.make_run(tmp_path), end=False)
    plain = xr.open_zarr(tmp_path / "audit.zarr", consolidated=False)
    assert plain.sizes["step"] == 256
    assert (plain.step.values[40:] == -1).all()
    assert (plain.state.values[40:] == -1).all()
    assert np.isnan(plain.truth.values[40:]).all()
    assert "step = -1" in plain.attrs["unwritten_rows"]


def test_a_run_longer_than_declared_grows(tmp_path):
    records = fake.make_records(600)
    sink = ZarrSink()
    fake.feed(sink, records, fake.make_run(tmp_path), end=False)
    xr.testing.assert_identical(open_history(tmp_path).load(), records_to_dataset(records))
    sink.on_train_end(fake.make_run(tmp_path))
    assert xr.open_zarr(tmp_path / "audit.zarr", consolidated=False).sizes["step"] == 600


def test_chunks_hold_whole_flushes_and_grow_with_small_rows(tmp_path, monkeypatch):
    monkeypatch.undo()
    schema = fake.make_schema(rules=fake.many_rules(30))
    sink = ZarrSink()
    sink.on_train_start(fake.make_run(tmp_path, schema, flush_every=64))
    group = dict(zarr.open_group(tmp_path / "audit.zarr", mode="r").arrays())
    assert group["step"].chunks == (4096,)
    assert group["loss"].chunks == (4096,)
    assert group["truth"].chunks == (2**18 // (30 * 2 * 4) // 64 * 64, 30, 2)
    assert group["step"].shape == (2**20,)


def test_a_run_without_rows_leaves_an_empty_history(tmp_path):
    fake.feed(ZarrSink(), fake.make_records(0), fake.make_run(tmp_path))
    assert steps(tmp_path) == []


def test_it_needs_somewhere_to_write(tmp_path):
    with pytest.raises(HistoryError, match=r"the run has no log directory. Pass logdir="):
        ZarrSink().on_train_start(fake.make_run())
    fake.feed(ZarrSink(tmp_path / "deep" / "my.zarr"), fake.make_records(3), fake.make_run())
    assert steps(tmp_path / "deep" / "my.zarr") == [0, 1, 2]


def test_an_untidy_logdir_is_left_alone(tmp_path):
    (tmp_path / "audit.zarr").write_text("a file")
    (tmp_path / "audit-7.zarr").mkdir()
    sink = ZarrSink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.logger, "disabled", True)
        fake.feed(sink, fake.make_records(3), fake.make_run(tmp_path))
    assert sink.path == tmp_path / "audit-8.zarr"
    assert (tmp_path / "audit.zarr").read_text() == "a file"


# A second run.


def test_a_second_run_goes_beside_the_first_and_says_so(tmp_path, caplog):
    fake.feed(ZarrSink(), fake.make_records(10), fake.make_run(tmp_path))
    assert not caplog.records
    fake.feed(ZarrSink(), fake.make_records(20), fake.make_run(tmp_path))
    assert steps(tmp_path / "audit.zarr") == list(range(10))
    assert steps(tmp_path / "audit-2.zarr") == list(range(20))
    (warning,) = caplog.records
    assert warning.name == "moe_rules_callback"
    assert "audit.zarr holds another run and is left alone; this run goes to" in warning.getMessage()
    assert warning.getMessage().endswith("audit-2.zarr.")


def test_resume_continues_and_replaces_rows_after_the_checkpoint(tmp_path, caplog):
    first, second = fake.make_records(100), fake.make_records(160, seed=1)
    fake.feed(ZarrSink(), first, fake.make_run(tmp_path, flush_every=16))
    fake.feed(ZarrSink(), second[70:], fake.make_run(tmp_path, flush_every=16, resume=True))
    assert caplog.messages == [
        f"{tmp_path / 'audit.zarr'}: 30 rows from step 70 on are replaced, since an older checkpoint was "
        "restored."
    ]
    found = open_history(tmp_path).load()
    (told,) = json.loads(found.attrs.pop("replaced"))
    assert (told["from_step"], told["rows"]) == (70, 30)
    assert abs(told["time"] - time.time()) < 60
    xr.testing.assert_identical(found, records_to_dataset([first[:70], second[70:]]))
    assert not (tmp_path / "audit-2.zarr").exists()


def test_rows_that_are_replaced_twice_are_told_twice(tmp_path, caplog):
    records = fake.make_records(100)
    sink = ZarrSink()
    fake.feed(sink, records, fake.make_run(tmp_path), end=False)
    for _ in range(2):
        sink.on_rewind(70)
        sink.on_records(records[70:])
    assert len(caplog.messages) == 2
    told = json.loads(open_history(tmp_path).attrs["replaced"])
    assert [(each["from_step"], each["rows"]) for each in told] == [(70, 30)] * 2


def test_resume_after_a_kill_continues_behind_the_last_whole_batch(tmp_path):
    records = fake.make_records(100)
    killed = ZarrSink()
    fake.feed(killed, records[:50], fake.make_run(tmp_path), end=False)
    killed._arrays["truth"][50:60] = 0.25  # a batch that never got its steps
    fake.feed(ZarrSink(), records[50:], fake.make_run(tmp_path, resume=True))
    xr.testing.assert_identical(open_history(tmp_path).load(), records_to_dataset(records))


@pytest.mark.parametrize("survive", range(5))
def test_a_kill_while_rows_are_unwritten_leaves_a_prefix(survive, tmp_path, monkeypatch):
    """Rolled back from row 200 to row 70 in chunks of 32, the process dies after `survive` chunks."""
    records = fake.make_records(200)
    fake.feed(ZarrSink(), records, fake.make_run(tmp_path, flush_every=32))
    sink = ZarrSink()
    sink.on_train_start(fake.make_run(tmp_path, flush_every=32, resume=True))

    class Dying:
        left = survive

        def __init__(self, array):
            self.array = array
            self.shape, self.chunks = array.shape, array.chunks

        def __getitem__(self, rows):
            return self.array[rows]

        def __setitem__(self, rows, values):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            self.array[rows] = values

    monkeypatch.setitem(sink._arrays, "step", Dying(sink._arrays["step"]))
    with pytest.raises(KeyboardInterrupt):
        sink.on_records(records[70:80])
    left, found = [200, 192, 160, 128, 96][survive], open_history(tmp_path).load()
    assert json.loads(found.attrs.pop("replaced"))[0]["rows"] == 130  # announced before it begins
    xr.testing.assert_identical(found, records_to_dataset(records[:left]))
    fake.feed(ZarrSink(), records[70:], fake.make_run(tmp_path, flush_every=32, resume=True))
    found = open_history(tmp_path).load()
    assert [each["from_step"] for each in json.loads(found.attrs.pop("replaced"))] == [70, 70]
    xr.testing.assert_identical(found, records_to_dataset(records))


def test_resume_with_nothing_there_starts(tmp_path, caplog):
    fake.feed(ZarrSink(), fake.make_records(5), fake.make_run(tmp_path, resume=True))
    assert steps(tmp_path) == [0, 1, 2, 3, 4]
    assert not caplog.records


def changed(**what):
    return dataclasses.replace(fake.RULES[0], **what)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (fake.make_schema(rules=fake.RULES[1:]), "rule 'expert_specialization' is gone"),
        (fake.make_schema(rules=(*fake.RULES, changed(name="another"))), "rule 'another' is new"),
        (
            fake.make_schema(rules=(changed(threshold=0.9), *fake.RULES[1:])),
            "the threshold of rule 'expert_specialization' was 0.85 and is 0.9",
        ),
        (
            fake.make_schema(rules=(changed(kind="risk"), *fake.RULES[1:])),
            "the kind of rule 'expert_specialization' was None and is 'risk'",
        ),
        (fake.make_schema(rules=fake.RULES[::-1]), "the rules were expert_specialization, load_imbalance,"),
        (fake.make_schema(layers=1), "the layers were block_0/moe, block_1/moe and are block_0/moe"),
        (fake.make_schema(experts=6), "the experts were 0, 1, 2, 3 and are 0, 1, 2, 3, .. (6)"),
        (fake.make_schema(experts=0), "experts were recorded and are not"),
    ],
)  # fmt: skip
def test_resume_with_another_schema_starts_a_linked_store(schema, why, tmp_path, caplog):
    fake.feed(ZarrSink(), fake.make_records(10), fake.make_run(tmp_path))
    fake.feed(ZarrSink(), fake.make_records(12, schema)[8:], fake.make_run(tmp_path, schema, resume=True))
    assert f"audit.zarr cannot be continued: {why}" in caplog.text
    assert "audit-2.zarr, whose attribute `continues` names it" in caplog.text
    assert steps(tmp_path / "audit.zarr") == list(range(10))
    assert steps(tmp_path) == [8, 9, 10, 11]
    assert open_history(tmp_path).attrs["continues"] == "audit.zarr"
