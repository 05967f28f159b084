"""What a rule says, as a tree of frozen, hashable nodes; equal trees are equal objects.

    parse_formula("2*a & ~b")  ==  Connective("and", (Var("a"), Not(Var("b"))), (2.0, 1.0))

`language` reads text into these nodes, `str(node)` writes them back, `program` compiles them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import RulebookError

Kind = Literal["and", "or", "nand", "nor", "implies", "iff", "xor"]
SYMBOLS: dict[Kind, str] = {
    "and": "&", "or": "|", "nand": "!&", "nor": "!|", "implies": "->", "iff": "<->", "xor": "^",
}  # fmt: skip


@dataclass(frozen=True)
class Var:
    """The truth of the predicate `name`."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Not:
    """~ operand."""

    operand: Formula

    def __str__(self) -> str:
        return f"~{_inner(self.operand)}"


@dataclass(frozen=True)
class Connective:
    """operands[0] OP operands[1] OP ..., each with its weight >= 0.

    `and` and `or` take two or more operands (chains are flattened: with beta = 1 that changes no
    bound), the others exactly two. Weights other than 1 occur with and, or, nand, nor, and as the
    second weight of `implies` (`a ->[w] b`).
    """

    kind: Kind
    operands: tuple[Formula, ...]
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", self.weights or (1.0,) * len(self.operands))

    def __str__(self) -> str:
        symbol = SYMBOLS[self.kind]
        if self.kind == "implies":
            if self.weights[1] != 1.0:
                symbol += f"[{_number(self.weights[1])}]"
            return f" {symbol} ".join(map(_inner, self.operands))
        pairs = zip(self.operands, self.weights, strict=True)
        return f" {symbol} ".join(
            _inner(operand) if weight == 1.0 else f"{_number(weight)}*{_inner(operand)}"
            for operand, weight in pairs
        )


@dataclass(frozen=True)
class Always:
    """The minimum of each bound over the last `rows` rows; None: since the run began."""

    rows: int | None
    operand: Formula

    def __str__(self) -> str:
        return f"always{_window(self.rows)}({self.operand})"


@dataclass(frozen=True)
class Once:
    """The maximum of each bound over the last `rows` rows; None: since the run began."""

    rows: int | None
    operand: Formula

    def __str__(self) -> str:
        return f"once{_window(self.rows)}({self.operand})"


@dataclass(frozen=True)
class Previously:
    """The operand at the row before."""

    operand: Formula

    def __str__(self) -> str:
        return f"previously({self.operand})"


@dataclass(frozen=True)
class Since:
    """At one of the last `rows` rows (None: ever) `right` held, and `left` has held after it."""

    rows: int | None
    left: Formula
    right: Formula

    def __str__(self) -> str:
        return f"{_inner(self.left)} since{_window(self.rows)} {_inner(self.right)}"


@dataclass(frozen=True)
class After:
    """[0, 1] while the step is below `step`, then the operand: the warm-up gate."""

    step: int
    operand: Formula

    def __str__(self) -> str:
        return f"after[{self.step}]({self.operand})"


Formula = Var | Not | Connective | Always | Once | Previously | Since | After
RuleKind = Literal["health", "risk"] | None
Severity = Literal["info", "warning", "error"]
KINDS = ("health", "risk")
SEVERITIES = get_args(Severity)


@dataclass(frozen=True)
class Rule:
    """One named rule.

    Attributes:
        name: unique in its book.
        formula: what is evaluated.
        threshold: alpha in (0.5, 1]; decides the state, never changes an interval.
        text: as the user wrote it, threshold included.
        kind: "health" (its truth is good news), "risk" (bad news), or None (watched, never fires).
        warmup: steps before which it does not fire.
        severity, description, cause, next_step: what an alert says.

    Raises:
        RulebookError: a kind, severity or threshold that does not exist.
    """

    name: str
    formula: Formula
    threshold: float = 0.75
    text: str = ""
    kind: RuleKind = None
    warmup: int = 0
    severity: Severity = "warning"
    description: str = ""
    cause: str = ""
    next_step: str = ""

    def __post_init__(self) -> None:
        told = {"kind": (self.kind, (None, *KINDS)), "severity": (self.severity, SEVERITIES)}
        for what, (value, allowed) in told.items():
            if value not in allowed:
                raise RulebookError(
                    f"rule '{self.name}': {what} is {value!r}; it is one of {', '.join(map(repr, allowed))}."
                )
        if not 0.5 < self.threshold <= 1:
            raise RulebookError(
                f"rule '{self.name}': the threshold is {self.threshold}; it lies above 0.5 and is at most 1."
            )

    def _repr_html_(self) -> str:
        from .html import rule_html

        return rule_html(self)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from .html import in_treescope

        return in_treescope(self, self.text or str(self.formula), path, subtree_renderer)


def children(node: Formula) -> tuple[Formula, ...]:
    """The direct operands of a node, left to right."""
    match node:
        case Var():
            return ()
        case Connective(operands=operands):
            return operands
        case Since(left=left, right=right):
            return (left, right)
        case _:
            return (node.operand,)


def variables(node: Formula) -> Iterator[str]:
    """Names of all predicates in a formula, with repetitions, left to right."""
    stack: list[Formula] = [node]
    while stack:
        node = stack.pop()
        if isinstance(node, Var):
            yield node.name
        stack.extend(reversed(children(node)))


def _number(weight: float) -> str:
    return repr(float(weight)).removesuffix(".0")


def _window(rows: int | None) -> str:
    return "" if rows is None else f"[{rows}]"


def _inner(node: Formula) -> str:
    """Text of an operand: binary operands in parentheses, so that it reads back the same."""
    return f"({node})" if isinstance(node, Connective | Since) else str(node)
