"""One rule, its runs and its labels, as a loss over coordinates; and how well it does.

A rule fires through one bound of its interval: TRUE through the lower, or for a health rule FALSE through the
upper; one without a kind counts as if its truth were bad news. The loss is the cross-entropy of this bound
against the threshold, sigmoid((bound - alpha) / 0.05): a label says on which side the bound ought to lie.
Runs count the same whatever their length, and rows in which the rule ought to fire count as much as the
others. A normal prior around the shipped values is added: few runs move little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import minimize

from ..formula import Rule, variables
from ..judges import ramp_of
from ..predicates import Predicate
from ..temporal import UNKNOWN
from .parameters import Parameter
from .rows import Rows, signal_of
from .truth import Table, evaluate, sigmoid

SOFTNESS = 0.05  # of the threshold
LEAKS = (0.1, 0.01, 0.0)  # of the stages of a fit, see `truth`


class Batch(NamedTuple):
    """R runs beside each other, the layers of all as C columns of n rows.

    Attributes:
        features: float32 [P, n, C]; NaN where not known.
        sampled: float32 [P, n, C], see `rows.Rows`.
        bad: bool [P, n, C].
        steps: int [n, C].
        run: int [C], which run a column is of.
        fires: bool [n, R], where the rule ought to fire.
        counts: bool [n, R], whether a row counts: it exists, and the rule has warmed up.
    """

    features: np.ndarray
    sampled: np.ndarray
    bad: np.ndarray
    steps: np.ndarray
    run: np.ndarray
    fires: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Outcome:
    """How a rule did in R runs.

    Attributes:
        caught: [R], share of the rows in which it ought to fire in which it did; NaN where there are none.
        quiet: [R], share of the others in which it did not.
        cross_entropy: [2, R], over the rows of either kind.
    """

    caught: np.ndarray
    quiet: np.ndarray
    cross_entropy: np.ndarray

    @property
    def accuracy(self) -> float:
        """Balanced: 0.5 for a rule that always or never fires."""
        return float(np.nanmean(self.caught) + np.nanmean(self.quiet)) / 2

    @property
    def loss(self) -> float:
        return float(np.nanmean(self.cross_entropy, axis=1).mean())


class Learner:
    """See the module.

    Args:
        rule: with its shipped weights.
        predicates: all of the rule, learnable ones spelled out.
        parameters: what may be learnt.
        runs: by name.
        truths: by name bool [n], the rows in which the rule ought to be TRUE.
    """

    def __init__(
        self,
        rule: Rule,
        predicates: Mapping[str, Predicate],
        parameters: Sequence[Parameter],
        runs: Mapping[str, Rows],
        truths: Mapping[str, np.ndarray],
    ) -> None:
        self.rule, self._predicates, self._parameters = rule, predicates, parameters
        self._atoms = list(dict.fromkeys(variables(rule.formula)))
        self._lengths = [len(rows.steps) for rows in runs.values()]
        self.batch = self._batch(runs, truths)
        sizes = [size for rows in runs.values() for size in rows.sizes]
        self._fixed = {
            name: np.array([ramp_of(each, signal_of(each), *size) for size in sizes], np.float32).T
            for name, each in predicates.items()
        }
        self._device = jax.device_put(self.batch)
        self._judge = jax.jit(self._judged)
        self._gradient = jax.jit(jax.value_and_grad(self._objective))

    def _batch(self, runs: Mapping[str, Rows], truths: Mapping[str, np.ndarray]) -> Batch:
        longest = max(self._lengths)

        def filled(x: np.ndarray, value: Any) -> np.ndarray:
            return np.pad(x, ((0, longest - len(x)), *((0, 0),) * (x.ndim - 1)), constant_values=value)

        def columns(field: str, value: Any) -> np.ndarray:
            of = [getattr(rows, field) for rows in runs.values()]
            return np.stack([np.concatenate([filled(x[a], value) for x in of], 1) for a in self._atoms])

        health = self.rule.kind == "health"
        warmups = {name: rows.rules[self.rule.name].warmup for name, rows in runs.items()}
        run = np.concatenate([np.full(len(rows.sizes), i) for i, rows in enumerate(runs.values())])
        return Batch(
            columns("features", np.nan),
            columns("sampled", 0.0),
            columns("bad", True),
            np.stack([filled(rows.steps, 0) for rows in runs.values()], 1)[:, run].astype(np.int32),
            run,
            np.stack([filled(truths[name] ^ health, False) for name in runs], 1),
            np.stack([filled(rows.steps >= warmups[name], False) for name, rows in runs.items()], 1),
        )

    def _bounds(self, theta: jax.Array, leak: jax.Array | float, batch: Batch) -> jax.Array:
        """Truth over all layers, [n, R, 2]."""
        learnt: dict[str, dict[str, Any]] = {}
        weights: dict[Any, jax.Array] = {}
        for i, parameter in enumerate(self._parameters):
            value = parameter.value(theta[i])
            if isinstance(parameter.of, str):
                learnt.setdefault(parameter.of, {})[parameter.group.removesuffix("s")] = value
            else:
                weights[parameter.of] = value
        atoms, bad = {}, {}
        columns = zip(self._atoms, batch.features, batch.sampled, batch.bad, strict=True)
        for name, x, sampled, wrong in columns:
            known = jnp.isfinite(x)
            slope, offset, margin = self._ramp(name, learnt.get(name))
            centre = slope * (jnp.where(known, x, 0) - offset)
            width = jnp.abs(slope) * (margin + sampled)
            truth = jnp.stack([sigmoid(centre - width, leak), sigmoid(centre + width, leak)], axis=-1)
            atoms[name], bad[name] = jnp.where(known[..., None], truth, UNKNOWN), wrong
        truth = evaluate(self.rule.formula, Table(atoms, bad, jnp.asarray(batch.steps)), weights, leak)
        pool = jax.ops.segment_max if self.rule.kind == "risk" else jax.ops.segment_min
        return jnp.swapaxes(pool(jnp.swapaxes(truth, 0, 1), batch.run, batch.fires.shape[1]), 0, 1)

    def _judged(self, theta: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Truth [n, R, 2], whether the rule fires bool [n, R], and the cross-entropy [2, R]."""
        truth = self._bounds(theta, 0.0, batch)
        return truth, self._logit(truth) >= 0, self._entropy(truth, batch)

    def _ramp(self, name: str, learnt: dict[str, Any] | None) -> Any:
        if learnt is None:
            return self._fixed[name]
        predicate = self._predicates[name]
        return ramp_of(replace(predicate, **learnt), signal_of(predicate), 1, 1)

    def _logit(self, truth: jax.Array) -> jax.Array:
        """Of firing, from bounds [.., 2]."""
        alpha = self.rule.threshold
        if self.rule.kind == "health":
            return (1 - truth[..., 1] - alpha) / SOFTNESS
        return (truth[..., 0] - alpha) / SOFTNESS

    def _objective(
        self, theta: jax.Array, leak: jax.Array, shares: jax.Array, runs: jax.Array, batch: Batch
    ) -> jax.Array:
        """`shares` [2, R] weigh rows of both kinds in each run; `runs` counts them."""
        fitted = (shares * self._entropy(self._bounds(theta, leak, batch), batch)).sum() / 2
        return fitted + (theta**2).sum() / (2 * runs)

    def _entropy(self, truth: jax.Array, batch: Batch) -> jax.Array:
        """Mean cross-entropy [2, R] over the rows in which the rule ought to fire, and over the others."""
        logit = self._logit(truth)
        each = jax.nn.softplus(jnp.where(batch.fires, -logit, logit))
        return jnp.stack([(each * rows).sum(0) / jnp.maximum(rows.sum(0), 1) for rows in _kinds(batch)])

    def fit(self, runs: np.ndarray, free: np.ndarray) -> np.ndarray:
        """Coordinates fitted on some runs.

        Args:
            runs: bool [R].
            free: bool, which parameters may move.
        """
        there = np.stack([rows.any(0) & runs for rows in _kinds(self.batch)]).astype(np.float32)
        shares = there / np.maximum(there.sum(1, keepdims=True), 1)
        bounds = [p.bounds if may else (0.0, 0.0) for p, may in zip(self._parameters, free, strict=True)]

        def loss(theta: np.ndarray, leak: float) -> tuple[float, np.ndarray]:
            value, slope = self._gradient(
                theta.astype(np.float32), np.float32(leak), shares, np.float32(runs.sum()), self._device
            )
            return float(value), np.asarray(slope, np.float64)

        found = [theta := np.zeros(len(self._parameters))]
        for leak in LEAKS:
            # The loss is of float32: a smaller change of it is rounding.
            told = {"ftol": 1e-6}
            theta = minimize(loss, theta, leak, jac=True, method="L-BFGS-B", bounds=bounds, options=told).x
            found.append(theta)
        return min(found, key=lambda theta: loss(theta, 0.0)[0])

    def truths(self, theta: np.ndarray) -> list[np.ndarray]:
        """Truth of the rule over all layers, float32 [n, 2] of each run."""
        truth = np.asarray(self._judge(theta.astype(np.float32), self._device)[0])
        return [truth[:length, i] for i, length in enumerate(self._lengths)]

    def outcome(self, theta: np.ndarray) -> Outcome:
        """How well the rule does in each run."""
        _, fires, entropy = jax.device_get(self._judge(theta.astype(np.float32), self._device))
        right, kinds = fires == self.batch.fires, _kinds(self.batch)
        counts = [np.where(rows.any(0), rows.sum(0), np.nan) for rows in kinds]
        caught, quiet = ((right & rows).sum(0) / count for rows, count in zip(kinds, counts, strict=True))
        return Outcome(caught, quiet, np.where(np.isnan(counts), np.nan, entropy))


def _kinds(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """bool [n, R]: the rows that count in which the rule ought to fire, and the others."""
    return batch.fires & batch.counts, ~batch.fires & batch.counts
