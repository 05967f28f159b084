"""golden/truth_intervals.json: truth intervals that the IBM LNN reference implementation gives too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_rules_callback.formula import Connective, Formula, Not, Var

TABLE = json.loads((Path(__file__).parent / "golden" / "truth_intervals.json").read_text())
INPUTS: dict[str, dict[str, list[float]]] = TABLE["inputs"]
CASES: list[dict[str, Any]] = TABLE["cases"]
TEXTS = [case["formula"] for case in CASES]


def read(ast: list[Any]) -> Formula:
    """["and", ["var", "a"], ..] as a formula."""
    match ast:
        case ["var", name]:
            return Var(name)
        case ["not", operand]:
            return Not(read(operand))
        case [kind, *operands]:
            return Connective(kind, tuple(map(read, operands)))
    raise ValueError(ast)
