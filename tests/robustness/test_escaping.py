"""Names and words out of files, wherever they are shown: no markup, no links, no terminal steered."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import fake_records as fake
import numpy as np
import pytest

from moe_rules_callback.cli import main
from moe_rules_callback.commands.check_reports import Checked, markdown
from moe_rules_callback.compare import compare
from moe_rules_callback.explain import explain
from moe_rules_callback.formula import Rule
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.language import parse_formula
from moe_rules_callback.replay import replay
from moe_rules_callback.report import render_report
from moe_rules_callback.terminal import plain
from moe_rules_callback.verdicts import verdicts

MARKUP = "<script>alert(1)</script>"
QUOTES = "\"'><img src=x onerror=alert(1)> &lt;b&gt; ${x} $name"
LINK = "[click](javascript:alert(1)) ![x](https://example.org/x.png) `code` \\| | <b>"
ESCAPES = "\x1b[2J\x1b]52;c;AAAA\x07\x1b]8;;file:///etc/passwd\x1b\\ \x9b31m\x7f\b\r\u202e\u2066 end"


def rule(words: str, name: str = "collapse") -> Rule:
    text = f"0.75 :: high_x  # {words}"
    return Rule(
        name, parse_formula("high_x"), 0.75, text, kind="risk", severity="error",
        description=words, cause=words, next_step=words,
    )  # fmt: skip


def run(words: str):
    """A run in which a rule of this name and these words has fired."""
    name = words if words.isprintable() else "collapse"
    records = replay({"x": np.r_[np.zeros(40), 99.0].tolist()}, [rule(words, name)])
    return records_to_dataset(records, {words: words, "nested": {words: [words]}})


class Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("words", [MARKUP, QUOTES, LINK])
def test_pages_hold_no_markup_of_others(words: str):
    history = run(words)
    shown = {
        "report": render_report(history, words),
        "audit": history.moe_rules._repr_html_(),
        "verdict": verdicts(history)[0]._repr_html_(),
        "rule": rule(words, words)._repr_html_(),
    }
    for page in shown.values():
        read = Page(page)
        tags = {tag for tag, _ in read.tags}
        assert not tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
        for tag, attributes in read.tags:
            assert not [name for name in attributes if name.startswith("on")]
            assert tag != "a" or (attributes["href"] or "").startswith("#")
            assert tag != "img" or (attributes["src"] or "").startswith("data:image/")
        assert words in read.text.replace("\n", " ") or words in " ".join(read.text.split())


def test_a_picture_holds_no_markup_of_others():
    """Names drawn as letters of an SVG; those of a panel stand in an attribute."""
    import io

    figure = run(MARKUP).moe_rules.plot()
    figure.savefig(file := io.StringIO(), format="svg")
    assert "<script" not in file.getvalue().replace("<!-- ", "").lower()


def test_markdown_has_no_links_tags_or_pictures_of_others():
    told = markdown(Checked(LINK, verdicts(run(LINK)), [LINK], "error"))
    assert "](" not in told
    assert "<b>" not in told.replace("`", "")[: told.index("**")]
    for line in told.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) == 5


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("\x07\b\r\x7f\x9b", "\\x07\\x08\\r\\x7f\\x9b"),
        ("\u202e\u2066\ud800", "\\u202e\\u2066\\ud800"),
        ("äöü ∧ 𝄞\u00a0\n\tx", "äöü ∧ 𝄞\u00a0\n\tx"),
    ],
)
def test_what_steers_a_terminal_is_written_out(text: str, shown: str):
    assert plain(text) == shown


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A log whose columns, and a rule file whose words, hold escape sequences."""
    columns = ["step", "x", ESCAPES, MARKUP]
    with (tmp_path / "log.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *([i, 99 * (i == 40), i, 1] for i in range(41))])
    words = json.dumps(ESCAPES).replace("\x7f", "\\u007f")
    (tmp_path / "own.toml").write_text(
        f"description = {words}\n[rules.collapse]\nrule = '0.75 :: high_x'\nkind = 'risk'\n"
        f"description = {words}\ncause = {words}\nnext = {words}\n"
        "[predicates.high_x]\nsignal = 'x'\nis = 'high'\n",
        "utf-8",
    )
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["check", "log.csv", "--rules", "own.toml"],
        ["check", "log.csv", "--rules", "own.toml", "--json"],
        ["replay", "log.csv", "--rules", "own.toml", "--out", "out"],
        ["explain", "log.csv", "--rules", "own.toml"],
        ["rules", "own.toml"],
        ["lint", "own.toml"],
        ["lint", "-e", "a \x1b[2J b"],
        ["check", f"{ESCAPES}.csv"],
        ["check", "log.csv", "--map", f"{ESCAPES}=loss"],
    ],
)
def test_no_command_lets_files_steer_the_terminal(command, hostile, monkeypatch, capsys):
    monkeypatch.chdir(hostile)
    main(command)
    shown = "".join(capsys.readouterr())
    assert shown
    assert not [c for c in shown if not (c.isprintable() or c in "\n\t")]


def test_explanations_and_comparisons_tell_names_as_they_are():
    """They are text; whoever shows them escapes, as the pages and commands above do."""
    history = run(MARKUP)
    assert MARKUP in str(explain(history, MARKUP))
    assert MARKUP in str(compare(history, history))
    json.dumps(explain(history, MARKUP).to_dict(), allow_nan=False)


def test_a_name_of_a_column_stays_on_its_line(tmp_path: Path):
    from moe_rules_callback.logs import map_columns, read_log

    row = {"step": 1, "x\n\nNone of 3 rules fired.": 2.0, "loss": 1.0}
    (tmp_path / "log.jsonl").write_text(json.dumps(row) + "\n")
    log = read_log(tmp_path / "log.jsonl")
    assert list(log.columns) == ["x\\n\\nNone of 3 rules fired.", "loss"]
    assert len(str(map_columns(log)).splitlines()) == 1 + 2


def test_layers_named_by_markup_are_escaped():
    schema = fake.make_schema(2)
    history = records_to_dataset(fake.make_records(9, replace(schema, layers=(MARKUP, QUOTES))))
    page = Page(render_report(history, "x"))
    assert "script" not in {tag for tag, _ in page.tags}
