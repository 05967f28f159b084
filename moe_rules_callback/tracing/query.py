"""Asks a trace by XPath.

    find(traced, '//module_call[@features=10]')
    find(traced, '//scan//top_k[@k=2]')
    find(traced, '//dot_general[input[contains(@parameter, "router")]]')

Elements are modules (`module_call`), scopes (`scope`), calls and primitives by their names; `trace.xml()`
shows them with their attributes. `pjit`, jax's older name of `jit`, is an alias; so are `remat2` and
`checkpoint`, of `remat`.
"""

from __future__ import annotations

import re

from ..errors import TracingError
from .tree import Node, Trace
from .walk import TAGS

# XPath 2.0 refuses to compare "(3, 3)" with 10, where 1.0 finds them unequal: number("(3, 3)") is NaN.
_NUMERIC = re.compile(r"(@[\w.-]+)\s*(=|!=|<=|>=|<|>)\s*(-?\d+(?:\.\d+)?)")
MAX_CHARACTERS = 10_000  # of a query
_QUOTED = re.compile(r"""("[^"]*"|'[^']*')""")


def find(trace: Trace, xpath: str) -> list[Node]:
    """The nodes that an XPath expression (1.0 or 2.0) selects, in the order in which they run.

    Raises:
        TracingError: the expression cannot be read, or selects something else than nodes.
    """
    elementpath = _elementpath()
    if len(xpath) > MAX_CHARACTERS:
        raise TracingError(f"A query has at most {MAX_CHARACTERS:,} characters, this one has {len(xpath):,}.")
    root, nodes = trace.tree()
    try:
        selected = elementpath.select(root, _normal(xpath), parser=elementpath.XPath2Parser)
    except elementpath.ElementPathError as error:
        raise TracingError(
            f"Cannot read the query {xpath!r} as XPath: {error}\n"
            """Queries look like //top_k[@k=2] or //module_call[@type="Dense"]."""
        ) from error
    except RecursionError:
        raise TracingError(
            f"The query {xpath[:40]!r}.. nests hundreds of parts. Ask in several queries."
        ) from None
    chosen = selected if isinstance(selected, list) else [selected]
    if any(id(element) not in nodes for element in chosen):
        raise TracingError(
            f"The query {xpath!r} selects something else than modules, scopes, calls and primitives: "
            f"{chosen[0]!r}. Let its last step name one of them: //top_k, not //top_k/@k."
        )
    return [nodes[id(element)] for element in chosen]


def _normal(xpath: str) -> str:
    """`//pjit[@name="relu"]` -> `//jit[@name="relu"]` and `@k=2` -> `number(@k)=2`; quoted text stays."""
    parts = _QUOTED.split(xpath)
    for old, new in TAGS.items():
        name = re.compile(rf"(?<![\w@.-]){old}(?![\w.-])")
        parts[::2] = [name.sub(new, part) for part in parts[::2]]
    parts[::2] = [_NUMERIC.sub(r"number(\1)\2\3", part) for part in parts[::2]]
    return "".join(parts)


def _elementpath():
    try:
        import elementpath
    except ModuleNotFoundError as error:
        raise TracingError(
            "Queries need the package elementpath, which is not installed. "
            "Install it: pip install 'moe-rules-callback[trace]'."
        ) from error
    return elementpath
