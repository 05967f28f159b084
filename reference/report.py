"""What the trainer says: before the first step, while it trains, and at the end."""

from __future__ import annotations

from collections.abc import Mapping

import jax

from moe_rules_callback import hookimpl
from moe_rules_callback.records import Records, State

from .config import Config
from .data import Corpus


class Verdicts:
    """A plugin of the audit that remembers which rules were true in the last row that arrived."""

    def __init__(self) -> None:
        self.true: list[str] = []

    @hookimpl
    def on_records(self, records: Records) -> None:
        pairs = zip(records.schema.rule_names, records.state[-1], strict=True)
        self.true = [name for name, state in pairs if state == State.TRUE]

    def __str__(self) -> str:
        return f"true: {', '.join(self.true) or 'no rule'}"


def introduction(config: Config, corpus: Corpus, parameters: int) -> str:
    """What is about to be trained, on what, where."""
    texts = zip(corpus.domains, corpus.train, strict=True)
    sizes = ", ".join(f"{name} {len(text):,}" for name, text in texts)
    rules = f"{config.rules}, to {config.logdir}" if config.audit else "none"
    fault = f"\nfault     {config.fault}, from step {config.fault_step} on" if config.fault else ""
    return (
        f"text      {config.text or config.dataset}, bytes to train on: {sizes}\n"
        f"model     {config.layers} blocks of width {config.width}, {config.experts} experts, "
        f"{config.top_k} a token; {parameters:,} parameters\n"
        f"devices   {jax.device_count()} x {jax.devices()[0].device_kind}; "
        f"{config.batch} sequences of {config.context} bytes a step\n"
        f"audit     {rules}{fault}"
    )


def progress(step: int, loss: jax.Array, validation_loss: jax.Array, verdicts: Verdicts | None) -> str:
    """One line about a step; waits until it is done."""
    line = f"step {step:5}  loss {loss:.3f}  validation {validation_loss:.3f}"
    return f"{line}  {verdicts}" if verdicts else line


def conclusion(figures: Mapping[str, float], config: Config, domains: int) -> str:
    """The figures of a finished run, each beside what it would be by chance."""
    f, E = figures, config.experts
    lines = [
        f"trained {config.steps} steps in {f['seconds']:.0f} s",
        f"validation loss        {f['validation_loss']:.3f} nats a byte; "
        f"entropy of a byte {f['unigram_entropy']:.3f}, given the byte before {f['bigram_entropy']:.3f}",
        f"router gradient norm   {f['router_gradient_norm']:.2g} in the layer where it is smallest",
        f"experts in use         {f['experts_used']:.0f} of {E} in the worst layer; the idlest gets "
        f"{f['least_expert_share']:.1%} of the assignments, a fair share is {1 / E:.1%}",
        f"dropped assignments    {f['dropped_token_fraction']:.1%}",
    ]
    if domains > 1:
        lines += [
            f"routing accuracy       {f['routing_accuracy']:.3f}; one expert for all domains would give "
            f"{f['busiest_expert_share']:.3f}",
            f"domain specialisation  {f['domain_specialisation']:.3f}; without any {config.top_k / E:.3f}",
        ]
    return "\n".join(lines)
