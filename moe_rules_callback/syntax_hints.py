"""What is wrong with the text of a rule, in the words of someone who wrote another language.

    `&&` is not an operator of the rule language (line 1, column 3)
        a && b
          ^
    Write `&` for `&&`.

`explain` turns the place where reading stopped into a `Fault`; `syntax_error` draws the caret.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection

from .errors import RuleSyntaxError

TEMPORAL = ("always", "once", "previously", "after", "since", "G", "F", "X", "next")
COMMENT = re.compile(r"#[^\n]*")

_OPERATORS = {
    "&": ("&&", "and", "∧", "⋀", "/\\"),
    "|": ("||", "or", "∨", "⋁", "\\/"),
    "~": ("!", "not", "¬", "∼"),
    "->": ("=>", "-->", "==>", "→", "⇒", "⟹", "implies", "then"),
    "<->": ("<=>", "<-->", "==", "===", "=", "↔", "⇔", "≡", "iff"),
    "^": ("!=", "xor", "⊕", "⊻"),
    "!&": ("nand", "⊼"),
    "!|": ("nor", "⊽"),
}
_MEANT = {foreign: ours for ours, all_foreign in _OPERATORS.items() for foreign in all_foreign}
_SPELLINGS = sorted(_MEANT, key=len, reverse=True)  # the longest first: `<=>` before `=>`
_FOREIGN = re.compile(
    "|".join(rf"\b(?i:{s})\b" if s.isalpha() and s.isascii() else re.escape(s) for s in _SPELLINGS),
    re.ASCII,  # or (?i:iff) would match a dotless i
)
_LONG = re.compile(r"(\w{60})\w+")  # a name or number of which a message shows the begin
_SPACE = " \t\r\n\f"  # what the grammar ignores
_BRACKETS = "Write `always[32](a)` or `a ->[2] b`."
_ADVICE = {
    ":": "A threshold is followed by two colons: `0.85 :: a & b`.",
    ",": "Write a number with a point, and join operands with `&` or `|`.",
    "-": "Negation is `~a`, implication `a -> b`; names are written with `_`.",
    "*": "`*` stands between a weight and its operand, `2*a & b`; to join operands write `&`.",
    "+": "To join operands write `|` or `&`.",
    "%": "Write the threshold as a fraction: `0.85 :: a & b`.",
    "[": "Group with parentheses, `(a | b) & c`; `[n]` follows `->` or a temporal operator only.",
    "{": "Group with parentheses: `(a | b) & c`.",
    '"': "Names stand without quotes.",
    "'": "Names stand without quotes.",
} | dict.fromkeys("<>≤≥", "A rule compares no numbers: use a predicate such as `high_load_cv`.")


class Fault(Exception):
    """A fault at an offset of the text; `syntax_error` makes it presentable."""

    def __init__(self, at: int, message: str, hint: str = "") -> None:
        self.at, self.message, self.hint = at, message, hint
        super().__init__(message)


def blank_comments(text: str) -> str:
    """The text with spaces for comments, so that every offset stays what it was."""
    return COMMENT.sub(lambda comment: " " * len(comment[0]), text)


def explain(text: str, at: int, expected: Collection[str]) -> Fault:
    """Why reading stopped at offset `at`, where one of the terminals `expected` had to follow.

    `expected` is empty where the character at `at` belongs to no terminal of the grammar.
    """
    code = blank_comments(text)
    before, rest = code[:at].rstrip(_SPACE), code[at:].lstrip(_SPACE)
    at = len(code) - len(rest) if rest else len(before)
    token = re.match(r"[A-Za-z0-9_]+|::|!?[&|]|<?->|.", rest)
    last, found = _last(before), token[0] if token else ""

    for foreign in _FOREIGN.finditer(code):
        if foreign.start() <= at and len(before) <= foreign.end():
            spelt = foreign[0]
            message = f"`{spelt}` is not an operator of the rule language"
            return Fault(foreign.start(), message, f"Write `{_MEANT[spelt.lower()]}` for `{spelt}`.")
    if last == "[":
        return Fault(at, "a number is missing after `[`", _BRACKETS)
    if not expected:
        return _unknown_character(at, found)
    if "NAME" in expected:
        return _missing_operand(at, last, found)
    if "STAR" in expected:
        return _stray_number(at, before, last, found)
    if "RSQB" in expected:
        return Fault(at, f"`]` is missing after `{last}`", _BRACKETS)
    return _missing_operator(at, code, last, found)


def syntax_error(text: str, fault: Fault) -> RuleSyntaxError:
    """The fault with the line of text it stands in, at most 121 characters of it, and a caret."""
    start = text.rfind("\n", 0, fault.at) + 1
    line, column = text.count("\n", 0, start) + 1, fault.at - start + 1
    left = max(start, fault.at - 60)
    source, _, more_lines = text[left : fault.at + 61].partition("\n")
    shown = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in source)
    before = "… " if left > start else ""
    after = " …" if not more_lines and fault.at + 61 < len(text) else ""
    what, hint = (_LONG.sub(r"\1..", told) for told in (fault.message, fault.hint))
    message = [
        f"{what} (line {line}, column {column})",
        f"    {before}{shown.rstrip()}{after}",
        f"    {' ' * (len(before) + fault.at - left)}^",
    ]
    message += [hint] if hint else []
    return RuleSyntaxError("\n".join(message), text=text, line=line, column=column, hint=hint)


def _last(code: str) -> str:
    """The last name, number or symbol of `code`."""
    match = re.search(r"(?<![\w.])[\w.]+$|::$|!?[&|]$|<?->$|.$", code)
    return match[0] if match else ""


def _unknown_character(at: int, character: str) -> Fault:
    message = f"`{character}` has no meaning here"
    if not (character.isascii() and character.isprintable()):
        name = unicodedata.name(character, "a control character")
        message = f"the character U+{ord(character):04X} ({name}) has no meaning here"
    hint = "Names are made of the letters a-z, A-Z, digits and `_`."
    return Fault(at, message, _ADVICE.get(character, hint))


def _missing_operand(at: int, last: str, found: str) -> Fault:
    if (last, found) == ("(", ")"):
        return Fault(at, "the parentheses are empty", "Put a formula between them.")
    if found == "::":
        message = "`::` stands where an operand was expected"
        return Fault(at, message, "A rule begins with its threshold: `0.85 :: a & b`.")
    hint = _ADVICE.get(found, "")
    if temporal := [word for word in (found, last) if word in TEMPORAL]:
        hint = f"`{temporal[0]}` is a temporal operator and cannot name a predicate."
    sides = ((f"after `{last}`", last), (f"before `{found}`", found))
    message = "an operand is missing " + " and ".join(where for where, token in sides if token)
    return Fault(at, message, hint)


def _stray_number(at: int, before: str, number: str, found: str) -> Fault:
    start = len(before) - len(number)
    if found == "::":
        message = "`::` stands once, at the start of a rule"
        return Fault(at, message, "The threshold belongs to the whole rule: `0.85 :: a & b`.")
    if start == 0 and found:
        message = f"`::` or `*` is missing after `{number}`"
        return Fault(at, message, "A threshold is written `0.85 :: a & b`, a weight `2*a & b`.")
    message = f"the number `{number}` is not an operand"
    return Fault(start, message, "A weight is written before its operand: `2*a & b`.")


def _missing_operator(at: int, code: str, last: str, found: str) -> Fault:
    if not found:
        return Fault(_unclosed(code), "this `(` is never closed", "Close it with `)`.")
    if found in ")]":
        return Fault(at, f"this `{found}` closes nothing", "Take it away, or open it.")
    if found == "::":
        message = "`::` stands after a threshold, at the start of a rule"
        return Fault(at, message, "Write `0.85 :: a & b`.")
    hint = _ADVICE.get(found, "Join operands with `&`, `|` or `->`.")
    if last.isidentifier() and found.isidentifier():
        hint = f"Write `{last} & {found}` or `{last} | {found}`."
    return Fault(at, f"an operator is missing between `{last}` and `{found}`", hint)


def _unclosed(code: str) -> int:
    """Offset of the innermost parenthesis that is never closed."""
    depth = 0
    for at in range(len(code) - 1, -1, -1):
        depth += {")": 1, "(": -1}.get(code[at], 0)
        if depth < 0:
            return at
    return len(code)
