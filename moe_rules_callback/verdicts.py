"""What a whole run says about each rule, in one place: for `replay`, `check`, reports and notebooks.

    found = verdicts(open_history("runs/demo"))
    found[0].fired, found[0].first_step, found[0].layer      True, 1280, "block_3/moe"
    print(found[0])                                          the verdict, why, what to do next
    print(summary(found))                                    one sentence about all of them

A rule fires in a row when it is a risk that is TRUE or a health rule that is FALSE, from its warm-up on.
A rule without a kind is watched and never fires. An axiom is judged by its evidence; a conclusion comes with
its proof.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from .axioms import Role
from .errors import HistoryError
from .formula import SEVERITIES, RuleKind, Severity
from .proof import Reason, lines, proofs_of
from .records import State, fires_in
from .syntax_hints import blank_comments

if TYPE_CHECKING:
    import xarray as xr

ROWS = 2**16  # read at once: all layers of a long run may not fit in memory


@dataclass(frozen=True)
class Verdict:
    """What a run says about one rule.

    Attributes:
        rule: its name.
        text: the rule on one line, without comments.
        threshold, kind, severity, warmup, description, cause, next_step: see `formula.Rule`.
        counts: number of rows in each state, from the warm-up on.
        first_step, last_step: of the rows in which it fired, or None.
        layer: where it is worst, over the rows in which it fired (over all from the warm-up on if it
            never did): highest mean lower bound for a risk, else lowest mean upper bound. "" without rows.
        state: in the last row of the run; NOT_WRITTEN without rows.
        truth: (lower, upper) in the last row of the run.
        since: first step of the last stretch of rows in that state, or None without rows.
        end: last step of the run, or None without rows.
        role: "conclusion", over names that axioms conclude; "axiom"; else "rule".
        contradicted: first step, from the warm-up on, at which it was CONTRADICTORY, or None.
        proof: of a conclusion the reasons at `proof_step`, the strongest first.
    """

    rule: str
    text: str
    threshold: float
    kind: RuleKind
    severity: Severity
    warmup: int
    description: str
    cause: str
    next_step: str
    counts: Mapping[State, int]
    first_step: int | None
    last_step: int | None
    layer: str
    state: State
    truth: tuple[float, float]
    since: int | None
    end: int | None
    role: Role
    contradicted: int | None
    proof: tuple[Reason, ...]

    @property
    def rows(self) -> int:
        """Rows from the warm-up on: those in which it was judged."""
        return sum(self.counts.values())

    @property
    def rows_fired(self) -> int:
        """Rows in which it fired."""
        return self.counts.get(State(fires_in([self.kind])[0]), 0) if self.kind else 0

    @property
    def share(self) -> float:
        """`rows_fired` over `rows`; 0 if it was never judged."""
        return self.rows_fired / self.rows if self.rows else 0.0

    @property
    def fired(self) -> bool:
        """Whether it fired at all."""
        return self.rows_fired > 0

    @property
    def fires_now(self) -> bool:
        """Whether it fires in the last row of the run."""
        return self.last_step is not None and self.last_step == self.end

    @property
    def decided(self) -> bool:
        """Whether it was TRUE or FALSE in any row in which it was judged; of a risk that is concluded,
        whether it was judged: where nothing speaks for it, it is not found."""
        if self.role == "conclusion" and self.kind == "risk":
            return self.rows > 0
        return self.counts[State.TRUE] + self.counts[State.FALSE] > 0

    @property
    def proof_step(self) -> int | None:
        """Where it first fired; if it never did, where it was first CONTRADICTORY; else None."""
        return self.contradicted if self.first_step is None else self.first_step

    @property
    def sentence(self) -> str:
        """When it fired and how it ended, in one sentence without the rule's name."""
        if self.end is None:
            return "not judged: the run has no rows."
        if not self.rows:
            return f"not judged: it warms up until step {self.warmup:,}, and the run ends at {self.end:,}."
        ends = f"{self.state.name} at the end [{self.truth[0]:.2f}, {self.truth[1]:.2f}]"
        ends += f", since step {self.since:,}" if self.since != self.end else ""
        if self.contradicted is not None:
            clashes = f"{self.counts[State.CONTRADICTORY]:,} of {self.rows:,} rows"
            ends = f"CONTRADICTORY in {clashes}, first at step {self.contradicted:,}; {ends}"
        if self.fired:
            when = f"first at step {self.first_step:,}"
            when += f", last at {self.last_step:,}" if self.last_step != self.first_step else ""
            told = f"fired in {self.rows_fired:,} of {self.rows:,} rows ({_percent(self.share)})"
            return f"{told}, {when}, worst in layer '{self.layer}'; {ends}."
        if self.role == "axiom" and not self.kind:
            held = _percent(self.counts[State.TRUE] / self.rows)
            return f"an axiom; its evidence was TRUE in every layer in {held} of {self.rows:,} rows; {ends}."
        if not self.decided:
            return f"never decided in {self.rows:,} rows; {ends}."
        if self.kind:
            return f"did not fire in {self.rows:,} rows; {ends}."
        held = self.counts[State.TRUE] / self.rows
        return f"TRUE in {_percent(held)} of {self.rows:,} rows (watched only: it has no kind); {ends}."

    def __str__(self) -> str:
        """Verdict, why, proof, next; the rest for a rule that fired, the proof for a contradiction, too."""
        told = [f"{self.rule}: {self.sentence}"]
        if self.fired:
            words = (self.description, self.cause and f"Likely cause: {self.cause}")
            told.append("  Why:  " + ". ".join([self.text, " ".join(filter(None, words))]).strip(". ") + ".")
        if self.proof:
            told += [f"  Proof at step {self.proof_step:,}:", *lines(self.proof, "    ")]
        if self.fired and self.next_step:
            told.append(f"  Next: {self.next_step}")
        return "\n".join(told)

    def _repr_html_(self) -> str:
        from .html import verdict_html

        return verdict_html(self)

    def __treescope_repr__(self, path: str | None, subtree_renderer: Any) -> Any:
        from .html import in_treescope

        return in_treescope(self, self.sentence, path, subtree_renderer)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        derived = ("rows", "rows_fired", "share", "fired", "fires_now", "sentence", "proof_step")
        told |= {name: getattr(self, name) for name in derived}
        counts = {state.name.lower(): count for state, count in self.counts.items()}
        proof = [reason.to_dict() for reason in self.proof]
        told |= {"counts": counts, "state": self.state.name.lower(), "truth": list(self.truth)}
        return told | {"proof": proof}


def verdicts(dataset: xr.Dataset) -> tuple[Verdict, ...]:
    """What a run says about each of its rules, in their order.

    Args:
        dataset: as `open_history` or `records_to_dataset` gives it.

    Raises:
        HistoryError: its attributes are gone.
    """
    if "rules" not in dataset.attrs:
        raise HistoryError(
            "this dataset does not say what its rules are: its attributes are gone. Usual cause: arithmetic, "
            "which drops them. Compute under xr.set_options(keep_attrs=True), or copy history.attrs."
        )
    rules: dict[str, dict[str, Any]] = json.loads(dataset.attrs["rules"])
    names: list[str] = dataset["rule"].values.tolist()
    step = dataset["step"].values
    state = dataset["state"].transpose("step", "rule").values
    if not np.isin(state, [known for known in State if known >= 0]).all():
        raise HistoryError(
            "rows of this history have no state, although their steps are there: chunks of the array `state` "
            "are missing or were changed. Copy the history again."
        )
    judged = step[:, None] >= np.array([rules[name]["warmup"] for name in names], np.int64)
    firing = judged & (state == fires_in(rules[name]["kind"] for name in names))
    layers = _worst_layers(dataset, [rules[name]["kind"] for name in names], judged, firing)
    truth = dataset["truth"].isel(step=slice(-1, None)).transpose("step", "rule", "bound").values
    proofs = proofs_of(dataset)
    found = []
    for i, name in enumerate(names):
        told: dict[str, Any] = {
            key: rules[name][key] for key in rules[name].keys() & Verdict.__dataclass_fields__.keys()
        }
        told["text"] = " ".join(blank_comments(told["text"]).split()) or rules[name]["formula"]
        fires = np.flatnonzero(firing[:, i])
        clashes = np.flatnonzero(judged[:, i] & (state[:, i] == State.CONTRADICTORY))
        first = next(iter([*fires[:1], *clashes[:1]]), None)
        counts = {s: int((judged[:, i] & (state[:, i] == s)).sum()) for s in State if s >= 0}
        lower, upper = truth[0, i].tolist() if len(step) else (0.0, 1.0)
        changes = np.flatnonzero(np.diff(state[:, i]))
        verdict = Verdict(
            rule=name,
            **told,
            counts=counts,
            first_step=int(step[fires[0]]) if len(fires) else None,
            last_step=int(step[fires[-1]]) if len(fires) else None,
            layer=layers[i],
            state=State(int(state[-1, i])) if len(step) else State.NOT_WRITTEN,
            truth=(lower, upper),
            since=int(step[changes[-1] + 1 if len(changes) else 0]) if len(step) else None,
            end=int(step[-1]) if len(step) else None,
            role=proofs.role(name) if proofs else "rule",
            contradicted=int(step[clashes[0]]) if len(clashes) else None,
            proof=proofs(name, int(first)) if proofs and first is not None else (),
        )
        found.append(verdict)
    return tuple(found)


def by_role(found: Iterable[Verdict]) -> list[Verdict]:
    """Conclusions first, then rules over what is measured, then axioms; each in the order of the run."""
    return sorted(found, key=lambda verdict: get_args(Role).index(verdict.role))


def summary(found: Sequence[Verdict]) -> str:
    """One sentence about all rules of a run."""
    can = [verdict for verdict in found if verdict.kind]
    fired = sorted((v for v in can if v.fired), key=lambda v: -SEVERITIES.index(v.severity))
    idle, undecided = sum(not v.rows for v in can), sum(v.rows > 0 and not v.decided for v in can)
    rest = f"; {idle} not judged" if idle else ""
    rest += f"; {undecided} never decided" if undecided else ""
    clashes = ", ".join(v.rule for v in found if v.contradicted is not None and v.role != "axiom")
    rest += f"; contradictory at times: {clashes}" if clashes else ""
    if not can:
        watched = _rules(sum(v.role != "axiom" for v in found))
        return f"{watched} watched; none has a kind, so none can fire{rest}."
    if not fired:
        return f"None of {_rules(len(can))} fired{rest}."
    names = ", ".join(f"{v.rule} ({v.severity})" for v in fired)
    now = sum(v.fires_now for v in fired)
    ends = "and all of them at the end" if now == len(fired) else f"{now or 'none'} of them at the end"
    ends = ("still at the end" if now else "not at the end") if len(fired) == 1 else ends
    return f"{len(fired)} of {_rules(len(can))} fired, {ends}: {names}{rest}."


def _worst_layers(
    dataset: xr.Dataset, kinds: Sequence[RuleKind], judged: np.ndarray, firing: np.ndarray
) -> list[str]:
    """Of each rule the layer where it is worst, see `Verdict.layer`."""
    layers: list[str] = dataset["layer"].values.tolist()
    rows: np.ndarray = np.where(firing.any(axis=0), firing, judged)
    judged_at_all: list[bool] = np.any(judged, axis=0).tolist()
    sums = np.zeros((len(kinds), len(layers), 2))
    truth = dataset["truth_layer"].transpose("step", "rule", "layer", "bound")
    for start in range(0, len(rows) if len(layers) > 1 else 0, ROWS):
        part = slice(start, start + ROWS)
        sums += np.einsum("nr,nryb->ryb", rows[part], truth[part].values)
    worst = [
        total[:, 0].argmax() if kind == "risk" else total[:, 1].argmin()
        for kind, total in zip(kinds, sums, strict=True)
    ]
    return [layers[i] if some else "" for i, some in zip(worst, judged_at_all, strict=True)]


def _percent(share: float) -> str:
    """A share that is neither rounded down to 0 % nor up to 100 %."""
    if 0 < share < 0.01:
        return "under 1 %"
    return "over 99 %" if 0.99 < share < 1 else f"{share:.0%}".replace("%", " %")


def _rules(count: int) -> str:
    return "1 rule" if count == 1 else f"{count} rules"
