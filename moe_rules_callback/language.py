"""Rule text -> Rule.

    parse_formula("2*a & ~b")  ==  Connective("and", (Var("a"), Not(Var("b"))), (2.0, 1.0))

    rule = parse_rule("0.85 :: high_routing_confidence & low_activation_entropy", kind="health")
    rule.threshold, str(rule.formula)      # 0.85, "high_routing_confidence & low_activation_entropy"

What can be written, tightest first; operators of one line are left-associative:

    ~a   always[n] a   once[n] a   G[n] a   F[n] a   previously a   after[n] a
    a since[n] b
    a & b   a !& b
    a | b   a ^ b   a !| b
    a -> b   a ->[w] b   a <-> b

`2*a` weighs an operand of & | !& !|. Without [n] a temporal operator covers the whole run. Text from
`#` to the end of its line is a comment. `grammar.lark` is the grammar.
"""

from __future__ import annotations

import functools
import hashlib
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

from .formula import SYMBOLS, Formula, Rule
from .productions import DEFAULT_THRESHOLD, Productions
from .syntax_hints import Fault, blank_comments, explain, syntax_error

if TYPE_CHECKING:
    from lark import Lark

MAX_CHARACTERS = 10_000

_WORDS = {f" {symbol} ": f"_{kind}_" for kind, symbol in SYMBOLS.items()} | {"~": "not_", " at ": "_at_"}


def parse_formula(text: str) -> Formula:
    """Reads a formula, which is a rule without its threshold.

    Raises:
        RuleSyntaxError: the text cannot be read; the message shows where and says what was meant.
    """
    return _parse(text, "sole")


def parse_rule(text: str, name: str | None = None, **fields: Any) -> Rule:
    """Reads a rule such as `0.85 :: a & b`; without a threshold it is 0.75.

    Args:
        text: the rule.
        name: its name. None: a name made from the formula and a threshold other than 0.75, such as
            `a_and_b_at_0_85`; rules that mean something different never get the same one.
        fields: further fields of `Rule`: kind, warmup, severity, description, cause, next_step.

    Raises:
        RuleSyntaxError: the text cannot be read; the message shows where and says what was meant.
    """
    threshold, formula = _parse(text, "rule")
    name = _name(formula, threshold) if name is None else name
    return Rule(name, formula, threshold, text.strip(), **fields)


def _parse(text: str, start: str) -> Any:
    if not isinstance(text, str):
        raise TypeError(f"A rule is text such as '0.85 :: a & b', not {type(text).__name__}.")
    try:
        _check_before_parsing(text)
        return _read(text, start)
    except Fault as fault:
        raise syntax_error(text, fault) from None


def _check_before_parsing(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        message = f"a rule has at most {MAX_CHARACTERS:,} characters, this one has {len(text):,}"
        raise Fault(MAX_CHARACTERS, message, "Split it into several rules.")
    code = blank_comments(text)
    if not code.strip():
        raise Fault(0, "the rule is empty", "Write a formula over predicates: `0.85 :: a & b`.")
    if ahead := re.search(r"\b(X|next)\b", code):
        message = f"`{ahead[0]}` asks for the next step, which a running audit cannot see"
        hint = "Write `previously(a)`, and shift the rest of the rule by one step."
        raise Fault(ahead.start(), message, hint)


def _read(text: str, start: str) -> Any:
    from lark import UnexpectedCharacters, UnexpectedToken

    try:
        return _parser().parse(text, start)
    except UnexpectedCharacters as error:
        raise explain(text, error.pos_in_stream, ()) from None
    except UnexpectedToken as error:
        at = len(text) if error.token.type == "$END" else error.token.start_pos
        raise explain(text, at or 0, error.expected) from None


@functools.cache
def _parser() -> Lark:
    from lark import Lark

    grammar = resources.files("moe_rules_callback").joinpath("grammar.lark").read_text("utf-8")
    return Lark(grammar, parser="lalr", lexer="basic", start=["rule", "sole"], transformer=Productions())


def _name(formula: Formula, threshold: float) -> str:
    """A name in words, where these read back to the same rule, else words and a hash."""
    text = str(formula)
    if threshold != DEFAULT_THRESHOLD:
        text += f" at {threshold!r}".replace(".", "_")
    slug = text
    for symbol, word in _WORDS.items():
        slug = slug.replace(symbol, word)
    slug = re.sub(r"[\W_]+", "_", slug).strip("_")
    read_back = slug
    for symbol, word in _WORDS.items():
        read_back = read_back.replace(word, symbol)
    if read_back == text and len(slug) <= 80:
        return slug
    return f"{slug[:60].strip('_')}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
