"""What rules, verdicts and histories show in a notebook, read back by an HTML parser."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import fake_records as fake
import numpy as np
import pytest

from moe_rules_callback.formula import Rule
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.language import parse_rule
from moe_rules_callback.verdicts import summary

NASTY = "<script>alert('x')</script> & \"more\""
RISK = Rule(
    NASTY, fake.CONFIDENT, 0.85, f"0.85 :: a  # {NASTY}", kind="risk", severity="error", warmup=1200,
    description=f"why {NASTY}", cause=f"cause {NASTY}", next_step=f"next {NASTY}",
)  # fmt: skip
VOID = {"br", "path", "polygon"}


class Page(HTMLParser):
    """Text, tags and attributes of well-formed markup; `tags` are of elements that end properly."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.text, self.open, self.tags, self.attributes = "", [], set(), []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def history(*rules: Rule, rows: int = 150):
    return records_to_dataset(fake.make_records(rows, fake.make_schema(rules=rules or fake.RULES)))


def test_a_rule_tells_its_text_its_kind_and_its_words():
    page = Page(RISK._repr_html_())
    assert f"{NASTY} (a risk: fires when TRUE, error, from step 1,200 on)" in page.text
    for words in (RISK.text, f"why {NASTY}", f"Likely cause: cause {NASTY}", f"Next: next {NASTY}"):
        assert words in page.text
    assert "script" not in page.tags


def test_a_rule_made_of_nodes_has_a_text_too():
    page = Page(Rule("both", fake.RULES[0].formula, 0.9, kind="health")._repr_html_())
    assert "0.9 :: high_routing_confidence & low_activation_entropy" in page.text
    assert "(health: fires when FALSE, warning)" in page.text
    assert "Likely cause" not in page.text
    assert "(only watched)" in Page(parse_rule("0.85 :: a", "watched")._repr_html_()).text


def test_a_verdict_that_fired_tells_why_and_what_next():
    fired, quiet = history(
        replace(RISK, warmup=0), replace(RISK, name="quiet", threshold=1.0)
    ).moe_rules.verdicts()
    assert (fired.fired, quiet.fired) == (True, False)
    page = Page(fired._repr_html_())
    assert page.text.startswith(f"{NASTY} fires: {fired.sentence}Why: 0.85 :: a why {NASTY} Likely cause: ")
    assert page.text.endswith(f"Next: next {NASTY}")
    assert "script" not in page.tags
    assert Page(quiet._repr_html_()).text == f"quiet: {quiet.sentence}"


def test_the_audit_has_a_line_and_a_band_for_each_rule():
    quiet = replace(RISK, name="quiet", warmup=0, threshold=1.0)
    run = history(replace(RISK, warmup=0), quiet, replace(quiet, name="late", warmup=1200), fake.RULES[0])
    fired, *others = found = run.moe_rules.verdicts()
    markup = run.moe_rules._repr_html_()
    page = Page(markup)
    assert "script" not in page.tags
    assert markup.count("<tr>") == 1 + 4
    assert markup.count("<svg") == 4
    assert page.text.startswith(summary(found))
    interval = f"[{fired.truth[0]:.2f}, {fired.truth[1]:.2f}]"
    rows = f"{fired.rows_fired} of 150 rows, first at step {fired.first_step}, worst in {fired.layer}"
    assert f"{NASTY} fired{fired.state.name} {interval}{rows}" in page.text
    for verdict, words in zip(others, ("never decided", "not judged", "only watched"), strict=True):
        assert re.search(rf"{verdict.rule}{verdict.state.name} \[[^]]*\]{words}", page.text)


def test_the_band_lies_where_the_truth_is():
    run = history(rows=100)
    truth = run.moe_rules["routing_stability"].values
    points = re.findall(r'<polygon points="([^"]*)"', run.moe_rules._repr_html_())[2]
    x, y = np.array([point.split(",") for point in points.split()], float).T
    assert (x.min(), x.max()) == (0, 160)
    height = (25 - y) / 24  # 0 .. 1 from the lower line to the upper one
    np.testing.assert_allclose(height[:100], truth[:, 1], atol=0.005)
    np.testing.assert_allclose(height[100:], truth[::-1, 0], atol=0.005)


def test_a_long_run_hides_no_row_and_grows_no_page():
    run = history(rows=5000)
    run["truth"].load()[{"step": 2345, "rule": 3, "bound": 1}] = 1.0
    run["truth"][{"step": 2345, "rule": 3, "bound": 0}] = 0.0
    markup = run.moe_rules._repr_html_()
    assert len(markup) < 30_000
    points = re.findall(r'<polygon points="([^"]*)"', markup)[3]
    heights = np.array([point.split(",")[1] for point in points.split()], float)
    assert {heights.min(), heights.max()} == {1, 25}


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_run_of_hardly_any_rows(rows):
    run = history(rows=rows)
    page = Page(run.moe_rules._repr_html_())
    assert ("svg" in page.tags) == (rows > 0)
    assert re.search(r"load_imbalance.*?not judged", page.text)  # its warm-up is 100


@pytest.mark.filterwarnings("ignore:The chararray class:DeprecationWarning")  # by treescope, under NumPy 2.5
def test_treescope_shows_the_fields_and_the_words_behind():
    treescope = pytest.importorskip("treescope")
    verdict = history().moe_rules.verdicts()[0]
    text = treescope.render_to_text(parse_rule("0.85 :: a & b", "both", kind="risk"))
    assert "name='both'" in text
    assert "kind='risk'" in text
    assert text.rstrip().endswith("# 0.85 :: a & b")
    text = treescope.render_to_text(verdict)
    assert "rule='expert_specialization'" in text
    assert text.rstrip().endswith(f"# {verdict.sentence}")


def test_no_picture_needs_treescope_or_matplotlib():
    program = (
        "import sys; sys.path.insert(0, 'tests'); import fake_records as fake\n"
        "from moe_rules_callback.history import records_to_dataset\n"
        "run = records_to_dataset(fake.make_records(9))\n"
        "shown = [run.moe_rules, *run.moe_rules.verdicts(), *fake.RULES]\n"
        "assert all(each._repr_html_() for each in shown)\n"
        "assert not {'treescope', 'matplotlib', 'IPython'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
