"""Text for a terminal: names and texts that come from files cannot steer it.

    show("rule \\x1b[2Jevil: ...")            rule \\x1b[2Jevil: ...

A terminal obeys escape sequences, which may clear it, rename its window or fill the clipboard; and signs that
turn the direction of writing make text read as what it is not.
"""

from __future__ import annotations

import sys
from typing import TextIO


def plain(text: object) -> str:
    """The text with all that does not print, line breaks and tabs excepted, as Python writes it: `\\x1b`."""
    told = str(text)
    return told if told.isprintable() else "".join(map(_plain, told))


def _plain(c: str) -> str:
    return c if c.isprintable() or c in "\n\t\u00a0" else c.encode("unicode_escape").decode("ascii")


def show(*told: object, to: TextIO | None = None) -> None:
    """Prints each on lines of its own; `to` None: standard output."""
    print(*map(plain, told), sep="\n", file=to or sys.stdout, flush=True)
