"""Two runs that write to one directory at once: each row stands in one store, and no store mixes two runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fake_records as fake
import pytest

from moe_rules_callback.history import open_history
from moe_rules_callback.paths import AnyPath
from moe_rules_callback.sinks.zarr import ZarrSink
from moe_rules_callback.stores import stores

BOTH = (slice(0, 8), slice(8, 16), slice(16, 24))


def written_by_turns(tmp_path: Path, resume: bool, before: int = 0) -> tuple[ZarrSink, ZarrSink]:
    """Two sinks over one directory whose batches alternate; the rows of the second begin at step 500."""
    records = fake.make_records(2000)
    if before:
        fake.feed(ZarrSink(), records[:before], fake.make_run(tmp_path))
    one, other = ZarrSink(), ZarrSink()
    runs = [fake.make_run(tmp_path, resume=resume) for _ in range(2)]
    one.on_train_start(runs[0])
    other.on_train_start(runs[1])
    for batch in BOTH:
        one.on_records(records[before:][batch])
        other.on_records(records[500:][batch])
    one.on_train_end(runs[0])
    other.on_train_end(runs[1])
    return one, other


def steps_of(store: AnyPath) -> list[int]:
    return open_history(store)["step"].values.tolist()


@pytest.mark.parametrize("resume", [False, True])
def test_two_new_runs_write_two_stores(resume: bool, tmp_path: Path):
    """With resume=True the second continues the first, which thereupon goes on in a store of its own."""
    one, other = written_by_turns(tmp_path, resume)
    assert one.path != other.path
    found = {store.name: steps_of(store) for store in stores(tmp_path / "audit.zarr")}
    assert sorted(step for steps in found.values() for step in steps) == [*range(24), *range(500, 524)]
    assert all(steps == sorted(set(steps)) for steps in found.values())
    if not resume:
        assert sorted(found.values()) == [[*range(24)], [*range(500, 524)]]


def test_two_runs_that_continue_the_same_history_do_not_mix(tmp_path: Path):
    written_by_turns(tmp_path, resume=True, before=10)
    found = [steps_of(store) for store in stores(tmp_path / "audit.zarr")]
    assert len(found) == 2
    assert all(steps == sorted(set(steps)) for steps in found)
    rows = sorted(step for steps in found for step in steps)
    assert rows == [*range(34), *range(500, 524)]


@pytest.mark.slow
def test_processes_that_start_at_once_get_a_store_each(tmp_path: Path):
    program = (
        "import sys; sys.path.insert(0, 'tests'); import fake_records as fake\n"
        "from moe_rules_callback.sinks.zarr import ZarrSink\n"
        "print('ready', flush=True); input()\n"
        f"fake.feed(ZarrSink(), fake.make_records(40), fake.make_run({str(tmp_path)!r}), batch=10)\n"
    )
    root = Path(__file__).parents[2]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", program], cwd=root, **pipes) for _ in range(2)]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.communicate("\n", timeout=60)
    assert [process.returncode for process in running] == [0] * 2
    assert [steps_of(store) for store in stores(tmp_path / "audit.zarr")] == [[*range(40)]] * 2
