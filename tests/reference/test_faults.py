"""Every fault does what it says, on a tiny model; with healthy knobs nothing goes wrong."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from test_train import TINY

from moe_rules_callback import open_history
from reference import learning as plain
from reference.config import ConfigError
from reference.data import load_corpus
from reference.faults.catalogue import FAULTS, find
from reference.faults.injection import Injection
from reference.faults.knobs import Knobs, turned
from reference.faults.learning import create, learn
from reference.train import train

pytestmark = pytest.mark.skipif(
    not hasattr(nnx.Variable, "get_value"), reason="planted faults need Flax 0.12.1"
)
SMALL = dataclasses.replace(TINY, layers=2, capacity_factor=2.0, z_weight=0.0, router_noise=1.0)
RNG = np.random.default_rng(0)
TOKENS, DOMAIN = RNG.integers(0, 256, (8, 17), dtype=np.int32), np.zeros(8, np.int32)


class Learner:
    """A state after two steps, of which the first has no learning rate, and what knobs make of the third."""

    def __init__(self, config, create=create, learn=learn) -> None:
        graphdef, state = jax.jit(create, static_argnums=0)(config)
        self._step = jax.jit(functools.partial(learn, graphdef=graphdef, config=config, domains=1))
        self.fresh = state
        for _ in range(2):
            state, _ = self._step(state, TOKENS, DOMAIN)
        self.state = state

    def __call__(self, tokens=TOKENS, state=None, **knobs):
        state = dict(state or self.state)
        if "knobs" in state:
            state["knobs"] = turned(**knobs)
        self.after, metrics = self._step(state, tokens, DOMAIN)
        return jax.tree.map(np.asarray, metrics)


@pytest.fixture(scope="module")
def learner() -> Learner:
    return Learner(SMALL)


@pytest.fixture(scope="module")
def top1() -> Learner:
    return Learner(dataclasses.replace(SMALL, top_k=1))


def router_gradients(metrics) -> list[np.ndarray]:
    return [
        np.asarray(block["moe"]["router"]["kernel"][...]) for block in metrics["grads"]["blocks"].values()
    ]


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_healthy_knobs_change_nothing(learner):
    ours, theirs = learner(), Learner(SMALL, plain.create, plain.learn)()
    assert ours.keys() == theirs.keys()
    for got, wanted in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)


def test_a_dead_expert_gets_no_token(learner):
    assert any((index == 0).any() for index in learner()["expert_index"])
    dead = learner(**find("dead_expert").turns(0))
    assert not any((index == 0).any() for index in dead["expert_index"])


def test_a_frozen_router_has_no_gradient_of_the_task(learner):
    frozen = find("frozen_router").turns(0)
    assert all(np.abs(each).max() > 0 for each in router_gradients(learner(balance=0)))
    assert all(np.abs(each).max() == 0 for each in router_gradients(learner(balance=0, **frozen)))


def test_a_renormalised_gate_of_one_expert_has_no_gradient_of_the_task(top1):
    fault = find("top1_renormalised")
    assert fault.needs == {"top_k": 1}
    assert all(np.abs(each).max() > 0 for each in router_gradients(top1(balance=0)))
    for each in router_gradients(top1(balance=0, **fault.turns(0))):
        np.testing.assert_allclose(each, 0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "factor"),
    [("no_balancing", 0), ("negative_balancing", -1), ("balancing_x1000", 1000), ("strong_balancing", 2)],
)
def test_the_balancing_loss_is_weighed(learner, name, factor):
    none, once = router_gradients(learner(balance=0)), router_gradients(learner())
    got = router_gradients(learner(**find(name).turns(0)))
    for task, both, each in zip(none, once, got, strict=True):
        np.testing.assert_allclose(each, task + factor * (both - task), rtol=2e-2, atol=1e-6)


def test_a_pooled_balancing_loss_sees_all_layers_as_one(learner):
    pooled = learner(**find("pooled_balancing").turns(0))
    probs, index = np.concatenate(pooled["router_probs"]), np.concatenate(pooled["expert_index"])
    share = np.bincount(index.ravel(), minlength=4) / index.size
    assert float(pooled["balancing_loss"]) == pytest.approx(4 * share @ probs.mean(axis=0), rel=1e-5)
    assert float(pooled["balancing_loss"]) != pytest.approx(float(learner()["balancing_loss"]), rel=1e-5)


def test_logits_are_scaled(learner):
    healthy, scaled = (
        learner()["router_logits"][0],
        learner(**find("logits_x20").turns(0))["router_logits"][0],
    )
    np.testing.assert_allclose(scaled, 20 * healthy, rtol=1e-5)


def test_logits_are_rounded_to_bfloat16(learner):
    exact = learner()["router_logits"][0]
    rounded = learner(**find("bfloat16_router").turns(0))["router_logits"][0]
    np.testing.assert_array_equal(rounded, exact.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert (rounded != exact).any()


def test_the_same_noise_at_every_step(learner):
    def noise(seed, **knobs):
        noisy = learner(state={**learner.state, "key": jax.random.key(seed)}, **knobs)["router_logits"][0]
        return noisy - learner(noise_off=True)["router_logits"][0]

    frozen = find("same_noise").turns(0)
    np.testing.assert_array_equal(noise(5, **frozen), noise(6, **frozen))
    assert np.abs(noise(5, **frozen)).max() > 0.1
    assert np.abs(noise(5) - noise(6)).max() > 0.1


def test_half_of_the_places(learner):
    fewer = dataclasses.replace(SMALL, capacity_factor=0.5)
    half = find("capacity_half").turns(0)
    ours, theirs = learner(state=learner.fresh, **half), Learner(fewer, plain.create, plain.learn)
    wanted = theirs(state=theirs.fresh)
    assert float(learner(state=learner.fresh)["dropped_token_fraction"]) == 0
    assert float(ours["dropped_token_fraction"]) == float(wanted["dropped_token_fraction"]) >= 0.5
    assert float(ours["loss"]) == pytest.approx(float(wanted["loss"]), rel=1e-6)


def test_tokens_go_to_the_expert_after(learner):
    healthy, shifted = learner(), learner(**find("index_shift").turns(0))
    np.testing.assert_array_equal(shifted["expert_index"][0], (healthy["expert_index"][0] + 1) % 4)
    np.testing.assert_array_equal(shifted["router_probs"][0], healthy["router_probs"][0])


def test_the_learning_rate_is_multiplied(learner):
    before = flat(learner(learning_rate=0)["params"])
    once, more = flat(learner()["params"]) - before, flat(learner(learning_rate=30)["params"]) - before
    np.testing.assert_allclose(more, 30 * once, rtol=1e-2, atol=1e-4)
    assert np.abs(once).max() > 1e-4
    spike = find("learning_rate_x30")
    assert [age for age in range(40) if spike.knobs(age).learning_rate == 30] == list(range(20))
    restart = [float(find("restart_collapse").knobs(age).learning_rate) for age in (0, 75, 150, 300)]
    assert restart == pytest.approx([10, 5.5, 1, 1])


def test_identical_experts_at_the_beginning_only(learner):
    fault = find("identical_experts")
    params = learner(state=learner.fresh, **fault.turns(0))["params"]  # the first step changes none
    kernel = np.asarray(params["blocks"][0]["moe"]["experts"]["w_in"][...])
    np.testing.assert_array_equal(kernel, np.broadcast_to(kernel[:1], kernel.shape))
    assert fault.knobs(1) == Knobs()


def test_labels_are_shuffled_and_inputs_are_not(learner):
    healthy, shuffled = learner(), learner(**find("shuffled_labels").turns(0))
    np.testing.assert_array_equal(shuffled["router_logits"][0], healthy["router_logits"][0])
    assert abs(float(shuffled["loss"]) - float(healthy["loss"])) > 1e-3
    same = np.full_like(TOKENS, 7)
    kept = [float(learner(same, **knobs)["loss"]) for knobs in ({}, find("shuffled_labels").turns(0))]
    assert kept[0] == pytest.approx(kept[1], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("misreported_loss", {"loss": 4}),
        ("doubled_counters", {"balancing_loss": 2, "dropped_token_fraction": 2}),
    ],
)
def test_telemetry_is_wrong_and_learning_is_not(learner, name, factors):
    healthy, told = learner(), learner(**find(name).turns(0))
    for scalar in ("loss", "balancing_loss", "dropped_token_fraction"):
        assert float(told[scalar]) == pytest.approx(factors.get(scalar, 1) * float(healthy[scalar]))
    np.testing.assert_allclose(flat(told["params"]), flat(healthy["params"]), rtol=1e-5, atol=1e-7)


def test_evaluation_rows_learn_nothing(learner):
    fault = find("evaluation_rows")
    assert [age for age in range(20) if fault.text(age) == "held_out"] == [3, 11, 19]
    before = flat(learner(learning_rate=0)["params"])
    np.testing.assert_array_equal(flat(learner(**fault.turns(3))["params"]), before)
    assert fault.knobs(4) == Knobs()


def test_the_text_of_a_step():
    corpus = load_corpus("python")
    config = dataclasses.replace(TINY, fault="data_shift", fault_step=3)
    tables, train = corpus.only("tables").train[0].tobytes(), b"\n".join(t.tobytes() for t in corpus.train)
    for step in range(6):
        tokens, domain = Injection(config, corpus).batch(np.random.default_rng(step), 8, 16, step=step)
        text = tables if step >= 3 else train
        assert all(window.astype(np.uint8).tobytes() in text for window in tokens)
        assert (set(domain.tolist()) == {2}) == (step >= 3)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_turns_knobs_from_its_onset_on(name):
    fault = FAULTS[name]
    corpus = load_corpus("prose")
    for onset in (None, 7):
        config = dataclasses.replace(TINY, fault=name, fault_step=-1 if onset is None else onset)
        injection = Injection(config, corpus)
        at = fault.onset if onset is None else onset
        assert injection.config.fault_step == at
        assert injection.config.top_k == fault.needs.get("top_k", TINY.top_k)
        assert at == 0 or injection.knobs(at - 1) == Knobs()
        turns = [injection.knobs(at + age) != Knobs() or fault.text(age) != "train" for age in range(8)]
        assert any(turns)
        assert [type(knob) for knob in injection.knobs(at)] == [type(knob) for knob in Knobs()]


def test_a_fault_that_is_not_there():
    with pytest.raises(ConfigError) as raised:
        find("dead_experts")
    known = ", ".join(FAULTS)
    assert (
        str(raised.value)
        == f"There is no fault 'dead_experts'. Did you mean dead_expert? There are: {known}."
    )


def test_the_trainer_with_a_fault(tmp_path):
    said = []
    config = dataclasses.replace(TINY, audit=True, logdir=str(tmp_path), fault="dead_expert", fault_step=6)
    train(config, said.append)
    assert "fault     dead_expert, from step 6 on" in said[0]
    share = open_history(tmp_path).expert_share[:, 0, 0].values
    assert (share[:6] > 0).all()
    assert (share[6:] == 0).all()


def test_sigmoid_probabilities_are_normalised(learner):
    metrics = Learner(dataclasses.replace(SMALL, gate="sigmoid"))()
    affinity = 1 / (1 + np.exp(-metrics["router_logits"][0].astype(np.float64)))
    expected = affinity / affinity.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(metrics["router_probs"][0], expected, rtol=1e-5)
    assert np.isfinite(jnp.asarray(metrics["loss"]))
