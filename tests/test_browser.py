"""The browser helper sees what it is trusted to see."""

from __future__ import annotations

import struct

import browser
import pytest

PAGE = """<!doctype html><meta name="viewport" content="width=device-width">
<style>body { margin: 0; height: 2000px }</style><body><script>%s</script>"""

pytestmark = pytest.mark.slow


def size(png) -> tuple[int, int]:
    return struct.unpack(">II", png.read_bytes()[16:24])


def test_a_sound_page_has_nothing_to_say(tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(PAGE % "console.log('hello')")
    assert browser.screenshot(page, out, 800, 600) == []
    assert size(out) == (800, 2000)  # all of it


def test_errors_are_returned(tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(PAGE % "console.error('one'); console.warn('two'); new Image().src = 'no.png'; three()")
    told = browser.screenshot(page, out, then=lambda page: page.wait_for_timeout(200))
    assert told[:2] == ["error: one", "warning: two"]
    assert any(line.startswith("exception: ") and "three is not defined" in line for line in told)
    assert any(line.startswith("not loaded: ") and line.endswith("no.png") for line in told)


def test_a_dark_telephone(tmp_path):
    page, out = tmp_path / "page.html", tmp_path / "page.png"
    page.write_text(PAGE % "")
    query = "[matchMedia('(prefers-color-scheme: dark)').matches, innerWidth, 'ontouchstart' in window]"
    found = []
    browser.screenshot(page, out, 390, 800, dark=True, then=lambda page: found.extend(page.evaluate(query)))
    assert found == [True, 390, True]


def test_no_chromium_is_a_reason(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("MOE_RULES_REQUIRE_CHROMIUM", raising=False)
    with pytest.raises(pytest.skip.Exception, match="No `chromium` on PATH"):
        browser.find_chromium()
    monkeypatch.setenv("MOE_RULES_REQUIRE_CHROMIUM", "1")
    with pytest.raises(pytest.fail.Exception, match="No `chromium` on PATH"):
        browser.find_chromium()
