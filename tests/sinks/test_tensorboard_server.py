"""The real TensorBoard over three small runs: what its plugins serve, and what a browser makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_records as fake
import numpy as np
import pytest
from browser import screenshot

from moe_rules_callback.records import Records
from moe_rules_callback.sinks import TensorBoardSink
from moe_rules_callback.sinks.scalars import ScalarTable

pytest.importorskip("tensorboard")
pytestmark = pytest.mark.slow

STRICTER = tuple(dataclasses.replace(rule, threshold=0.99) for rule in fake.RULES)
CONFIGS = {
    "demo": {"lr": 1e-3, "data": "c4", "model": {"experts": 4}},
    "killed": {"lr": 3e-3, "data": "c4", "model": {"experts": 4}, "z_loss": 1e-4},
    "other_rules": {"lr": 1e-3, "data": "pile", "model": {"experts": 4}},
}


class Server:
    """Answers of a TensorBoard.

    Attributes:
        url: of its page.
        records: what was written, by run.
    """

    def __init__(self, url: str, records: dict[str, Records]) -> None:
        self.url, self.records = url, records

    def get(self, path: str, body: Any = None, **query: str) -> Any:
        """JSON of a plugin; a body makes it a POST."""
        with self.open(path, body, **query) as answer:
            return json.load(answer)

    def open(self, path: str, body: Any = None, **query: str) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"{self.url}data/plugin/{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        return urllib.request.urlopen(request, timeout=30)

    def wait(self) -> None:
        """Until it is up and has read all runs to their ends."""
        for _ in range(240):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                tags = self.get("images/tags")
                if all("experts_by_layer" in tags.get(run, ()) for run in CONFIGS):
                    return
            time.sleep(0.25)
        raise AssertionError("TensorBoard did not come up")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    logdir, records, killed = tmp_path_factory.mktemp("runs"), {}, TensorBoardSink()
    for name, config in CONFIGS.items():
        schema = fake.make_schema(rules=STRICTER if name == "other_rules" else fake.RULES)
        records[name] = fake.make_records(150, schema, seed=len(name))
        run = fake.make_run(logdir / name, schema, config=config)
        sink, end = (killed, False) if name == "killed" else (TensorBoardSink(), True)
        fake.feed(sink, records[name], run, end=end)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        server = Server(f"http://127.0.0.1:{port}/", records)
        server.wait()
        yield server
    finally:
        process.kill()
        process.wait()
        killed.on_train_end(fake.make_run())


def test_curves(server):
    tags = server.get("scalars/tags")
    table = ScalarTable(fake.make_schema())
    for run, records in server.records.items():
        assert set(table.tags) <= set(tags[run])
        for tag, values in zip(table.tags, table.values(records).T, strict=True):
            if tag in (
                "rules/load_imbalance/lower",
                "rules/load_imbalance/upper",
                "signals/block_1/moe/router_entropy",
            ):
                curve = server.get("scalars/scalars", run=run, tag=tag)
                assert [step for _, step, _ in curve] == records.step.tolist()
                np.testing.assert_array_equal(np.array([value for *_, value in curve], np.float32), values)


def test_one_chart_for_a_rule_even_where_thresholds_differ(server):
    layout = server.get("custom_scalars/layout")
    charts = {each["title"]: [chart["title"] for chart in each["chart"]] for each in layout["category"]}
    assert charts == {
        "Risks: TRUE is bad": ["load_imbalance", "underutilized_experts"],
        "Watched": [
            "expert_specialization",
            "routing_stability",
            "learning_progress",
            "healthy_specialization",
        ],
    }
    tag, thresholds = "rules/load_imbalance/threshold", {}
    for run in server.records:
        answer = server.get("custom_scalars/scalars", run=run, tag=tag)
        thresholds[run] = {value for _, _, value in answer["tag_to_events"][tag]}
    assert thresholds == {"demo": {0.75}, "killed": {0.75}, "other_rules": {float(np.float32(0.99))}}


def test_pictures(server):
    tags = server.get("images/tags")["demo"]
    assert sorted(tags) == [
        "experts_by_layer",
        "experts_over_time/block_0/moe",
        "experts_over_time/block_1/moe",
    ]
    assert all("yellow ten times or more" in told["description"] for told in tags.values())
    for tag in tags:
        shown = server.get("images/images", run="demo", tag=tag, sample="0")
        assert [each["step"] for each in shown] == [63, 127, 149]
        query = dict(urllib.parse.parse_qsl(shown[-1]["query"]))
        with server.open("images/individualImage", **query) as answer:
            assert answer.headers["Content-Type"] == "image/png"
            assert answer.read().startswith(b"\x89PNG")


def test_runs_are_compared_by_config_and_final_states(server):
    experiment = server.get("hparams/experiment", {"experimentName": "", "includeMetrics": True})
    names = {each["name"] for each in experiment["hparamInfos"]}
    assert names == {"rulebook", "lr", "data", "model.experts", "z_loss"}  # those of one run only as well
    asked = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN"], "colParams": [], "sliceSize": 10}
    groups = {each["name"]: each for each in server.get("hparams/session_groups", asked)["sessionGroups"]}
    assert set(groups) == set(CONFIGS)
    assert groups["killed"]["hparams"]["z_loss"] == 1e-4
    rulebooks = {run: group["hparams"]["rulebook"] for run, group in groups.items()}
    assert rulebooks["demo"] == rulebooks["killed"] != rulebooks["other_rules"]
    first = [f"final/{rule.name}" for rule in sorted(fake.RULES, key=lambda rule: rule.name)]
    for run, records in server.records.items():
        metrics = {each["name"]["tag"]: each["value"] for each in groups[run]["metricValues"]}
        assert list(metrics)[:6] == first
        states = dict(zip(records.schema.rule_names, records.state[-1].tolist(), strict=True))
        assert [metrics[tag] for tag in first] == [states[tag.removeprefix("final/")] for tag in first]
        assert metrics["fired/underutilized_experts"] == pytest.approx((records.state[:, 4] == 1).mean())


def look(server: Server, page: str, out: Path, then: Callable[[Any], object]) -> None:
    """Opens a dashboard and fails on what it complains about; TensorBoard warns of parts of its own."""
    told = screenshot(f"{server.url}#{page}", out, then=then)
    assert [line for line in told if not line.startswith("warning: ")] == []


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where the screenshots go: to be looked at, in the folder MOE_RULES_SCREENSHOTS."""
    folder = Path(os.environ.get("MOE_RULES_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_the_browser_draws_bands(server, pictures):
    def check(page):
        for rule in fake.RULES:
            page.get_by_text(rule.name, exact=True).first.wait_for()
        page.get_by_text("Matches (6)").first.wait_for()  # a band and a threshold of three runs

    look(server, "custom_scalars", pictures / "custom_scalars.png", check)


def test_the_browser_shows_the_loads(server, pictures):
    def check(page):
        page.get_by_text("experts_over_time/block_1/moe").first.wait_for()
        images = page.locator("img[src*=individualImage]")
        images.nth(8).wait_for()  # three of each run
        assert {image.evaluate("image => image.naturalWidth") for image in images.all()} == {256}

    look(server, "images", pictures / "images.png", check)


def test_the_browser_compares_runs(server, pictures):
    def check(page):
        for text in (*CONFIGS, "z_loss", "final/load_imbalance", "fired/load_imbalance"):
            page.get_by_text(text).first.wait_for(state="attached")

    look(server, "hparams", pictures / "hparams.png", check)
