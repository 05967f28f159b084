"""Learnt weights: rules fitted to runs in which somebody has said when they ought to be TRUE.

    fitted = fit({"collapse": "0.75 :: high_load_cv & ~high_routing_margin"}, runs, labels)
    print(fitted)                             # scores before and after, on runs held out; what each part adds
    write_rules(fitted.rules, "fitted.toml")

Truth is differentiable in the weights of operands and in the offsets and slopes of predicates almost
everywhere, past operators included. Of what Logical Neural Networks ask of weights (Riegel et al. 2020, arXiv
2006.13155) two things hold throughout: weights are positive, and beta is 1. So a conjunction of operands of
truth 1 is 1, and a disjunction of operands of truth 0 is 0, as in classical logic. That one operand of truth
0 alone makes a conjunction 0 (one of truth 1 a disjunction 1) holds for weights of 1 or more: a lighter
operand has been found to matter less. The same with alpha in the place of 1 asks that the weights of a
conjunction be at least 1 each and at most 1 together, which no two operands can; so these constraints are
left out.
"""

from __future__ import annotations

from .fitting import Fitted, RuleFit, fit
from .labels import read_labels

__all__ = ["Fitted", "RuleFit", "fit", "read_labels"]
