"""What the columns of training logs are called, and which signal each of them is.

guess("train/aux_loss")       ->  ("load_balancing_loss", 2)      the lower the surer
guess("eval/loss")            ->  None: not of the training step
load_layer("layer_3/moe/expert_load")  ->  "layer_3"
"""

from __future__ import annotations

import re

from ..signals import SCALAR_RAMPS, shipped

LOAD = "expert_load"
SYNONYMS = {
    "loss": "train_loss training_loss lm_loss ce_loss cross_entropy cross_entropy_loss nll_loss total_loss",
    "router_entropy": "entropy routing_entropy gate_entropy gating_entropy activation_entropy "
    "normalized_entropy normalised_entropy entropy_normalized router_normalized_entropy",
    "routing_accuracy": "routing_acc router_accuracy router_acc",
    "routing_confidence": "router_confidence gate_confidence max_prob mean_max_prob top1_prob",
    "load_balancing_loss": "load_balance_loss balancing_loss balance_loss lb_loss lbl aux_loss "
    "auxiliary_loss moe_loss moe_aux_loss router_aux_loss router_loss",
    "router_z_loss": "z_loss zloss router_zloss",
    "max_violation": "maxvio max_vio",
    "load_cv": "load_variation expert_load_cv cv_load",
    "dead_expert_fraction": "dead_experts_fraction dead_expert_share dead_expert_ratio",
    "effective_experts": "effective_number_of_experts num_effective_experts",
    "dropped_token_fraction": "dropped_tokens_fraction drop_rate drop_fraction token_drop_rate "
    "dropped_fraction dropped_tokens_ratio dropped_token_rate",
    "gradient_norm": "grad_norm gnorm global_grad_norm global_gradient_norm total_grad_norm grads_norm",
    "weight_norm": "param_norm params_norm parameter_norm weights_norm",
    "learning_rate": "lr",
}
LOADS: tuple[str, ...] = (
    "expert_load", "expert_loads", "expert_utilization", "expert_utilisation", "utilization", "utilisation",
    "expert_usage", "expert_share", "expert_shares", "tokens_per_expert", "expert_tokens", "expert_counts",
    "expert_frequency", "load", "usage", "loads", "load_expert", "utilization_expert", "utilisation_expert",
    "expert", "experts", "counts",
)  # fmt: skip
# Words before a name that say where it was logged, not what it is.
NEUTRAL = {
    "train", "training", "metrics", "metric", "moe", "router", "routing", "gate", "model", "stats", "stat",
    "log", "scalars", "summary", "trainer", "optim", "optimizer", "run", "perf",
}  # fmt: skip
ELSEWHERE = {"eval", "evaluation", "val", "valid", "validation", "test", "dev", "holdout"}

_MEANING = {shipped_name: (shipped_name, 0) for shipped_name in shipped() | SCALAR_RAMPS | SYNONYMS}
_MEANING |= {
    synonym: (signal, 1 + rank)
    for signal, synonyms in SYNONYMS.items()
    for rank, synonym in enumerate(synonyms.split())
}
_LAYER = re.compile(r"(?:^|(?<=[\W_]))(?:layers?|blocks?|h)[\W_]*\d+", re.IGNORECASE)


def words(name: str) -> list[str]:
    """Its words in lower case: "train/gradNorm" -> train, grad, norm."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return re.findall(r"[a-z0-9]+", spaced.lower())


def guess(name: str) -> tuple[str, int] | None:
    """(signal, rank) that a column of single numbers is by its name, or None; of two, the lower rank wins."""
    left = words(name)
    if ELSEWHERE & set(left):
        return None
    for dropped in range(len(left)):
        if found := _MEANING.get("_".join(left[dropped:])):
            return found[0], found[1] + 100 * dropped
        if left[dropped] not in NEUTRAL:
            return None
    return None


def is_load(left: list[str]) -> bool:
    """Whether words mean the load of experts, whatever they say of where it was logged."""
    return load_rank(left) is not None


def load_rank(left: list[str]) -> int | None:
    """How surely words mean the load of experts, the lower the surer; None: they do not."""
    if ELSEWHERE & set(left):
        return None
    for dropped in range(len(left)):
        if "_".join(left[dropped:]) in LOADS:
            return LOADS.index("_".join(left[dropped:])) + 100 * dropped
        if left[dropped] not in NEUTRAL:
            return None
    return None


def load_layer(name: str) -> tuple[int, str] | None:
    """(rank, layer) of a column of lists that is the load of experts by its name; layer "" if it names none.

    The layer is a part such as `layer_3`, or the parts between dots and slashes that are not about loads:
    `utilization.encoder`, `encoder/utilization`.
    """
    if (rank := load_rank(words(name))) is not None:
        return rank, ""
    if match := _LAYER.search(name):
        rest = name[: match.start()] + " " + name[match.end() :]
        if (rank := load_rank(words(rest))) is not None:
            return rank, re.sub(r"\W+", "_", match[0])
    parts = re.split(r"[./]", name)
    for split in range(1, len(parts)):
        before, after = parts[:split], parts[split:]
        for load, layer in ((after, before), (before, after)):
            rank = load_rank(words(" ".join(load)))
            if rank is not None and not ELSEWHERE & set(words(name)):
                return rank, "/".join(layer)
    return None
