"""What a linter says about rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = get_args(Level)  # the worst first


@dataclass(frozen=True)
class Finding:
    """One fault of one rule or predicate.

    Attributes:
        file, line: where it stands; "-e" and the number of the text for rules of the command line.
        level: "error" (the rule cannot do what it is for), "warning" (it is hardly meant), or "note".
        code: what sort of fault, such as "never-true".
        name: of the rule or predicate, or "" where the file as a whole is meant.
        message: what is wrong.
        remedy: what to do, or "".
        witness: truth intervals of predicates that show it, where there are such.
    """

    file: str
    line: int
    level: Level
    code: str
    name: str
    message: str
    remedy: str = ""
    witness: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.level}: {' '.join([self.message, self.remedy]).strip()}"
