"""A run on one page of HTML that needs nothing else: no network, no script, no font.

    Path("report.html").write_text(render_report(open_run("runs/demo"), "demo"), "utf-8")

`page` writes the words, `pictures` the plots, `multiples` the panels by layer; `markup` escapes whatever is
put in. The same run gives the same bytes, on the same release of matplotlib.
"""

from __future__ import annotations

from .page import render_report

__all__ = ["render_report"]
