"""Probes against NumPy twins, on routers small enough to be known by heart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moe_rules_callback import MetricsError, RuleAuditCallback
from moe_rules_callback.probes import ProbeState, RouterProbe
from moe_rules_callback.signals import SCALAR_NAMES, SCALAR_RAMPS, scalar

T, D, E = 3000, 8, 6
X = np.random.default_rng(0).normal(size=(T, D)).astype(np.float32)


def route(params: Mapping[str, Any], key: Any, noise: float = 0.3) -> jax.Array:
    logits = X @ params["router"]
    return logits if key is None else logits + noise * jax.random.normal(key, logits.shape)


def scores(params: Any, key: Any) -> Any:
    """A router that is its own scores."""
    return params


def weights(seed: int) -> dict[str, jax.Array]:
    return {"router": jnp.asarray(np.random.default_rng(seed).normal(size=(D, E)), jnp.float32)}


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape or (T, E)).astype(np.float32)


def overlap(a: Any, b: Any, k: int) -> float:
    """Mean over tokens of |top-k of a and of b| / k; of equals the first comes first."""
    both = 0
    for x, y in zip(np.asarray(a, np.float64), np.asarray(b, np.float64), strict=True):
        both += len(set(np.argsort(-x, kind="stable")[:k]) & set(np.argsort(-y, kind="stable")[:k]))
    return both / (k * len(a))


def noise_of(noisy: np.ndarray, clean: np.ndarray) -> np.ndarray:
    """Of log-probabilities, centred per token."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    added = log_softmax(np.asarray(noisy, np.float64)) - log_softmax(np.asarray(clean, np.float64))
    return added - added.mean(-1, keepdims=True)


def floats(scalars: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in scalars.items()}


# Flips.


@pytest.mark.parametrize("k", [1, 2, 5, E])
def test_flips_since_the_last_probe(k: int):
    probe = RouterProbe(scores, top_k=k, every=1)
    assert np.isnan(floats(probe(0, logits(1)))["routing_flip_rate"])
    assert float(probe(1, logits(1))["routing_flip_rate"]) == 0
    got = float(probe(2, logits(2))["routing_flip_rate"])
    assert got == pytest.approx(1 - overlap(logits(1), logits(2), k), abs=1e-6)
    assert (got == 0) == (k == E)


def test_one_changed_choice_counts_by_hand():
    before = np.tile([3.0, 2.0, 1.0, 0.0], (5, 1)).astype(np.float32)
    after = before.copy()
    after[0] = [3.0, 1.0, 2.0, 0.0]  # one of two experts of one of five tokens
    after[1] = [2.0, 3.0, 1.0, 0.0]  # another order, the same set
    probe = RouterProbe(scores, top_k=2, every=1)
    probe(0, before)
    assert float(probe(1, after)["routing_flip_rate"]) == pytest.approx(0.1)


def test_the_worst_of_layers_with_different_numbers_of_experts():
    before = {"block_2": logits(1, 30, 4), "block_10": logits(2, 50, 8)}
    after = before | {"block_10": logits(3, 50, 8)}
    probe = RouterProbe(scores, top_k=2, every=1, reference=before)
    assert float(probe(0, before)["router_saturation"]) == 1
    got = floats(probe(1, after))
    expected = overlap(before["block_10"], after["block_10"], 2)
    assert got["routing_flip_rate"] == pytest.approx(1 - expected, abs=1e-6)
    assert got["router_saturation"] == pytest.approx(expected, abs=1e-6)


def test_layers_in_a_stack_and_tokens_on_two_axes():
    before, after = logits(1, 5, 3, 7, 4), logits(1, 5, 3, 7, 4)  # [batch, layer, time, expert]
    after[:, 1] = logits(2, 5, 7, 4)
    probe = RouterProbe(scores, top_k=1, every=1, layer_axis=1)
    probe(0, before)
    expected = 1 - overlap(before[:, 1].reshape(-1, 4), after[:, 1].reshape(-1, 4), 1)
    assert float(probe(1, after)["routing_flip_rate"]) == pytest.approx(expected, abs=1e-6)
    assert {name: x.shape for name, x in probe.choices(after).items()} == {
        f"layer_{i}": (5, 7, 1) for i in range(3)
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_not_choices(bad: float):
    broken = logits(1)
    broken[3, 2] = bad
    probe = RouterProbe(scores, top_k=2, every=1)
    flips = [float(probe(i, each)["routing_flip_rate"]) for i, each in enumerate([logits(1), broken] * 2)]
    assert np.isnan(flips).all()


def test_a_masked_expert_is_chosen_last_and_never_twice():
    masked = np.array([[1.0, -np.inf, -np.inf]], np.float32)
    assert RouterProbe(scores, top_k=2).choices(masked)["router"].tolist() == [[0, 1]]


# Noise.


def test_the_same_key_repeats_its_noise_and_fresh_keys_do_not():
    probe = RouterProbe(route, top_k=2, every=1)
    keys = [jax.random.key(seed) for seed in (7, 7, 8)]
    got = [float(probe(i, weights(i), key)["router_noise_repetition"]) for i, key in enumerate(keys)]
    assert np.isnan(got[0])
    assert got[1] == pytest.approx(1, abs=1e-5)
    assert abs(got[2]) < 4 / np.sqrt(T * (E - 1))  # standard errors of no correlation


@pytest.mark.parametrize("form", ["logits", "probabilities"])
def test_repetition_is_the_correlation_of_noise_in_log_probabilities(form: str):
    def partly_new(params: Mapping[str, Any], key: Any) -> jax.Array:
        given = X @ params["router"]
        if key is not None:
            given = given + 0.5 * jax.random.normal(jax.random.key(1), given.shape)
            given = given + 0.5 * jax.random.normal(key, given.shape)
        return jax.nn.softmax(given) if form == "probabilities" else given

    probe = RouterProbe(partly_new, top_k=2, every=1)
    noise = []
    for seed in (2, 3):
        got = float(probe(seed, weights(seed), jax.random.key(seed))["router_noise_repetition"])
        pair = [np.asarray(partly_new(weights(seed), key)) for key in (jax.random.key(seed), None)]
        noise.append(noise_of(*(np.log(x) if form == "probabilities" else x for x in pair)))
    expected = np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]
    assert got == pytest.approx(expected, abs=1e-4)
    assert 0.4 < got < 0.6


def test_a_probe_without_a_key_says_nothing_of_noise_and_forgets_none():
    probe = RouterProbe(route, top_k=2, every=1)
    keys = [None, jax.random.key(1), None, jax.random.key(1)]
    got = [floats(probe(i, weights(0), key)) for i, key in enumerate(keys)]
    assert np.isnan([each["router_noise_repetition"] for each in got]).tolist() == [True, True, True, False]
    assert got[3]["router_noise_repetition"] == pytest.approx(1, abs=1e-5)
    assert [each["routing_flip_rate"] for each in got[1:]] == [0, 0, 0]  # of the clean router


def test_a_router_without_noise_repeats_nothing():
    probe = RouterProbe(partial(route, noise=0.0), top_k=2, every=1)
    assert np.isnan(
        [float(probe(i, weights(0), jax.random.key(i))["router_noise_repetition"]) for i in (0, 1)]
    ).all()


def test_masked_experts_have_no_noise():
    def masked(params: Any, key: Any) -> jax.Array:
        return route(params, key).at[:, 0].set(-jnp.inf)

    probe = RouterProbe(masked, top_k=2, every=1)
    got = [float(probe(i, weights(0), jax.random.key(1))["router_noise_repetition"]) for i in (0, 1)]
    assert got[1] == pytest.approx(1, abs=1e-5)


# Precision.


def bf16(params: Mapping[str, Any], key: Any) -> jax.Array:
    return route(params, key).astype(jnp.bfloat16)


def bf16_probabilities(params: Mapping[str, Any], key: Any) -> jax.Array:
    return jax.nn.softmax(route(params, key)).astype(jnp.bfloat16)


@pytest.mark.parametrize("rounded", [bf16, bf16_probabilities])
def test_rounded_scores_choose_other_experts(rounded: Any):
    """XLA leaves out the rounding of the probabilities, if it is let."""
    expected = 1 - overlap(rounded(weights(0), None), route(weights(0), None), 2)
    assert expected > 0
    probe = RouterProbe(rounded, top_k=2, exact=route)
    assert float(probe(0, weights(0))["router_precision_disagreement"]) == pytest.approx(expected, abs=1e-6)


def test_exact_scores_choose_the_same_experts():
    probe = RouterProbe(route, top_k=2, every=1, exact=route)
    for step in range(3):
        assert float(probe(step, weights(step))["router_precision_disagreement"]) == 0


def test_what_is_exact_needs_the_same_layers():
    probe = RouterProbe(scores, top_k=2, exact=lambda model, key: model[:, :10])
    with pytest.raises(
        MetricsError, match=r"exact gives scores .*\(4, 10\)}, route gives .*\(4, 12\)}. Let both"
    ):
        probe(0, logits(0, 4, 12))


# Saturation.


def test_random_choices_saturate_at_chance():
    probe = RouterProbe(scores, top_k=2, reference=logits(1, 5000, 8))
    assert float(probe(0, logits(2, 5000, 8))["router_saturation"]) == pytest.approx(2 / 8, abs=0.02)


def test_a_reference_is_a_model_or_its_saved_choices(tmp_path: Path):
    first, now = weights(1), weights(2)
    choices = jax.tree.map(np.asarray, RouterProbe(route, top_k=2).choices(first))
    np.savez(tmp_path / "choices.npz", **choices)
    expected = overlap(X @ first["router"], X @ now["router"], 2)
    for reference in (first, dict(np.load(tmp_path / "choices.npz"))):
        probe = RouterProbe(route, top_k=2, every=1, reference=reference)
        assert float(probe(0, now)["router_saturation"]) == pytest.approx(expected, abs=1e-6)
        assert float(probe(1, first)["router_saturation"]) == 1


def test_a_reference_outlives_its_model():
    first = weights(1)
    probe = RouterProbe(route, top_k=2, reference=first)
    first["router"].delete()  # as donation does
    assert float(probe(0, weights(1))["router_saturation"]) == 1


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"block_0": np.zeros((T, 2), int)}, r"in block_0: .* shape \(3000, 2\), those of the router none"),
        ({"router": np.zeros((T, 1), int)}, r"in router: .* \(3000, 1\), those of the router \(3000, 2\)"),
    ],
)  # fmt: skip
def test_a_reference_of_other_routers(reference: Any, message: str):
    probe = RouterProbe(route, top_k=2, reference=reference)
    with pytest.raises(MetricsError, match=message + r"\. Take it with probe\.choices"):
        probe(0, weights(0))


# When it measures.


def test_the_last_values_stand_until_the_next_probe():
    probe = RouterProbe(route, top_k=2, every=4)
    got = [floats(probe(step, weights(step), jax.random.key(step))) for step in range(9)]
    assert [each["router_probe_age"] for each in got] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert np.isnan([each["routing_flip_rate"] for each in got[:4]]).all()
    for step in (4, 8):
        expected = 1 - overlap(X @ weights(step - 4)["router"], X @ weights(step)["router"], 2)
        assert got[step]["routing_flip_rate"] == pytest.approx(expected, abs=1e-6)
    assert all(got[step]["routing_flip_rate"] == got[4]["routing_flip_rate"] for step in range(4, 8))


def measured(probe: RouterProbe, steps: Any) -> list[int]:
    """The steps at which it measures."""
    return [step for step in steps if float(probe(step, weights(0))["router_probe_age"]) == 0]


def test_it_measures_at_multiples_of_every_or_as_soon_as_it_can():
    probe = RouterProbe(route, top_k=2, every=4)
    assert measured(probe, range(5, 14)) == [5, 8, 12]  # a resumed run
    assert measured(probe, range(15, 40, 6)) == [21, 27, 33, 39]  # not called at each step
    assert measured(probe, [3, 4]) == [3, 4]  # back to an earlier step
    probe.every = 2
    assert measured(probe, range(5, 9)) == [6, 8]
    assert float(probe(8, weights(0))["routing_flip_rate"]) == 0


def test_a_step_on_the_device_is_refused():
    with pytest.raises(
        MetricsError, match=r"looking at it would wait for the device\. Pass a Python integer"
    ):
        RouterProbe(route, top_k=2)(jnp.int32(3), weights(0))  # pyright: ignore[reportArgumentType]


def test_every_counts_steps():
    with pytest.raises(ValueError, match="every is 0; it counts steps and must be at least 1"):
        RouterProbe(route, top_k=2, every=0)


def test_more_experts_a_token_than_there_are():
    with pytest.raises(MetricsError, match="7 experts per token do not fit the 6 experts of router"):
        RouterProbe(route, top_k=7)(0, weights(0))


def test_nothing_crosses_to_the_host_and_two_programs_are_compiled():
    traced = []

    def counted(params: Any, key: Any) -> jax.Array:
        traced.append(key is None)
        return jnp.asarray(X) @ params["router"] + (0 if key is None else jax.random.normal(key, (T, E)))

    probe = RouterProbe(counted, top_k=2, every=2)
    params, key = weights(0), jax.random.key(0)
    probe(0, params, key)
    before = len(traced)
    with jax.transfer_guard("disallow"):
        rows = [probe(step, params, key) for step in range(1, 8)]
    assert len(traced) == before
    assert all(value.dtype == np.float32 and value.shape == () for row in rows for value in row.values())


# Models, and places to call it from.


def test_nnx_modules_and_their_states():
    class Router(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.gate = nnx.Linear(D, E, use_bias=False, rngs=rngs)

        def __call__(self) -> jax.Array:
            return self.gate(jnp.asarray(X))

    models = [Router(nnx.Rngs(seed)) for seed in (0, 1)]
    graphdef = nnx.graphdef(models[0])
    expected = 1 - overlap(models[0](), models[1](), 2)
    module = RouterProbe(lambda model, key: model(), top_k=2, every=1, reference=models[0])
    state = RouterProbe(lambda state, key: nnx.merge(graphdef, state)(), top_k=2, every=1)
    module(0, models[0])
    state(0, nnx.state(models[0]))
    got = floats(module(1, models[1]))
    assert got["routing_flip_rate"] == pytest.approx(expected, abs=1e-6)
    assert got["router_saturation"] == pytest.approx(1 - expected, abs=1e-6)
    assert float(state(1, nnx.state(models[1]))["routing_flip_rate"]) == got["routing_flip_rate"]


def test_inside_a_scanned_step_it_says_the_same():
    keys = jax.random.split(jax.random.key(0), 10)
    stacked = jnp.stack([weights(step // 2)["router"] for step in range(10)])
    probe = RouterProbe(route, top_k=2, every=3, exact=bf16, reference=weights(0))

    def step(state: ProbeState, given: Any) -> tuple[ProbeState, dict[str, jax.Array]]:
        number, router, key = given
        return probe.update(state, number, {"router": router}, key)

    start = probe.init({"router": jax.ShapeDtypeStruct((D, E), np.float32)})
    _, inside = jax.jit(partial(jax.lax.scan, step))(start, (jnp.arange(10), stacked, keys))
    beside = [floats(probe(i, {"router": stacked[i]}, keys[i])) for i in range(10)]
    assert inside.keys() == beside[0].keys()
    for name, values in inside.items():
        np.testing.assert_allclose(values, [each[name] for each in beside], atol=1e-6, err_msg=name)


def test_a_mesh_with_explicit_axes():
    """Of one device: what is sharded is a matter of types."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))

    def sharded(params: Mapping[str, Any], key: Any) -> jax.Array:
        over_tokens = jax.sharding.PartitionSpec("data", None)
        return jax.sharding.reshard(jnp.asarray(X), over_tokens) @ params["router"]

    with jax.set_mesh(mesh):
        probe = RouterProbe(sharded, top_k=2, every=1, reference=weights(0))
        state, update = probe.init(weights(0)), jax.jit(probe.update)
        for step in range(2):
            state, _ = update(state, step, weights(step))
    expected = overlap(X @ weights(0)["router"], X @ weights(1)["router"], 2)
    got = floats(state.values)
    assert got["router_saturation"] == pytest.approx(expected, abs=1e-6)
    assert got["routing_flip_rate"] == pytest.approx(1 - expected, abs=1e-6)


@pytest.mark.slow
def test_end_to_end_rules_name_the_key_that_never_changes():
    rules = {
        "frozen_noise": "0.75 :: always[8](high_router_noise_repetition)",
        "rounded": "0.75 :: high_router_precision_disagreement",
        "settled": "0.75 :: ~high_routing_flip_rate & high_router_saturation",
    }

    @jax.jit
    def train_step(params: Any, key: Any) -> tuple[Any, jax.Array, jax.Array]:
        probs = jax.nn.softmax(route(params, key))
        return jax.tree.map(lambda w: 1.0001 * w, params), probs.mean(), probs

    params = weights(0)
    ill = RouterProbe(bf16, top_k=2, every=4, exact=route, reference=params)
    well = RouterProbe(route, top_k=2, every=4, exact=route, reference=params)
    with RuleAuditCallback(rules, signals=["router_probe_age"]) as audit:
        for step in range(32):
            probe, key = (ill, jax.random.key(0)) if step < 16 else (well, jax.random.key(step))
            params, loss, probs = train_step(params, key)
            audit.on_step({"loss": loss, "router_probs": probs, **probe(step, params, key)})
    states = audit.history.state.values
    assert states[:4, 0].tolist() == [2] * 4  # nothing to compare with
    assert states[12:16].tolist() == [[1, 1, 1]] * 4
    assert states[28:].tolist() == [[0, 0, 1]] * 4
    values = audit.history.signal_value
    assert values.sel(signal="router_probe_age").values[:, 0].tolist() == [0, 1, 2, 3] * 8


def test_its_scalars_have_names_and_ramps():
    names = RouterProbe(route, top_k=2, exact=route, reference=weights(0))(0, weights(0)).keys()
    assert names == SCALAR_NAMES.keys()
    assert names - SCALAR_RAMPS.keys() == {"router_probe_age"}
    assert scalar("router_saturation").long_name == SCALAR_NAMES["router_saturation"]
