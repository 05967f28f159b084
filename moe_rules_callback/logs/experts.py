"""Columns of single experts, `expert_0` .. `expert_7` or `load/3`, joined to one array."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from .names import is_load, words

NUMBERED = re.compile(r"(?P<stem>.*?)[\s_./\-\[]*(?P<number>\d+)\]?$")
EXPERT = re.compile(r"(?P<before>.*expert)s?[\s_./\-\[]*(?P<number>\d+)\]?(?P<after>.*)$", re.IGNORECASE)


def join_experts(columns: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Columns [n] whose names differ in the number of an expert become one [n, E], at the place of the first.

    The numbers run from 0 or from 1 without a gap, two at least; the name says `expert`, or is one that
    loads go by. All others stay as they are.
    """
    groups: dict[str, dict[int, str]] = defaultdict(dict)
    for name, values in columns.items():
        stem, number = _expert(name)
        if stem and values.ndim == 1:
            groups[stem].setdefault(number, name)
    joined: dict[str, list[str]] = {}
    for stem, members in groups.items():
        numbers = sorted(members)
        whole = numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] in (0, 1)
        if whole and len(numbers) > 1 and stem not in columns:
            joined[stem] = [members[number] for number in numbers]
    place = {name: stem for stem, names in joined.items() for name in names}
    found: dict[str, np.ndarray] = {}
    for name, values in columns.items():
        if name not in place:
            found[name] = values
        elif (stem := place[name]) not in found:
            found[stem] = np.stack([columns[member] for member in joined[stem]], axis=1)
    return found


def _expert(name: str) -> tuple[str, int]:
    """The name without the number of its expert, and that number; ("", 0) if it is not about one."""
    if match := EXPERT.match(name):
        return match["before"] + match["after"], int(match["number"][:9])
    match = NUMBERED.match(name)
    if match and is_load(words(match["stem"])):
        return match["stem"], int(match["number"][:9])
    return "", 0
