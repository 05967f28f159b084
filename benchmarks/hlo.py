"""What the text of a compiled program says: `compiled.as_text()`, XLA's HLO.

%fusion.1 = (f32[64]{0:T(128)}, bf16[64,512]{1,0}) fusion(%param.0, %copy-done.3), kind=kLoop, ..
"""

from __future__ import annotations

import math
import re
from collections import Counter

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(\S+) = (.*?) ([a-z][\w-]*)\((.*)", re.M)  # name, shape, op, rest
ARRAY = re.compile(r"\b(?:pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")  # bits, axes
OPERAND = re.compile(r"%([\w.-]+)")
COLLECTIVE = re.compile(r"(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?$")
# A custom call is how XLA's TPU compiler puts together the slices of a copy.
NO_WORK = re.compile(
    r"(parameter|constant|tuple|get-tuple-element|bitcast|custom-call|copy|copy-start|slice-start|.*-done)$"
)


def bytes_of(shape: str) -> float:
    """Bytes of an array or of a tuple of arrays, such as `(f32[8,64]{1,0}, bf16[3])`."""
    return sum(
        int(bits or 8) / 8 * math.prod(int(n) for n in axes.split(",") if n)
        for bits, axes in ARRAY.findall(shape)
    )


def collectives(text: str) -> tuple[Counter[str], Counter[str]]:
    """How many of each kind there are, and how many of each array they give (XLA joins small ones)."""
    found = [
        (kind[1], shape) for _, shape, op, _ in INSTRUCTION.findall(text) if (kind := COLLECTIVE.match(op))
    ]
    arrays = (array[0] for _, shape in found for array in ARRAY.finditer(shape))
    return Counter(kind for kind, _ in found), Counter(arrays)


def touched(text: str) -> float:
    """Bytes of the operands and results of all instructions; a fusion is one, copies are none."""
    instructions = INSTRUCTION.findall(text[text.index("\nENTRY") :])
    sizes = {name: bytes_of(shape) for name, shape, _, _ in instructions}
    total = 0.0
    for name, _, op, rest in instructions:
        if not NO_WORK.match(op):
            operands = OPERAND.findall(rest.split("), ")[0])
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in operands)
    return total


def aliases(text: str) -> int:
    """How many results take the memory of an argument that was donated."""
    return len(re.findall(r"(?:may|must)-alias", text.split("\n", 1)[0]))
