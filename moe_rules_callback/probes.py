"""Probes: what a router does with one fixed batch, now and at the probe before.

    def route(model, key):                                   # pure; closes over the batch
        logits = batch @ model["router"]                     # [tokens, experts]
        return logits if key is None else logits + noise * jax.random.normal(key, logits.shape)

    probe = RouterProbe(route, top_k=2, every=16)
    for step, ..:
        audit.on_step({"loss": loss, "router_probs": probs, **probe(step, params, key)})

The metrics of a step cannot tell new weights from new tokens, fresh noise from the noise of every step, nor
rounded logits from exact ones: each needs the same tokens twice. These scalars do, all float32 []:

    routing_flip_rate               share of chosen experts that the last probe did not choose
    router_noise_repetition         correlation of the noise with that of the last probe: 0 fresh, 1 the same
    router_precision_disagreement   share of chosen experts that `exact` does not choose
    router_saturation               share of chosen experts that `reference` chose too; chance: k / E
    router_probe_age                steps since the probe that the others are from

Flips are those of StableMoE (arXiv 2204.08396), saturation that of OLMoE (arXiv 2409.02060, section 5).
Choices are those of the clean router (key None), the k largest scores of a token, compared as sets, averaged
over tokens, and reported of the worst layer: the most flips and disagreement, the least saturation. The noise
is that of the first layer, for deeper ones see changed inputs.

Between probes the last values stand, so that a rule may combine them with those of the step. A window of n
rows therefore holds n / every measurements: give `always[..]` and trends several times `every` rows. What was
measured in its own row has `router_probe_age` 0.

Inside a jitted or scanned step, carry the state:

    state = probe.init(params)
    state, scalars = probe.update(state, step, params, key)  # in the step
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np

from .choices import choose, correlation, disagreement, noise_of, rounded, scores_of, shapes_of
from .errors import MetricsError
from .metrics import collect, layers_of
from .routers import Routers

Route = Callable[[Any, Any], Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ProbeState:
    """What a probe remembers; to be carried and checkpointed with the rest.

    Attributes:
        step: int32 [], of the last probe, -1 before the first.
        chosen: int32 [n, T, k] for each router array, -1 where nothing is known.
        noise: float32 [T, E] of the first layer at the last probe with a key, NaN before it.
        reference: like `chosen`; empty without a reference.
        values: the scalars of the last probe, float32 [], NaN before it.
    """

    step: jax.Array
    chosen: tuple[jax.Array, ...]
    noise: jax.Array
    reference: tuple[jax.Array, ...]
    values: dict[str, jax.Array]


class RouterProbe:
    """Scalars about a router on a fixed batch, for `on_step`; see the module.

    Args:
        route: (model, key) -> router logits or probabilities of the batch: one array [.., tokens, experts], a
            list, a mapping layer -> array, or stacked on `layer_axis`. It is jitted, so it must be pure. The
            key is what a call of the probe was given, None: without noise. Scores without a negative entry
            are read as probabilities. Return them in the dtype that experts are chosen in: where bfloat16 is
            turned into float32 inside, XLA may leave out the rounding.
        top_k: k, the experts that a token uses.
        every: steps from one probe to the next; they fall on its multiples. May be changed at any time.
        exact: like `route`, with the routers computed in float32 from the same inputs. Products of float32
            are themselves rounded on GPUs and TPUs unless they are given precision="highest". Where it
            computes the layers anew, deeper ones also show what became of their inputs.
        reference: a model, of which the choices are taken at once, or what `choices` returned.
        layer_axis: of a stack of layers, as in `RuleAuditCallback`.

    A probe costs a forward of the batch, one more with a key, one more with `exact`, and never waits for the
    device. After a resumption the first probe has nothing to compare with: flips and repetition are NaN.
    """

    def __init__(
        self,
        route: Route,
        *,
        top_k: int,
        every: int = 16,
        exact: Route | None = None,
        reference: Any = None,
        layer_axis: int | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}; it counts steps and must be at least 1.")
        self.every = every
        self._route, self._exact, self._k, self._layer_axis = route, exact, top_k, layer_axis
        self._choices, self._probe = jax.jit(self._chosen_by_name), jax.jit(self.measure)
        taken = reference is None or _are_choices(reference)
        self._reference: Mapping[str, Any] | None = reference if taken else self.choices(reference)
        self._state: ProbeState | None = None
        self._last = -1

    def __call__(self, step: SupportsIndex, model: Any, key: Any = None) -> dict[str, Any]:
        """The scalars of the step, measured now if it is time.

        Args:
            step: its number, at least 0, on the host.
            model: any pytree that `route` knows. It may be donated to the next step.
            key: what the training step used for its noise, or None.

        Returns:
            Name -> float32 [], on the device, which may still be computing them. Always the same names.

        Raises:
            MetricsError: `step` is on the device; or, at the first probe, shapes or layers of the scores and
                the reference do not belong together.
        """
        if isinstance(step, jax.Array):
            raise MetricsError(
                "the step of the probe is a JAX array, and looking at it would wait for the device. Pass a "
                "Python integer; inside a jitted step, carry probe.init(model) through probe.update."
            )
        number = operator.index(step)
        state = self.init(model) if self._state is None else self._state
        if number // self.every != self._last // self.every:
            state, self._last = self._probe(state, model, key), number
        self._state = state
        return state.values | {"router_probe_age": np.float32(number - self._last)}

    def choices(self, model: Any) -> dict[str, jax.Array]:
        """What a model chooses, for a later `reference`: layer -> int32 [.., tokens, k], best first."""
        return self._choices(model)

    def init(self, model: Any) -> ProbeState:
        """State before the first probe; `model` may be abstract.

        Raises:
            MetricsError: shapes or layers of the scores and the reference do not belong together.
        """
        names: list[tuple[str, ...]] = []

        def look(model: Any) -> list[jax.Array]:
            routers = self._scores(self._route, model)
            names.extend(each.names for each in routers)
            return [scores_of(each)[..., : self._k] for each in routers] + [scores_of(routers[0])[0]]

        *chosen, first = jax.eval_shape(look, model)
        measured = ["routing_flip_rate", "router_noise_repetition"]
        measured += ["router_precision_disagreement"] * (self._exact is not None)
        measured += ["router_saturation"] * (self._reference is not None)
        # A mesh with explicit axes wants the state sharded like what will be measured.
        return ProbeState(
            jnp.int32(-1),
            tuple(jnp.full(each.shape, -1, jnp.int32, device=each.sharding) for each in chosen),
            jnp.full(first.shape, jnp.nan, jnp.float32, device=first.sharding),
            self._stacked_reference(names, [each.shape[1:] for each in chosen]),
            {name: jnp.full((), jnp.nan, jnp.float32) for name in measured},
        )

    def update(
        self, state: ProbeState, step: Any, model: Any, key: Any = None
    ) -> tuple[ProbeState, dict[str, jax.Array]]:
        """The new state and the scalars of a step, measured if it is time; pure, for a jitted step.

        Args:
            state: of `init` or the step before.
            step: int32 [], its number, at least 0.
            model, key: as in a call.
        """
        step = jnp.asarray(step, jnp.int32)
        state = jax.lax.cond(
            step // self.every != state.step // self.every,
            lambda state: replace(self.measure(state, model, key), step=step),
            lambda state: state,
            state,
        )
        age = (step - state.step).astype(jnp.float32)
        return state, state.values | {"router_probe_age": age}

    def measure(self, state: ProbeState, model: Any, key: Any = None) -> ProbeState:
        """The state after a probe, whether it is due or not; pure."""
        clean = self._scores(self._route, model)
        chosen = self._chosen(clean)
        values = {
            "routing_flip_rate": disagreement(chosen, state.chosen).max(),
            "router_noise_repetition": jnp.full((), jnp.nan, jnp.float32),
        }
        noise = state.noise
        if key is not None:
            noisy = self._scores(self._route, model, key)
            noise = noise_of(scores_of(noisy[0])[0], scores_of(clean[0])[0])
            values["router_noise_repetition"] = correlation(noise, state.noise)
        if self._exact is not None:
            exact = self._scores(self._exact, model)
            if (given := shapes_of(exact)) != (expected := shapes_of(clean)):
                raise MetricsError(
                    f"exact gives scores {given}, route gives {expected}. Let both return the same layers of "
                    f"the same batch."
                )
            values["router_precision_disagreement"] = disagreement(chosen, self._chosen(exact)).max()
        if state.reference:
            values["router_saturation"] = 1 - disagreement(chosen, state.reference).max()
        return replace(state, chosen=chosen, noise=noise, values=values)

    def _scores(self, route: Route, model: Any, key: Any = None) -> list[Routers]:
        scores = layers_of(route(model, key), "router_probs")
        scores = {name: rounded(each) for name, each in scores.items()}
        return collect({"router_probs": scores}, self._k, self._layer_axis)

    def _chosen(self, routers: list[Routers]) -> tuple[jax.Array, ...]:
        return tuple(choose(scores_of(each), self._k) for each in routers)

    def _chosen_by_name(self, model: Any) -> dict[str, jax.Array]:
        routers = self._scores(self._route, model)
        return {
            name: layer
            for each, chosen in zip(routers, self._chosen(routers), strict=True)
            for name, layer in zip(each.names, chosen, strict=True)
        }

    def _stacked_reference(
        self, names: list[tuple[str, ...]], shapes: list[tuple[int, ...]]
    ) -> tuple[jax.Array, ...]:
        """The reference in the form of `chosen`."""
        if self._reference is None:
            return ()
        made = {name: shape for group, shape in zip(names, shapes, strict=True) for name in group}
        given = {name: tuple(each.shape) for name, each in self._reference.items()}
        if odd := sorted(name for name in made | given if made.get(name) != given.get(name)):
            raise MetricsError(
                f"the reference does not belong to the router in {odd[0]}: its choices have shape "
                f"{given.get(odd[0], 'none')}, those of the router {made.get(odd[0], 'none')}. Take it with "
                f"probe.choices, from a probe with the same route, batch and top_k."
            )
        return tuple(
            jnp.stack([jnp.asarray(self._reference[n], jnp.int32) for n in group]) for group in names
        )


def _are_choices(reference: Any) -> bool:
    """Whether it is what `choices` returned, rather than a model, which has weights."""
    dtypes = [getattr(leaf, "dtype", float) for leaf in jax.tree.leaves(reference)]
    return isinstance(reference, Mapping) and all(jnp.issubdtype(each, jnp.integer) for each in dtypes)
