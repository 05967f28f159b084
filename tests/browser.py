"""A page as Chromium shows it: a picture to look at, and what the page said on its console.

    messages = screenshot("report.html", "report.png", width=390, dark=True)
    assert messages == []

Chromium is the one of the system (Debian's package `chromium`); Playwright only drives it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright


def find_chromium() -> str:
    """The browser; skips the test where there is none, unless MOE_RULES_REQUIRE_CHROMIUM is set."""
    found = shutil.which("chromium")
    if found is None:
        reason = "No `chromium` on PATH: install Debian's package of that name."
        if os.environ.get("MOE_RULES_REQUIRE_CHROMIUM"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def screenshot(
    page_at: str | Path,
    out: str | Path,
    width: int = 1280,
    height: int = 900,
    *,
    dark: bool = False,
    then: Callable[[Page], object] | None = None,
) -> list[str]:
    """Opens a page, photographs all of it, and returns its errors and warnings.

    Args:
        page_at: URL, or path of a file.
        out: PNG to write; the folder must exist.
        width: of the window, in CSS pixels. Below 500 it is a telephone: touch, and a viewport that
            follows `<meta name="viewport">`.
        height: of the window; the picture is as high as the page.
        dark: whether the reader prefers dark pages.
        then: called with Playwright's `Page` before the picture is taken, to wait, click and look.

    Returns:
        Console messages of type error or warning, exceptions that nobody caught, and requests that failed,
        each with its kind in front. Empty for a sound page.
    """
    url = str(page_at) if "://" in str(page_at) else Path(page_at).resolve().as_uri()
    said: list[str] = []
    with sync_playwright() as playwright:
        # root, which containers run as, has no sandbox; /dev/shm is often too small there
        arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=arguments)
        page = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            is_mobile=width < 500,
            has_touch=width < 500,
        )
        page.on("console", lambda told: _note(said, told.type, told.text))
        page.on("pageerror", lambda error: _note(said, "exception", str(error)))
        page.on("requestfailed", lambda request: _note(said, "not loaded", request.url))
        page.goto(url, wait_until="load")
        if then is not None:
            then(page)
        page.screenshot(path=out, full_page=True)
        browser.close()
    return said


def _note(said: list[str], kind: str, text: str) -> None:
    if kind not in ("log", "debug", "info"):
        said.append(f"{kind}: {text}")
