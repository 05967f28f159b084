"""The words of a report: what fired, why, what to do next; then all rules; then how the run was set up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from ..axioms import Role
from ..formula import SEVERITIES
from ..proof import Reason
from ..verdicts import Verdict, summary, verdicts
from .markup import Html, breakable, escape, fill, join, settings, table
from .multiples import layer_multiples
from .pictures import Picture, pictures

if TYPE_CHECKING:
    import xarray as xr

    from ..plots import Affinity

OPEN = 8  # rules that fired and are shown at once; the rest unfold

ARTICLE = """<article id="rule-$number" class="$severity">
<h3>$rule <span class="badge">$severity</span> <span class="badge none">$now</span></h3>
<p>$sentence</p>
<p><code>$text</code></p>
$why
$proof
$panels
</article>"""
PROOF = """<dl><dt>Proof at step $step</dt><dd>$reasons</dd></dl>"""
ROLES: dict[Role, str] = {
    "conclusion": "Conclusions: what follows from the axioms",
    "rule": "Rules over what is measured",
    "axiom": "Axioms: how far their evidence holds",
}
PICTURE = """<figure class="picture"><h3>$title</h3>
<div class="wide" tabindex="0" role="group" aria-label="$title">
<img src="$uri" alt="$alt" width="$width" height="$height"></div>
<figcaption>$reading</figcaption></figure>"""


def render_report(
    history: xr.Dataset, name: str, affinity: Affinity | None = None, unjudged: Sequence[str] = ()
) -> str:
    """The page, in UTF-8 once it is written.

    Args:
        history: as `open_history` or `open_run` gives it.
        name: of the run, for the title.
        affinity: table of domains by experts, or None.
        unjudged: names of rules that were asked for and could not be evaluated.
    """
    found = verdicts(history)
    fired = sorted(
        (verdict for verdict in found if verdict.fired),
        key=lambda v: (-SEVERITIES.index(v.severity), not v.fires_now, -v.share),
    )
    drawn, left_out = pictures(history, affinity, summary(found))
    files = resources.files("moe_rules_callback.report")
    return fill(
        files.joinpath("report.html").read_text("utf-8"),
        css=Html(files.joinpath("report.css").read_text("utf-8")),
        version=history.attrs["moe_rules_callback_version"],
        name=name,
        verdict=_verdict(found, fired),
        worst=fired[0].severity if fired else "good" if any(v.decided and v.kind for v in found) else "none",
        facts=_facts(history),
        contents=_contents(len(fired)),
        fired=_fired(history, fired),
        rules=_rules(found, fired, unjudged),
        pictures=join(map(_picture, drawn)),
        left_out=_left_out(left_out),
        configuration=_configuration(history),
    )


def _facts(history: xr.Dataset) -> Html:
    """Size, length and time of the run."""
    step, loss, time = (history[name].values for name in ("step", "loss", "wall_time"))
    facts = {"Rows": f"{len(step):,}"}
    if len(step):
        facts["Steps"] = f"{step[0]:,} to {step[-1]:,}"
    facts |= {"Rules": f"{history.sizes['rule']}", "Layers": f"{history.sizes['layer']}"}
    if history.sizes.get("expert"):
        facts["Experts"] = f"{history.sizes['expert']}"
    known = loss[np.isfinite(loss)]
    if len(known):
        facts["Loss"] = f"{known[0]:.4g} to {known[-1]:.4g}"
    if len(time) and np.isfinite(time[[0, -1]]).all():
        facts["Began"] = f"{datetime.fromtimestamp(time[0], UTC):%Y-%m-%d %H:%M} UTC"
        if time[-1] >= time[0]:  # else a clock was set back
            facts["Took"] = _duration(float(time[-1] - time[0]))
    replaced = json.loads(history.attrs.get("replaced", "[]"))
    if replaced:  # a checkpoint was restored, and these steps were taken again
        facts["Replaced"] = "; ".join(
            f"{each['rows']:,} rows from step {each['from_step']:,} on" for each in replaced
        )
    if "continues" in history.attrs:
        facts["Continues"] = str(history.attrs["continues"])
    return join(fill("<div><dt>$term</dt><dd>$fact</dd></div>", term=t, fact=f) for t, f in facts.items())


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _verdict(found: Sequence[Verdict], fired: Sequence[Verdict]) -> Html:
    """One sentence; where it names many rules, they unfold."""
    if len(fired) <= OPEN:
        return escape(summary(found))
    begins, _, names = summary(found).partition(": ")
    return fill("<details><summary>$begins</summary>$names</details>", begins=begins, names=names)


def _contents(fired: int) -> Html:
    names = {
        "fired": f"Fired ({fired})",
        "rules": "All rules",
        "pictures": "Pictures",
        "configuration": "Configuration",
    }
    return join(fill('<a href="#$id">$name</a>', id=id, name=name) for id, name in names.items())


def _fired(history: xr.Dataset, fired: Sequence[Verdict]) -> Html:
    """An article a rule, the worst first; the long tail folds away."""
    if not fired:
        return fill("<p>No rule fired.</p>")
    panels = layer_multiples(history, fired)
    articles = [_article(number, verdict, panels[verdict.rule]) for number, verdict in enumerate(fired)]
    if len(articles) <= OPEN:
        return join(articles)
    tail = fill(
        "<details><summary>$count more rules fired</summary>$articles</details>",
        count=len(articles) - OPEN,
        articles=join(articles[OPEN:]),
    )
    return join([*articles[:OPEN], tail])


def _article(number: int, verdict: Verdict, panels: Html) -> Html:
    told = {"Why": verdict.description, "Likely cause": verdict.cause, "What to do next": verdict.next_step}
    why = join(fill("<dt>$term</dt><dd>$text</dd>", term=t, text=text) for t, text in told.items() if text)
    missing = fill('<p class="quiet">Its rule file gives no description, cause or next step.</p>')
    return fill(
        ARTICLE,
        number=number,
        severity=verdict.severity,
        rule=breakable(verdict.rule),
        now="still firing at the end" if verdict.fires_now else "not at the end",
        sentence=verdict.sentence[0].upper() + verdict.sentence[1:],
        text=verdict.text,
        why=fill("<dl>$why</dl>", why=why) if why else missing,
        proof=_proof(verdict),
        panels=panels,
    )


def _proof(verdict: Verdict) -> Html:
    """The reasons for a conclusion, a line each; those for its premises below it, nested."""
    if not verdict.proof:
        return Html()
    return fill(PROOF, step=f"{verdict.proof_step:,}", reasons=_reasons(verdict.proof))


def _reasons(reasons: Sequence[Reason]) -> Html:
    if not reasons:
        return Html()
    items = [fill("<li>$reason$below</li>", reason=one, below=_reasons(one.reasons)) for one in reasons]
    return fill("<ul>$items</ul>", items=join(items))


def _rules(found: Sequence[Verdict], fired: Sequence[Verdict], unjudged: Sequence[str]) -> Html:
    links = {
        verdict.rule: fill('<a href="#rule-$number">$rule</a>', number=number, rule=breakable(verdict.rule))
        for number, verdict in enumerate(fired)
    }
    badge = fill('<span class="badge none">left out</span>')
    left_out = [(rule, badge, "the log lacks its signals", "") for rule in unjudged]
    heads = ("Rule", "Result", "Verdict", "Text")
    tables = []
    for role, caption in ROLES.items():
        rows: list[tuple[object, ...]] = [
            (
                links.get(v.rule, v.rule),
                _result(v),
                fill("$sentence$proof", sentence=v.sentence, proof=Html() if v.fired else _proof(v)),
                fill("<code>$text</code>", text=breakable(v.text)),
            )
            for v in found
            if v.role == role
        ]
        tables.append(table(caption, heads, [*rows, *(left_out if role == "rule" else [])]))
    if sum(map(bool, tables)) == 1:
        return Html("".join(tables).replace(ROLES["rule"], "Every rule of the run, in its order"))
    return join(filter(None, tables))


def _result(verdict: Verdict) -> Html:
    """In a word."""
    if verdict.fired:
        return fill('<span class="badge $severity">fired</span>', severity=verdict.severity)
    if not verdict.kind:
        word = "axiom" if verdict.role == "axiom" else "watched"
        return fill('<span class="badge none">$word</span>', word=word)
    if verdict.contradicted is not None:
        return fill('<span class="badge none">contradictory</span>')
    if not verdict.decided:
        return fill('<span class="badge none">not decided</span>')
    return fill('<span class="badge good">passed</span>')


def _picture(picture: Picture) -> Html:
    return fill(PICTURE, **vars(picture))


def _left_out(reasons: Sequence[str]) -> Html:
    if not reasons:
        return Html()
    items = join(fill("<li>$reason</li>", reason=reason) for reason in reasons)
    return fill('<h3>Left out</h3><ul class="quiet">$items</ul>', items=items)


def _configuration(history: xr.Dataset) -> Html:
    """What was kept of the run; behind a fold, what its signals and predicates mean."""
    attrs = history.attrs
    config = json.loads(attrs["config"])
    versions = {name: attrs[f"{name}_version"] for name in ("moe_rules_callback", "jax", "numpy")}
    signals = [
        (name, told["long_name"] + ("" if told["units"] == "1" else f", in {told['units']}"))
        for name, told in json.loads(attrs["signals"]).items()
    ]
    predicates = [
        (name, ", ".join(f"{key} {value}" for key, value in told.items() if value is not None))
        for name, told in json.loads(attrs["predicates"]).items()
    ]
    folds = {
        "Signals": table("What was measured", ("Signal", "Meaning"), signals),
        "Predicates": table("Curves behind the words of the rules", ("Predicate", "Curve"), predicates),
        "Versions": settings("What the run was made with", versions),
    }
    fold = "<details><summary>$name</summary>$body</details>"
    shown = settings("As the run was given it", config) if config else fill("<p>None was kept.</p>")
    return join([shown, *(fill(fold, name=name, body=body) for name, body in folds.items() if body)])
