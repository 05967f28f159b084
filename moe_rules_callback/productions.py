"""What each production of `grammar.lark` means: tokens and subformulas -> a formula.

    operand: NOT operand -> negation        Productions.negation([Token("NOT", "~"), Part(Var("a"))])
                                            == Part(Not(Var("a")), depth=1)

Here stand the limits of what a rule may say. A fault is raised with the offset where it is seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .formula import (
    SYMBOLS,
    After,
    Always,
    Connective,
    Formula,
    Kind,
    Not,
    Once,
    Previously,
    Since,
    Var,
    children,
)  # fmt: skip
from .syntax_hints import Fault

if TYPE_CHECKING:
    from lark import Token

DEFAULT_THRESHOLD = 0.75
MAX_DEPTH = 64  # keeps hash, ==, repr, pickle and copy of a formula away from Python's recursion limit
MAX_ROWS = 1_000_000  # of all windows of a rule together: each row is kept, for each layer
MAX_WEIGHT = 1e6  # far inside float32, in which rules are evaluated

_KINDS: dict[str, Kind] = {symbol: kind for kind, symbol in SYMBOLS.items()}
_WINDOWED = {"always": Always, "G": Always, "once": Once, "F": Once}


class Part(NamedTuple):
    """A subformula while its surroundings are still being read."""

    node: Formula
    depth: int = 0
    weight: Token | None = None


class Productions:
    """What each production of `grammar.lark` means. The parser calls these bottom-up, never nested."""

    def rule(self, found: list[Any]) -> tuple[float, Formula]:
        token, part = found
        threshold = DEFAULT_THRESHOLD if token is None else float(token)
        if not 0.5 < threshold <= 1.0:
            message = f"the threshold {token} is not in (0.5, 1]"
            hint = "A rule is TRUE when its lower bound reaches the threshold. For the opposite, negate it."
            if 50 < threshold <= 100:
                hint = f"Write it as a fraction: `{threshold / 100:g} ::`."
            raise Fault(_offset(token), message, hint)
        return threshold, _whole_formula(part)

    def sole(self, found: list[Any]) -> Formula:
        return _whole_formula(found[0])

    def formula(self, found: list[Any]) -> Part:
        left, *rest = found
        for (arrow, weight), right in zip(rest[::2], rest[1::2], strict=True):
            if arrow == "<->" and weight is not None:
                raise Fault(_offset(weight), "`<->` takes no weight", "Only `a ->[2] b` does.")
            operands = (_bare(left, arrow).node, _bare(right, arrow).node)
            node = Connective(_KINDS[arrow], operands, (1.0, _weight(weight)))
            left = _joined(arrow, node, left.depth, right.depth)
        return left

    def both(self, found: list[Any]) -> Part:
        return _chain(found)

    def either(self, found: list[Any]) -> Part:
        return _chain(found)

    def past(self, found: list[Any]) -> Part:
        left, *rest = found
        for (since, window), right in zip(rest[::2], rest[1::2], strict=True):
            node = Since(_rows(window), _bare(left, since).node, _bare(right, since).node)
            left = _joined(since, node, left.depth, right.depth)
        return left

    def variable(self, found: list[Any]) -> Part:
        return Part(Var(str(found[0])))

    def group(self, found: list[Any]) -> Part:
        return _bare(found[0])

    def negation(self, found: list[Any]) -> Part:
        tilde, part = found
        return _joined(tilde, Not(_bare(part, tilde).node), part.depth)

    def weighted(self, found: list[Any]) -> Part:
        token, part = found
        _weight(token)
        return _bare(part, "*")._replace(weight=token)

    def temporal(self, found: list[Any]) -> Part:
        prefix, window, part = found
        operand = _bare(part, prefix).node
        if prefix in _WINDOWED:
            node = _WINDOWED[prefix](_rows(window), operand)
        elif prefix == "previously" and window is None:
            node = Previously(operand)
        elif prefix == "previously":
            hint = "For a window write `once[n](a)` or `always[n](a)`."
            raise Fault(_offset(window), "`previously` looks one row back and takes no `[n]`", hint)
        elif window is None:
            message = "`after` needs the step from which a rule counts"
            raise Fault(_offset(prefix), message, "Write `after[100](a)`.")
        else:
            node = After(_whole(window, 0), operand)
        return _joined(found[0], node, part.depth)

    def arrow(self, found: list[Any]) -> list[Any]:
        return found

    def since(self, found: list[Any]) -> list[Any]:
        return found

    def window(self, found: list[Any]) -> Any:
        return found[0]


def _chain(found: list[Any]) -> Part:
    """Operands joined by & and !&, or by | !| ^; a run of & or of | becomes one node."""
    left, *rest = found
    run: Connective | None = None  # `left` while further operands may join it
    for operator, right in zip(rest[::2], rest[1::2], strict=True):
        kind = _KINDS[operator]
        if kind == "xor":
            left, right = _bare(left, operator), _bare(right, operator)
        if run is not None and kind == run.kind:
            operands, weights, depth = run.operands, run.weights, left.depth - 1
        else:
            operands, weights, depth = (left.node,), (_weight(left.weight),), left.depth
        node = Connective(kind, (*operands, right.node), (*weights, _weight(right.weight)))
        left = _joined(operator, node, max(depth, right.depth))
        run = node if kind in ("and", "or") else None
    return left


def _joined(operator: Any, node: Formula, *depths: int) -> Part:
    """`node`, which `operator` made of operands nested `depths` deep."""
    depth = 1 + max(depths)
    if depth > MAX_DEPTH:
        message = f"a rule nests at most {MAX_DEPTH} operators inside each other"
        raise Fault(_offset(operator), message, "Split it into several rules.")
    return Part(node, depth)


def _whole_formula(part: Part) -> Formula:
    """The formula of a rule, all parts of which have been read."""
    rows, waiting = 0, [_bare(part).node]
    while waiting:
        node = waiting.pop()
        rows += (node.rows or 0) if isinstance(node, Always | Once | Since) else 0
        waiting += children(node)
    if rows > MAX_ROWS:
        message = f"the windows of a rule have at most {MAX_ROWS:,} rows together, these have {rows:,}"
        raise Fault(0, message, "Shorten them, or leave `[n]` out: without it the whole run is covered.")
    return part.node


def _bare(part: Part, operator: str = "") -> Part:
    """The part, which must have no weight: it is no operand of & | !& !|."""
    if part.weight is None:
        return part
    hint = "Alone a weight changes nothing: take it away."
    if operator == "->":
        hint = "Write `a ->[2] b` to weigh b, or put parentheses around the weighted formula."
    elif operator:
        hint = f"Put it before the operand as a whole, or take it away: `{operator}` weighs nothing."
    message = "a weight stands only before an operand of `&`, `|`, `!&` or `!|`"
    raise Fault(_offset(part.weight), message, hint)


def _weight(token: Token | None) -> float:
    weight = 1.0 if token is None else float(token)
    if token is not None and not 0 < weight <= MAX_WEIGHT:
        hint = "An operand of weight 0 does nothing: leave it out." if weight == 0 else ""
        message = f"a weight is above 0 and at most {MAX_WEIGHT:,.0f}"
        raise Fault(_offset(token), message, hint)
    return weight


def _rows(window: Token | None) -> int | None:
    return None if window is None else _whole(window, 1)


def _whole(token: Token, least: int) -> int:
    """A number between brackets, in rows or steps."""
    if not token.isdecimal() or not least <= float(token) <= MAX_ROWS:
        message = f"`[{token[:20]}]` is not a whole number from {least} to {MAX_ROWS:,}"
        hint = "Without `[n]` an operator covers the whole run." if least else ""
        raise Fault(_offset(token), message, hint)
    return int(float(token))  # int("0" * 5000) would raise


def _offset(token: Any) -> int:
    return token.start_pos
