"""Killed at any moment, a run leaves whole rows, each once, and the next run goes on behind them.

`python tests/robustness/kill_a_run.py --kills 100` kills the whole callback so often; here are fewer.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fake_records as fake
import pytest
import xarray as xr
from kill_a_run import MOMENTS, Chain

from moe_rules_callback.history import open_history, records_to_dataset
from moe_rules_callback.paths import put
from moe_rules_callback.sinks import ZarrSink, new_store
from moe_rules_callback.sinks import zarr as store

ROWS = 100


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills"), [("sinks", 16), ("callback", 4)])
def test_a_chain_of_killed_runs(kind: str, kills: int, tmp_path: Path) -> None:
    with Chain(kind, tmp_path / "run", seed=kills) as chain:
        for kill in range(kills):
            chain.kill(MOMENTS[kill % len(MOMENTS)])
        chain.complete(len(chain.lives) + 100)
    assert sum(chain.hits.values()) > chain.hits["between"]  # some were killed in a flush
    assert chain.checked > 100


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it is written."""


def dies_after(writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the files that a sink is going to write, so many."""
    left = writes

    def dying(files: dict[Any, bytes]) -> None:
        nonlocal left
        for path, data in files.items():
            if left == 0:
                raise Killed
            left -= 1
            put({path: data})

    monkeypatch.setattr(store, "put", dying)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"DECLARED_ROWS": 64, "STEP_CHUNK": 32, "CHUNK_BYTES": 2**12}.items():
        monkeypatch.setattr(new_store, name, value)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_start", "on_records", "on_train_end"])
def test_killed_after_each_single_file(hook: str, tmp_path: Path) -> None:
    """Between any two files that a resumed run writes: a store that grows, is trimmed, or takes a batch."""
    records, first = fake.make_records(ROWS), tmp_path / "first"
    fake.feed(ZarrSink(), records[:60], fake.make_run(first, flush_every=16), end=hook == "on_train_start")
    done, writes = False, -1
    while not done:
        writes += 1
        logdir = tmp_path / str(writes)
        shutil.copytree(first, logdir)
        run, sink = fake.make_run(logdir, flush_every=16, resume=True), ZarrSink()
        if hook != "on_train_start":
            sink.on_train_start(run)
        with pytest.MonkeyPatch.context() as patch:
            dies_after(writes, patch)
            try:
                getattr(sink, hook)(records[60:80] if hook == "on_records" else run)
                done = True
            except Killed:
                done = False
        plain, history = xr.open_zarr(logdir / "audit.zarr").load(), open_history(logdir).load()
        rows = history.sizes["step"]  # a batch that goes on in a further chunk of `step` may be there in part
        assert rows in ({80} if done else {60, 64}) if hook == "on_records" else rows == 60
        xr.testing.assert_identical(history, records_to_dataset(records[:rows]))
        xr.testing.assert_equal(plain.isel(step=slice(rows)), history)
        assert (plain.step[rows:] == -1).all()
        fake.feed(ZarrSink(), records[rows:], run)
        xr.testing.assert_identical(open_history(logdir).load(), records_to_dataset(records))
    assert writes > (1 if hook == "on_train_start" else 9)


def test_a_file_that_was_being_written_disturbs_nobody(tmp_path: Path) -> None:
    records = fake.make_records(ROWS)
    fake.feed(ZarrSink(), records[:50], fake.make_run(tmp_path), end=False)
    for folder in ("", "step", "truth/c/0/0"):
        (tmp_path / "audit.zarr" / folder / ".zarr.json.0a1b.partial").write_text(json.dumps({})[:1])
    xr.testing.assert_equal(
        xr.open_zarr(tmp_path / "audit.zarr").isel(step=slice(50)).load(), records_to_dataset(records[:50])
    )
    fake.feed(ZarrSink(), records[50:], fake.make_run(tmp_path, resume=True))
    xr.testing.assert_identical(open_history(tmp_path).load(), records_to_dataset(records))
