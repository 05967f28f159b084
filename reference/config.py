"""Every setting of the reference trainer, and the command line made from them.

    Config(steps=500, experts=4)          in a program
    --steps 500 --experts 4               on the command line: one option a field

A field's `help` is its documentation in both.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_type_hints

CHOICES = {
    "dataset": ("python", "prose", "code", "tables", "tinyshakespeare"),
    "gate": ("softmax", "sigmoid"),
}


class ConfigError(ValueError):
    """Settings that do not go together."""


def setting(default: Any, text: str) -> Any:
    """A field with a default and a line of help."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """A run of the reference trainer. Equal configurations on equal machines give equal runs."""

    # The run
    steps: int = setting(1200, "training steps")
    seed: int = setting(0, "of the weights, the batches and the router noise")
    logdir: str = setting("runs/reference", "where event files, history, audit.png and affinity table go")
    rules: str = setting("nano_moe", "a book or a TOML file; else nano_moe, with a fault router_health")
    audit: bool = setting(True, "watch the router; --no-audit trains the same model without")
    distributed: bool = setting(False, "call jax.distributed.initialize() first; start one process a host")
    log_every: int = setting(100, "steps between two printed lines")
    eval_every: int = setting(100, "steps between two measurements of the validation loss")
    eval_batches: int = setting(8, "batches that one measurement takes")

    # The text
    dataset: str = setting("python", "prose, code, tables of this Python, all three, or tinyshakespeare")
    text: str = setting("", "train on this file instead, in UTF-8 or any other encoding")

    # The model
    layers: int = setting(2, "transformer blocks")
    width: int = setting(96, "of the residual stream")
    heads: int = setting(4, "of the attention; must divide the width")
    context: int = setting(128, "tokens (bytes) that the model sees")
    experts: int = setting(8, "experts in every block")
    expert_width: int = setting(192, "hidden units of an expert")
    top_k: int = setting(2, "experts that every token uses")
    capacity_factor: float = setting(1.5, "places an expert has, relative to its fair share of the tokens")
    groups: int = setting(0, "parts of a batch that are dispatched on their own; 0: one a device")
    gate: str = setting("softmax", "what makes probabilities of logits: softmax, or normalised sigmoid")
    router_noise: float = setting(0.1, "standard deviation of the noise on router logits in training")

    # The optimisation
    batch: int = setting(16, "sequences a step, over all devices")
    learning_rate: float = setting(5e-3, "peak of the schedule: linear warm-up, cosine decay to a tenth")
    warmup: int = setting(100, "steps of warm-up")
    weight_decay: float = setting(0.1, "of AdamW")
    balance_weight: float = setting(0.01, "of the load-balancing loss")
    z_weight: float = setting(0.001, "of the router z-loss")

    # What goes wrong
    fault: str = setting("", "name of a fault of reference.faults.catalogue that befalls the run")
    fault_step: int = setting(-1, "step at which it sets in; -1: at its usual one")

    def __post_init__(self) -> None:
        positive = ("steps", "log_every", "eval_every", "eval_batches", "layers", "width", "heads",
                    "context", "experts", "expert_width", "top_k", "batch")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 1 or more.")
        if self.seed < 0 or self.capacity_factor <= 0:
            raise ConfigError("seed must be 0 or more, and capacity_factor above 0.")
        for name, choices in CHOICES.items():
            if (given := getattr(self, name)) not in choices:
                raise ConfigError(f"{name} is {given!r}; it must be one of {', '.join(choices)}.")
        if self.width % self.heads:
            raise ConfigError(
                f"width {self.width} is no multiple of the {self.heads} heads: change one of the two."
            )
        if self.top_k > self.experts:
            raise ConfigError(
                f"top_k {self.top_k} asks for more than the {self.experts} experts: change one of the two."
            )


def from_command_line(arguments: Sequence[str] | None = None) -> Config:
    """The configuration that `arguments` (default: those of the process) ask for."""
    parser = argparse.ArgumentParser(
        prog="python -m reference.train",
        description="Train a small Mixture-of-Experts language model and audit its router.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = get_type_hints(Config)
    for field in dataclasses.fields(Config):
        option = "--" + field.name.replace("_", "-")
        form: dict[str, Any] = {"type": types[field.name], "metavar": field.name.upper()}
        if types[field.name] is bool:
            form = {"action": argparse.BooleanOptionalAction}
        elif field.name in CHOICES:
            form = {"choices": CHOICES[field.name]}
        parser.add_argument(option, default=field.default, help=field.metadata["help"], **form)
    parser.set_defaults(rules=None)
    given = vars(parser.parse_args(arguments))
    # Whoever plants a fault wants to hear its name.
    given["rules"] = given["rules"] or ("router_health" if given["fault"] else Config.rules)
    try:
        return Config(**given)
    except ConfigError as error:
        parser.error(str(error))
