"""Rules with the lines on which they stand, and all that keeps them from being read."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from ..axioms import Axioms
from ..conclusions import clauses, concluded, is_axiom
from ..errors import MoeRulesError, RulebookError, RuleSyntaxError, UnknownNameError
from ..formula import Rule, variables
from ..language import parse_rule
from ..predicates import ALIASES, SENSES, Predicate, is_measured, resolve
from ..rulebook import book_names, load_rules
from ..rulefile import Reader, read_text
from ..signals import SCALAR_RAMPS, Signal, scalar, shipped
from .findings import Finding

Source = str | os.PathLike[str] | Sequence[str]
TYPO = 0.85  # difflib's ratio from which a name is taken for another one, misspelt


class Placed(NamedTuple):
    """A rule and where it stands."""

    rule: Rule
    line: int


@dataclass
class Reading:
    """What could be read of a source, and the faults of the rest.

    Attributes:
        file: what findings call the source.
        rules: those that could be read.
        defined: predicates of the source by name, each with its line.
        predicates: all that rules of the source mean, by name; those nobody knows are missing.
        signals: what the predicates are about, by name.
        known: names of the signals that are there without these rules.
        axioms: those among the rules.
        findings: of syntax and names.
    """

    file: str
    rules: list[Placed] = field(default_factory=list)
    defined: dict[str, tuple[Predicate, int]] = field(default_factory=dict)
    predicates: dict[str, Predicate] = field(default_factory=dict)
    signals: dict[str, Signal] = field(default_factory=dict)
    known: frozenset[str] = frozenset()
    axioms: Axioms = field(default_factory=lambda: Axioms((), {}))
    findings: list[Finding] = field(default_factory=list)


def read(source: Source, predicates: Mapping[str, Predicate], signals: Mapping[str, Signal]) -> Reading:
    """Read rules for the linter.

    Args:
        source: the name of a shipped book, the path of a TOML file, or texts of rules.
        predicates, signals: of plugins, by name.

    Raises:
        RulebookError, UnknownNameError: there is no such file or book.
    """
    file = isinstance(source, str | os.PathLike)
    reading = _read_file(*_open(source)) if file else _read_texts(source)
    scalars = {name: scalar(name) for name in ("loss", *SCALAR_RAMPS)}
    reading.signals = shipped() | dict(signals) | scalars
    reading.known = frozenset(reading.signals)
    _resolve(reading, predicates)
    return reading


def _open(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Text and name of a file."""
    if source in book_names():
        file = f"{source}.toml"
        return resources.files("moe_rules_callback").joinpath("rules", file).read_text("utf-8"), file
    if isinstance(source, str) and not (source.endswith(".toml") or os.path.isfile(source)):
        load_rules(source)  # says what it is instead
    return read_text(Path(source)), str(source)


def _read_file(text: str, origin: str) -> Reading:
    reading = Reading(origin)
    try:
        file = Reader(text, origin)
    except RulebookError as error:
        reading.findings.append(_fault(error, origin, 1, ""))
        return reading
    for name, table in file.predicates.items():
        line = file.line(("predicates", name))
        try:
            reading.defined[name] = file.predicate(name, table), line
        except RulebookError as error:
            reading.findings.append(_fault(error, origin, line, name))
    for name, table in file.rules.items():
        line = file.line(("rules", name, "rule") if isinstance(table, dict) else ("rules", name))
        try:
            reading.rules.append(Placed(file.rule(name, table), line))
        except (RulebookError, RuleSyntaxError) as error:
            reading.findings.append(_fault(error, origin, line, name))
    return reading


def _read_texts(texts: Sequence[str]) -> Reading:
    reading = Reading("-e")
    for line, text in enumerate(texts, 1):
        try:
            reading.rules.append(Placed(parse_rule(text), line))
        except RuleSyntaxError as error:
            reading.findings.append(_fault(error, "-e", line, ""))
    return reading


def _fault(error: MoeRulesError, origin: str, line: int, name: str) -> Finding:
    """An error as a finding; where it names its line, that one counts."""
    message = str(error)
    if told := re.match(rf"{re.escape(origin)}, line (\d+)(, rule '.*?')?: ", message):
        line, message = int(told[1]), message[told.end() :]
        message = f"rule '{name}': {message}" if told[2] else message
    elif told := re.search(r"\(at line (\d+), column \d+\)", message):  # of tomllib
        line = int(told[1])
    return Finding(
        origin,
        line,
        "error",
        "syntax",
        name,
        message.removeprefix(f"{origin} is ").removeprefix(f"{origin} "),
    )


def _resolve(reading: Reading, given: Mapping[str, Predicate]) -> None:
    """Find what each name means; what nobody knows is a finding at the first rule that uses it."""
    own = {**given, **{name: predicate for name, (predicate, _) in reading.defined.items()}}
    _conclude(reading, own)
    known = {name: reading.signals[name] for name in reading.known}
    uses: dict[str, Placed] = {}
    for placed in reading.rules:
        for name in variables(placed.rule.formula):
            if name not in reading.axioms.names:
                uses.setdefault(name, placed)
    for name, placed in uses.items():
        if name in reading.defined:
            predicate, line = reading.defined[name]
            reading.predicates[name] = _over_scalar(reading, predicate, line, name, f"predicate '{name}'")
            continue
        where = f"rule '{placed.rule.name}'"
        try:
            predicate = resolve(name, own, known)
        except UnknownNameError as error:
            sense, _, rest = name.partition("_")
            if sense not in SENSES or not rest:
                message = f"{where}: {error}"
                reading.findings.append(
                    Finding(reading.file, placed.line, "error", "unknown-name", placed.rule.name, message)
                )
                continue
            predicate = Predicate(rest, sense)
        reading.predicates[name] = _over_scalar(reading, predicate, placed.line, placed.rule.name, where)
    for name, (_, line) in reading.defined.items():
        if name not in uses:
            message = f"predicate '{name}' is used by no rule."
            reading.findings.append(Finding(reading.file, line, "note", "unused", name, message))


def _conclude(reading: Reading, own: Mapping[str, Predicate]) -> None:
    """Find the axioms. One of a form that cannot be is a finding, and dropped from the rules."""
    names = concluded([placed.rule for placed in reading.rules], partial(is_measured, own=own))
    kept = []
    for placed in reading.rules:
        rule = placed.rule
        try:
            if is_axiom(rule, names):
                clauses(rule, names)
            kept.append(placed)
        except RulebookError as error:
            finding = Finding(reading.file, placed.line, "error", "axiom", rule.name, str(error))
            reading.findings.append(finding)
    reading.rules = kept
    reading.axioms = Axioms([placed.rule for placed in kept], own, names)


def _over_scalar(reading: Reading, predicate: Predicate, line: int, name: str, where: str) -> Predicate:
    """The predicate; where its signal is unknown, it is a scalar of the user's or a misspelling."""
    signal = predicate.signal
    if signal not in reading.signals:
        near = difflib.get_close_matches(signal, sorted({*reading.known, *ALIASES}), n=1, cutoff=TYPO)
        message = f"{where}: '{signal}' is no shipped signal, so every step must pass it as a scalar."
        hint = f"Did you mean '{near[0]}'?" if near else ""
        level = "warning" if near else "note"
        reading.findings.append(Finding(reading.file, line, level, "unknown-signal", name, message, hint))
        reading.signals[signal] = scalar(signal)
    return predicate
