"""A report as Chromium shows it: wide and narrow, by day and by night, and on paper."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_records as fake
import pytest
from browser import screenshot

from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.report import render_report

pytestmark = pytest.mark.slow

LONG = "a_rule_whose_name_goes_on_and_on_until_no_telephone_could_hold_it_on_a_single_line"
LOOKS = """() => ({
  page: document.documentElement.scrollWidth,
  window: innerWidth,
  background: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  images: [...document.images].map(image => image.complete && image.naturalWidth > 0),
  band: getComputedStyle(document.querySelector(".band")).fill,
  unfolded: document.querySelector("details table").checkVisibility({contentVisibilityAuto: true}),
})"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with rules that fired, long names, and a long value in its configuration."""
    fired = [replace(rule, kind="risk", name=f"{LONG}_{rule.name}") for rule in fake.RULES]
    run = fake.make_records(400, fake.make_schema(layers=5, rules=tuple(fired)))
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render_report(records_to_dataset(run, {"key": "x" * 400}), LONG), "utf-8")
    return path


def look(page: Path, width: int, *, dark: bool, media: str = "screen") -> dict[str, Any]:
    """What the page looks like, once it is sure that nothing was said on the console."""
    found: dict[str, Any] = {}

    def then(browser: Any) -> None:
        browser.emulate_media(media=media)
        found.update(browser.evaluate(LOOKS))

    out = page.parent / f"{width}_{dark}_{media}.png"
    assert screenshot(page, out, width, dark=dark, then=then) == []
    return found


def channels(colour: str) -> list[int]:
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_and_follows_the_readers_colours(page: Path, width: int, dark: bool):
    found = look(page, width, dark=dark)
    assert found["page"] == found["window"] == width  # no scrolling sideways
    assert len(found["images"]) == 6
    assert all(found["images"])
    background, ink = sum(channels(found["background"])), sum(channels(found["ink"]))
    assert (background < 100 and ink > 600) if dark else (background == 3 * 255 and ink < 150)
    assert found["band"] == ("rgb(124, 192, 255)" if dark else "rgb(0, 90, 156)")
    assert not found["unfolded"]


def test_paper_is_white_and_nothing_is_folded_away(page: Path):
    found = look(page, 1280, dark=True, media="print")
    assert (found["background"], found["ink"]) == ("rgb(255, 255, 255)", "rgb(0, 0, 0)")
    assert found["unfolded"]
