"""`moe-rules` on runs that lie at a URL."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator

import fake_records as fake
import pytest
from upath import UPath

from moe_rules_callback.cli import main
from moe_rules_callback.history import open_history
from moe_rules_callback.records import Run
from moe_rules_callback.sinks import ZarrSink


@pytest.fixture(scope="module")
def root() -> Iterator[UPath]:
    """Two runs and a log in memory."""
    root = UPath(f"memory://{uuid.uuid4().hex}")
    for name, seed in (("old", 0), ("new", 1)):
        schema = fake.make_schema()
        fake.feed(ZarrSink(), fake.make_records(150, schema, seed=seed), Run(schema, root / name))
    rows = ({"step": i, "router_entropy": 0.3, "loss": 2.0} for i in range(40))
    (root / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yield root
    root.rmdir(recursive=True)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(arguments) == code
    return capsys.readouterr().out


@pytest.mark.parametrize("store", ["", "/audit.zarr"])
def test_plot_draws_beside_the_run(root: UPath, store: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "old" / "audit.png"
    assert printed(capsys, "plot", f"{root}/old{store}", "--only", "audit") == f"{path}\n"
    assert path.read_bytes().startswith(b"\x89PNG")
    path.unlink()


def test_plot_draws_where_it_is_told(root: UPath, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "picture.svg"
    assert printed(capsys, "plot", f"{root}/old", "--out", str(out)) == f"{out}\n"
    assert "<svg" in out.read_text()


def test_report(root: UPath, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "report", f"{root}/old") == f"{root}/old/report.html\n"
    assert "<title>" in (root / "old" / "report.html").read_text("utf-8")


def test_check(root: UPath, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "check", f"{root}/old").startswith(f"{root}/old: 150 rows, steps 0 to 149")
    rules = printed(capsys, "check", f"{root}/log.jsonl", "--json", "--fail-on", "error")
    assert json.loads(rules)["failed"] is False


def test_replay_writes_a_history_beside_the_log(root: UPath, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(printed(capsys, "replay", f"{root}/log.jsonl", "--json"))
    assert told["history"] == f"{root}/log.audit/audit.zarr"
    assert open_history(told["history"]).sizes["step"] == 40


def test_compare(root: UPath, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{root}/new" in printed(capsys, "compare", f"{root}/old", f"{root}/new")


def test_explain(root: UPath, capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "explain", f"{root}/log.jsonl", "--rule", "loss_spike")
    assert told.startswith("loss_spike at step 39: ")


def test_a_url_that_cannot_be_reached_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "nowhere://bucket/run"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("moe-rules: nowhere://bucket/run cannot be reached: ")
    assert told.count("\n") == 1
