"""What `moe-rules check` leaves for machines: JUnit XML and Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from ..formula import SEVERITIES, Severity
from ..proof import lines as proof_lines
from ..terminal import plain
from ..verdicts import Verdict, by_role, summary


@dataclass(frozen=True)
class Checked:
    """A checked run.

    Attributes:
        name: of the log.
        found: the verdict of each rule that was evaluated.
        left_out: names of rules whose signals the log lacks.
        fail_on: lowest severity that fails.
    """

    name: str
    found: Sequence[Verdict]
    left_out: Sequence[str]
    fail_on: Severity

    @property
    def failures(self) -> list[Verdict]:
        """The verdicts for which the check fails."""
        enough = SEVERITIES[SEVERITIES.index(self.fail_on) :]
        return [verdict for verdict in self.found if verdict.fired and verdict.severity in enough]


def junit(checked: Checked) -> str:
    """JUnit XML: a test case for each rule; one that was not judged is skipped."""
    skipped = {verdict.rule: verdict.sentence for verdict in checked.found if _open(verdict)}
    skipped |= dict.fromkeys(checked.left_out, "left out: the log lacks its signals.")
    failed = {verdict.rule: verdict for verdict in checked.failures}
    told = {verdict.rule: str(verdict) for verdict in checked.found}
    names = [*told, *checked.left_out]
    counts = {"tests": len(names), "failures": len(failed), "errors": 0, "skipped": len(skipped)}
    numbers = {key: str(count) for key, count in counts.items()} | {"time": "0"}
    root = ElementTree.Element("testsuites", {"name": "moe-rules"} | numbers)
    del root.attrib["skipped"]  # schemas know it for a suite only
    suite = ElementTree.SubElement(root, "testsuite", {"name": _legal(checked.name)} | numbers)
    for name in names:
        case = {"name": _legal(name), "classname": "moe-rules", "time": "0"}
        element = ElementTree.SubElement(suite, "testcase", case)
        if name in failed:
            verdict = failed[name]
            what = {"message": _legal(verdict.sentence), "type": verdict.severity}
            ElementTree.SubElement(element, "failure", what).text = _legal(str(verdict))
        elif name in skipped:
            ElementTree.SubElement(element, "skipped", {"message": _legal(skipped[name])})
        else:
            ElementTree.SubElement(element, "system-out").text = _legal(told[name])
    ElementTree.indent(root)
    return ElementTree.tostring(root, "unicode", xml_declaration=True) + "\n"


def markdown(checked: Checked) -> str:
    """A heading, the summary, a table of all rules, and for each that fired why, its proof, what to do."""
    failed = {verdict.rule for verdict in checked.failures}
    title = "failed" if failed else "passed"
    lines = [f"## Router rules {title}: {_cell(checked.name)}", "", _cell(summary(checked.found)), ""]
    lines += ["| result | rule | severity | verdict |", "|---|---|---|---|"]
    for verdict in by_role(checked.found):
        result = "**failed**" if verdict.rule in failed else _result(verdict)
        severity = verdict.severity if verdict.kind else ""
        lines.append(f"| {result} | {_cell(verdict.rule)} | {severity} | {_cell(verdict.sentence)} |")
    lines += [f"| left out | {_cell(name)} | | the log lacks its signals |" for name in checked.left_out]
    for verdict in checked.found:
        if verdict.fired or verdict.proof:
            told = (
                []
                if not verdict.fired
                else [
                    ("Why", verdict.description),
                    ("Likely cause", verdict.cause),
                    ("Next", verdict.next_step),
                ]
            )
            lines += ["", f"**{_cell(verdict.rule)}**: `{plain(verdict.text).replace('`', ' ')}`"]
            lines += [f"- {label}: {_cell(text)}" for label, text in told if text]
            if verdict.proof:
                lines.append(f"- Proof at step {verdict.proof_step:,}:")
                lines += [f"    - {_cell(line)}" for line in proof_lines(verdict.proof)]
    return "\n".join(lines) + "\n\n"


def _result(verdict: Verdict) -> str:
    """The result of a rule for which the check does not fail."""
    if verdict.kind is None:
        return "watched" if verdict.role != "axiom" else "axiom"
    return "fired" if verdict.fired else "not judged" if _open(verdict) else "passed"


def _open(verdict: Verdict) -> bool:
    """Whether nothing can be said of a rule that could have fired."""
    return verdict.kind is not None and not (verdict.rows and verdict.decided)


def _cell(text: str) -> str:
    """Text that neither ends a cell of a table nor begins a tag, a link or an image."""
    told = text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")
    return " ".join(plain(told).split())


def _legal(text: str) -> str:
    """Without the characters that XML 1.0 cannot hold."""
    return re.sub(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]", "�", text)
