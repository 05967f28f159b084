"""HTML from templates in which whatever is put is escaped, unless it is HTML already.

fill("<td>$name</td>", name="<b>")                   <td>&lt;b&gt;</td>
fill("<tr>$cell</tr>", cell=fill("<td>1</td>"))      <tr><td>1</td></tr>
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from string import Template


class Html(str):
    """Text that is HTML, and safe to put into a page."""


def fill(template: str, /, **values: object) -> Html:
    """The template with its `$names` replaced; a template is this package's own and never escaped."""
    return Html(Template(template).substitute({name: escape(value) for name, value in values.items()}))


def escape(value: object) -> Html:
    """The value as HTML, fit for text and for attributes in double quotes."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def breakable(name: object) -> Html:
    """A name that may be broken behind its underscores and slashes, where it does not fit on a line."""
    return (
        name if isinstance(name, Html) else Html(escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>"))
    )


def join(parts: Iterable[Html]) -> Html:
    """Several pieces, one after another."""
    return Html("\n".join(parts))


def table(caption: str, heads: Iterable[str], rows: Iterable[Iterable[object]]) -> Html:
    """A table whose first column names its rows, or nothing without rows. It scrolls where it is too wide."""
    first = join(fill('<th scope="col">$head</th>', head=head) for head in heads)
    lines = []
    for name, *cells in rows:
        head = fill('<th scope="row">$name</th>', name=breakable(name))
        lines.append(fill("<tr>$line</tr>", line=join([head, *(fill("<td>$x</td>", x=x) for x in cells)])))
    if not lines:
        return Html()
    return fill(
        '<div class="wide" tabindex="0" role="group" aria-label="$caption"><table><caption>$caption</caption>'
        "<thead><tr>$first</tr></thead><tbody>$lines</tbody></table></div>",
        caption=caption,
        first=first,
        lines=join(lines),
    )


def settings(caption: str, values: Mapping[str, object]) -> Html:
    """A table of names and values; what is nested is named with dots."""
    return table(caption, ("Name", "Value"), _flat("", values))


def _flat(prefix: str, values: Mapping[str, object]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(f"{prefix}{name}.", value)
        elif isinstance(value, list):
            rows.append((f"{prefix}{name}", ", ".join(map(str, value))))
        else:
            rows.append((f"{prefix}{name}", "not set" if value is None else value))
    return rows
