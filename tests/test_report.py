"""What a report says, and that it says it without anything from outside. Its looks: test_report_browser."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fake_records as fake
import numpy as np
import pytest

from moe_rules_callback.cli import main
from moe_rules_callback.formula import Rule
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.plots import AFFINITY, FIGURES, Affinity
from moe_rules_callback.records import Records
from moe_rules_callback.report import render_report
from moe_rules_callback.report.markup import breakable, fill
from moe_rules_callback.report.multiples import layer_multiples
from moe_rules_callback.report.pictures import WORDS, pictures
from moe_rules_callback.sinks.zarr import ZarrSink
from moe_rules_callback.verdicts import verdicts

ALERT = "<script>alert(1)</script>"
RISK = Rule(
    "collapse",
    fake.IMBALANCED,
    0.75,
    "0.75 :: high_expert_imbalance",
    kind="risk",
    severity="error",
    description="One expert takes all.",
    cause="No balancing loss.",
    next_step="Add one.",
)
WATCHED = Rule("watched", fake.CONFIDENT)
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Reads a page strictly: each tag that opens closes, in order, and no id comes twice.

    Attributes:
        tags: (name, attributes) of each, in order.
        text: what a reader sees, and the style sheet.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", []
        self.feed(page)
        self.close()
        assert not self._open
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def records(*rules: Rule, rows: int = 6, layers: tuple[str, ...] = ("a", "b"), fires: str = "a") -> Records:
    """A run in which every rule is TRUE in the layer `fires`, and knows nothing in the others."""
    whole = fake.make_records(
        rows, replace(fake.make_schema(rules=rules), layers=layers, routers=((4, 2),) * len(layers))
    )
    truth, state = whole.truth_layer.copy(), np.ones_like(whole.state)
    truth[..., 0], truth[..., 1] = 0, 1
    truth[:, :, layers.index(fires), 0] = 1
    return replace(whole, truth_layer=truth, state=state)


@pytest.fixture(scope="module")
def page() -> str:
    history = records_to_dataset(records(RISK, WATCHED), {"optimiser": {"name": "adamw"}, "seed": None})
    return render_report(history, "demo", Affinity(np.eye(3)))


def test_it_says_what_fired_and_why_and_what_to_do(page: str):
    text = Page(page).text
    assert "1 of 1 rule fired, still at the end: collapse (error)." in text
    assert "Fired in 6 of 6 rows (100 %), first at step 0, last at 5, worst in layer 'a'; TRUE at the" in text
    for words in ("WhyOne expert takes all.", "Likely causeNo balancing loss.", "What to do nextAdd one."):
        assert words in re.sub(r"\n", "", text)
    assert "TRUE in 100 % of 6 rows (watched only: it has no kind)" in text
    assert "still firing at the end" in text


def test_it_says_how_the_run_was_set_up(page: str):
    text = re.sub(r"\s+", " ", Page(page).text)
    assert "optimiser.name adamw" in text
    assert "seed not set" in text
    assert "loss training loss, in nat" in text
    assert "0 to 5" in text


def test_pictures_are_there_with_words_for_those_who_do_not_see_them(page: str):
    images = Page(page).all("img")
    alts = [image["alt"] or "" for image in images]
    assert [alt.split(".")[0] for alt in alts] == [
        "Loss and truth of the rules",
        "State of every rule",
        "Expert utilisation, layer by layer",
        "Expert utilisation over the whole run",
        "Router entropy",
        "Signals, layer by layer",
        "Router affinity",
    ]
    assert "over steps 0 to 5" in alts[0]
    assert re.search(r"it goes from [01]\.\d+ to [01]\.\d+\.$", alts[4])
    assert all(re.match(r"data:image/(svg\+xml|png);base64,\w", image["src"] or "") for image in images)


def test_every_picture_has_its_words():
    assert WORDS.keys() == {*FIGURES, AFFINITY}


def test_pictures_that_the_run_cannot_give_are_named(page: str):
    text = Page(page).text
    assert "Left out" in text
    assert "Expert co-activation: The history holds no expert_coactivation: name it in a rule" in text


def test_nothing_comes_from_outside(page: str):
    tags = Page(page)
    policy = next(meta["content"] for meta in tags.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert {tag for tag, _ in tags.tags} & {"script", "link", "iframe", "object", "embed", "base"} == set()
    for _, attributes in tags.tags:
        for name in ("src", "href", "srcset", "action", "poster", "background"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in tags.text
    assert "@import" not in tags.text


def test_links_lead_somewhere(page: str):
    tags = Page(page)
    ids = {attributes["id"] for _, attributes in tags.tags if "id" in attributes}
    links = {link["href"] for link in tags.all("a")}
    assert links <= {f"#{id}" for id in ids}
    assert "#rule-0" in links


def test_every_name_is_escaped():
    hostile = replace(
        RISK, name=ALERT, text=f"0.75 :: {ALERT}", description=ALERT, cause=ALERT, next_step=f'"{ALERT}'
    )
    layers = (ALERT, '"><b>')
    run = records_to_dataset(
        records(hostile, layers=layers, fires=ALERT), {ALERT: ALERT, "x": {ALERT: [ALERT]}}
    )
    run.attrs["predicates"] = json.dumps({ALERT: {ALERT: ALERT}})
    run.attrs["signals"] = json.dumps(
        {ALERT: {"long_name": ALERT, "units": ALERT, "per_layer": True}}
        | {s.name: vars(s) for s in fake.SIGNALS}
    )
    tags = Page(render_report(run, ALERT))
    assert not tags.all("script")
    assert not tags.all("b")
    assert tags.text.count(ALERT) >= 14


def test_the_same_run_gives_the_same_bytes(page: str):
    history = records_to_dataset(records(RISK, WATCHED), {"optimiser": {"name": "adamw"}, "seed": None})
    assert render_report(history, "demo", Affinity(np.eye(3))) == page


def test_a_healthy_run():
    run = replace(records(replace(RISK, description="")), state=np.zeros((6, 1), np.int8))
    tags = Page(render_report(records_to_dataset(run), "demo"))
    assert "None of 1 rule fired." in tags.text
    assert "No rule fired." in tags.text
    assert not tags.all("article")
    assert any(attributes.get("class") == "verdict good" for attributes in tags.all("div"))


def test_a_run_without_rows_says_so():
    text = Page(render_report(records_to_dataset(records(RISK)[:0]), "demo")).text
    assert "not judged: the run has no rows." in text
    assert text.count("There is nothing to draw: the history has no rows.") == len(FIGURES)


def test_many_rules_that_fired_fold_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe_rules_callback.report.page.pictures", lambda *_: ([], []))
    rules = [replace(RISK, name=f"rule_{number}", severity="info") for number in range(11)]
    worst = replace(RISK, name="worst", description="", cause="", next_step="")
    tags = Page(render_report(records_to_dataset(records(*rules, worst)), "demo"))
    assert len(tags.all("article")) == 12
    assert "4 more rules fired" in tags.text
    assert tags.text.index("Its rule file gives no description") < tags.text.index("One expert takes all.")
    assert "12 of 12 rules fired, and all of them at the end" in tags.text


def panels(run: Records) -> str:
    history = records_to_dataset(run)
    return layer_multiples(history, verdicts(history)[:1])[RISK.name]


def test_each_layer_has_a_panel_that_says_where_it_fires():
    first, second = Page(panels(records(RISK))).all("svg")
    assert (
        first["aria-label"]
        == "a: truth from 1.00 to 1.00 at the end; alone it fires the rule, first near step 0."
    )
    assert second["aria-label"] == "b: truth from 0.00 to 1.00 at the end; alone it never fires the rule."
    paths = Page(panels(records(RISK))).all("path")
    assert [path["d"] for path in paths if path["class"] == "fires"] == ["M0 102H240v8H0z", ""]
    assert {path["d"] for path in paths if path["class"] == "must"} == {"M0 25H240"}


def test_a_panel_fires_from_the_warm_up_on():
    paths = Page(panels(records(replace(RISK, warmup=3)))).all("path")
    assert [path["d"] for path in paths if path["class"] == "fires"] == ["M120 102H240v8H120z", ""]


def test_a_health_rule_fires_below_the_dashes():
    run = records(replace(RISK, kind="health"))
    truth = 1 - run.truth_layer[..., ::-1]  # FALSE in layer a
    drawn = panels(replace(run, truth_layer=truth, state=np.zeros_like(run.state)))
    assert "below the dashes" in drawn
    assert [path["d"] for path in Page(drawn).all("path") if path["class"] == "fires"] == [
        "M0 102H240v8H0z",
        "",
    ]
    assert "M0 75H240" in drawn


def test_of_many_layers_the_worst_are_shown():
    layers = tuple(f"block_{depth}" for depth in range(30))
    tags = Page(panels(records(RISK, layers=layers, fires="block_29")))
    assert len(tags.all("svg")) == 12
    assert "the 12 worst of 30." in tags.text
    assert "block_29 (worst)" in tags.text


def test_a_long_run_stays_small():
    run = records_to_dataset(fake.make_records(5000, fake.make_schema(12, 32, fake.many_rules(30))))
    drawn, _ = pictures(run, None, "")
    assert sum(len(picture.uri) for picture in drawn) < 2_500_000
    assert {picture.uri[:14] for picture in drawn} == {"data:image/png", "data:image/svg"}


def test_names_break_behind_underscores():
    assert fill("<b>$name</b>", name=breakable("a_b/<c>")) == "<b>a_<wbr>b/<wbr>&lt;c&gt;</b>"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    sink, started = ZarrSink(), fake.make_run(tmp_path / "demo", records(RISK).schema)
    fake.feed(sink, records(RISK), started)
    return tmp_path / "demo"


@pytest.mark.parametrize("store", [".", "audit.zarr"])
def test_the_command_writes_beside_the_run(run: Path, store: str, capsys: pytest.CaptureFixture[str]):
    np.savetxt(run / "router_affinity_matrix.csv", np.eye(4), delimiter=",")
    assert main(["report", str(run / store)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text("utf-8")
    assert "<title>demo: router rules</title>" in page
    assert "Router affinity. 4 rows by 4 experts." in page


def test_the_command_writes_where_it_is_told(run: Path):
    out = run / "a" / "page.html"
    assert main(["report", str(run), "--out", str(out)]) == 0
    assert out.exists()


def test_a_log_of_another_trainer_is_reported(tmp_path: Path):
    log = tmp_path / "training_log.txt"
    row = {
        "routing_acc": 0.58,
        "entropy": 1.4,
        "utilization": [0.34, 0.33, 0.33, 0.0],
        "metrics": {"loss": 2},
    }
    log.write_text("".join(json.dumps({"epoch": epoch, **row}) + "\n" for epoch in range(200)))
    assert main(["report", str(log)]) == 0
    tags = Page((tmp_path / "report.html").read_text("utf-8"))
    assert "<title>training_log.txt" in (tmp_path / "report.html").read_text("utf-8")
    assert "dead_expert" in tags.text
    assert "columns.utilization" in tags.text
    assert "router_not_learning\nleft out\nthe log lacks its signals" in tags.text
    assert "(worst)" not in tags.text  # of one layer


def test_a_run_is_judged_by_other_rules(run: Path):
    rules = run / "rules.toml"
    rules.write_text('[rules.sure]\nrule = "0.75 :: high_routing_confidence"\nkind = "health"\n')
    assert main(["report", str(run), "--rules", str(rules)]) == 0
    text = Page((run / "report.html").read_text("utf-8")).text
    assert "0.75 :: high_routing_confidence" in text
    assert "0.75 :: high_expert_imbalance" not in text


def test_no_run_is_one_line_and_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moe-rules: ")
    assert error.count("\n") == 1
