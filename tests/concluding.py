"""A small run that concludes: two layers, axioms on both sides, a chain, and what they are about."""

from __future__ import annotations

import numpy as np
import xarray as xr

from moe_rules_callback import Predicate, Records, Rulebook, parse_rule
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.replay import replay

EXPERTS, ROWS = 4, 12
# The router of block_1 becomes sure from row 6 on, and the gradient is small all along. In rows 10 and 11 an
# honest witness speaks against what follows.
RULES = (
    parse_rule("low_router_entropy -> sure", "collapsed_scores"),
    parse_rule("sure & small_gradient -> starved", "starved_by_gradient", description="Scores are fixed."),
    parse_rule("high_noise -> starved", "noisy"),
    parse_rule("witness -> ~starved", "acquitted"),
    parse_rule(
        "0.8 :: starved", "starved", kind="risk", severity="error", cause="Sure.", next_step="Cool it."
    ),
    parse_rule("0.8 :: ~starved", "fed", kind="health"),
    parse_rule("high_noise", "plain", kind="risk"),
)
PREDICATES = {
    "small_gradient": Predicate("gradient", "low", 0.5),
    "high_noise": Predicate("noise", "high", 0.5),
    "witness": Predicate("witness", "high", 0.5),
}


def sharp(confidence: np.ndarray, tokens: int = 4) -> np.ndarray:
    """Probabilities [.., tokens, experts] whose largest one is `confidence` [..]."""
    rest = np.repeat(((1 - confidence) / (EXPERTS - 1))[..., None], EXPERTS - 1, axis=-1)
    probs = np.concatenate([confidence[..., None], rest], axis=-1)
    return np.repeat(probs[..., None, :], tokens, axis=-2)


def concluding_records() -> Records:
    rows = np.arange(ROWS)
    confidence = np.stack([np.full(ROWS, 0.4), np.where(rows < 6, 0.4, 0.995)], axis=1)
    metrics = {
        "loss": 3.0 - 0.1 * rows,
        "gradient": np.full(ROWS, 0.1),
        "noise": np.full(ROWS, 0.4),
        "witness": np.where(rows < 10, 0.0, 0.9),
        "router_probs": sharp(confidence),
    }
    book = Rulebook("concluding", RULES, PREDICATES)
    return replay(metrics, book, layer_axis=0, top_k=1, steps=10 * rows)


def concluding_history() -> xr.Dataset:
    return records_to_dataset(concluding_records())
