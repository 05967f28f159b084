"""`moe-rules plot`, called as a function."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fake_records import make_records, make_run
from matplotlib.image import imread

from moe_rules_callback.cli import main
from moe_rules_callback.sinks import ZarrSink

DRAWN = [
    "audit",
    "rule_timeline",
    "expert_utilization",
    "expert_utilization_total",
    "router_entropy",
    "layer_signals",
]
AFFINITY = "router_affinity_matrix_heatmap"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A log directory with a finished history of router_entropy and routing_confidence."""
    records, sink = make_records(12), ZarrSink()
    started = make_run(tmp_path, records.schema)
    sink.on_train_start(started)
    sink.on_records(records)
    sink.on_train_end(started)
    return tmp_path


def pictures(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix in (".png", ".svg"))


@pytest.mark.parametrize("store", [".", "audit.zarr"])
def test_what_a_history_can_give_lies_beside_it(run: Path, store: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plot", str(run / store)]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [str(run / f"{name}.png") for name in DRAWN]
    for name in DRAWN:
        image = imread(run / f"{name}.png")
        assert image.shape[0] > 400
        assert image.std() > 0.02, name  # there is something in it
    assert told.err.count("\n") == 1
    assert told.err.startswith("left out: routing_accuracy: The history holds no routing_accuracy or")
    assert "expert_coactivation: The history holds no expert_coactivation" in told.err
    assert (
        f"{AFFINITY}: No history holds a table of domains by experts: pass one as --affinity CSV." in told.err
    )


def test_both_formats_go_into_a_folder_that_is_made(run: Path):
    folder = run / "a" / "b"
    names = ["rule_timeline", "audit"]
    assert main(["plot", str(run), "--out", str(folder), "--format", "png,svg", "--only", *names]) == 0
    assert pictures(folder) == ["audit.png", "audit.svg", "rule_timeline.png", "rule_timeline.svg"]
    assert "<svg" in (folder / "audit.svg").read_text()


@pytest.mark.parametrize(
    ("only", "lines"), [([], "Truth of the rules"), (["--only", "rule_timeline"], "State")]
)
def test_one_picture_goes_where_it_is_told(run: Path, only: list[str], lines: str):
    assert main(["plot", str(run), "--out", str(run / "demo.svg"), *only]) == 0
    assert pictures(run) == ["demo.svg"]
    assert lines in (run / "demo.svg").read_text()  # matplotlib leaves the text of a label as a comment


def test_a_table_is_drawn(run: Path):
    table = run / "table.csv"
    np.savetxt(table, np.eye(4), delimiter=",")
    assert main(["plot", str(run), "--only", AFFINITY, "--affinity", str(table)]) == 0
    assert pictures(run) == [f"{AFFINITY}.png"]


def test_a_table_beside_the_run_is_found(run: Path):
    np.savetxt(run / "router_affinity_matrix.csv", np.eye(4), delimiter=",")
    assert main(["plot", str(run / "audit.zarr"), "--only", AFFINITY]) == 0
    assert pictures(run) == [f"{AFFINITY}.png"]


def test_a_log_of_another_trainer_is_drawn(tmp_path: Path):
    log = tmp_path / "training_log.txt"
    row = {
        "routing_acc": 0.58,
        "entropy": 1.4,
        "utilization": [0.3, 0.3, 0.1, 0.1, 0.1, 0.1],
        "metrics": {"loss": 2},
    }
    log.write_text("".join(json.dumps({"epoch": epoch, **row}) + "\n" for epoch in range(1, 6)))
    names = ["audit", "expert_utilization", "router_entropy", "routing_accuracy"]
    assert main(["plot", str(log), "--only", *names]) == 0
    assert pictures(tmp_path) == [f"{name}.png" for name in names]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--only", "expert_coactivation"], "The history holds no expert_coactivation"),
        (["--only", AFFINITY], "pass one as --affinity CSV"),
        (["--affinity", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_what_was_asked_for_and_cannot_be_is_exit_code_1(run: Path, options, told, capsys):
    assert main(["plot", str(run), *options]) == 1
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not pictures(run)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--only", "routing_acc"], "no picture is called 'routing_acc'. Did you mean routing_accuracy?"),
        (["--format", "pdf"], "'pdf' is none of png, svg, and png,svg"),
        (["--out", "demo.pdf"], "'demo.pdf' ends neither in .png nor in .svg"),
        (["--out", "demo.png", "--only", "audit", "rule_timeline"], "is one picture in one format"),
        (["--out", "demo.png", "--format", "svg"], "is one picture in one format"),
    ],
)
def test_wrong_usage_is_exit_code_2(run: Path, options, told, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["plot", str(run), *options])
    assert stopped.value.code == 2
    assert told in capsys.readouterr().err


def test_no_run_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plot", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moe-rules: ")
    assert "nowhere" in error
    assert error.count("\n") == 1
