"""Made-up runs of "hot & calm", without an evaluator."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moe_rules_callback.fit.rows import Rows
from moe_rules_callback.formula import Rule
from moe_rules_callback.predicates import Predicate

PREDICATES = {"hot": Predicate("heat", "high", 0.5), "calm": Predicate("noise", "low", 0.5)}


def truth(
    heat: np.ndarray,
    noise: np.ndarray,
    *,
    hot: float = 0.5,
    calm: float = 0.5,
    weights: tuple[float, float] = (1.0, 1.0),
) -> np.ndarray:
    """[n, 2] of w*hot & v*calm with these offsets."""
    x = np.stack([heat - hot, calm - noise])
    bounds = 1 / (1 + np.exp(-12 * np.stack([x - 0.05, x + 0.05], -1)))
    return np.clip(1 - np.einsum("i,inb->nb", weights, 1 - bounds), 0, 1)


def rows_of(
    rule: Rule,
    heat: np.ndarray,
    noise: np.ndarray,
    predicates: Mapping[str, Predicate] = PREDICATES,
) -> Rows:
    """A run of one layer with these signals [n]."""
    features = {"hot": heat.astype(np.float32)[:, None], "calm": noise.astype(np.float32)[:, None]}
    return Rows(
        {rule.name: rule},
        predicates,
        np.arange(len(heat)),
        ((1, 1),),
        features,
        {name: np.zeros_like(x) for name, x in features.items()},
        {name: np.zeros(x.shape, bool) for name, x in features.items()},
        {rule.name: truth(heat, noise)},
    )
