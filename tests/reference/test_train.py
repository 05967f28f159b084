"""Whole runs at tiny sizes: what they leave behind, and what changes nothing (the audit, more devices)."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback import open_history
from reference import train as trainer
from reference.config import Config, ConfigError
from reference.train import Result, create, learn, train

ROOT = Path(__file__).parents[2]
TINY = Config(
    steps=12, layers=1, width=16, heads=2, context=16, experts=4, expert_width=16, batch=8,
    learning_rate=1e-2, eval_every=5, eval_batches=2, log_every=6, capacity_factor=2.0, audit=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> tuple[Result, Path, list[str]]:
    """A run with the audit, its directory, and what it said."""
    logdir, said = tmp_path_factory.mktemp("runs") / "tiny", []
    result = train(dataclasses.replace(TINY, audit=True, logdir=str(logdir)), said.append)
    return result, logdir, said


@pytest.fixture(scope="module")
def bare() -> Result:
    return train(TINY, str)


def test_a_run_leaves_history_picture_and_tensorboard_files(audited):
    result, logdir, _ = audited
    assert result.history == logdir / "audit.zarr"
    assert (logdir / "audit.png").read_bytes().startswith(b"\x89PNG")
    assert (logdir / "router_affinity_matrix.csv").exists()
    assert list(logdir.glob("events.out.tfevents.*"))


def test_the_history_holds_every_step(audited):
    result, logdir, _ = audited
    history = open_history(logdir)
    np.testing.assert_array_equal(history.step, np.arange(12))
    np.testing.assert_allclose(history.loss, result.losses, rtol=1e-6)
    assert len(history.rule) == 6  # load_imbalance too, which needs the parameters
    assert json.loads(history.attrs["config"])["learning_rate"] == TINY.learning_rate


def test_the_validation_loss_is_carried_from_one_measurement_to_the_next(audited):
    result, logdir, _ = audited
    assert list(result.validation) == [0, 5, 10, 12]
    carried = open_history(logdir).signal_value.sel(signal="validation_loss")[:, 0]
    expected = [result.validation[step // 5 * 5] for step in range(12)]
    np.testing.assert_allclose(carried, expected, rtol=1e-6)


def test_it_says_what_it_does(audited):
    result, logdir, said = audited
    text = "\n".join(said)
    assert "python, bytes to train on: prose " in text
    assert "1 blocks of width 16, 4 experts, 2 a token" in text
    assert f"step    12  loss {result.losses[-1]:.3f}  validation {result.validation[12]:.3f}  true: " in text
    assert f"validation loss        {result.validation[12]:.3f} nats a byte; entropy of a byte 3." in text
    assert said[-2] == f"wrote {logdir / 'audit.zarr'} and {logdir / 'audit.png'}"
    assert said[-1] == f"to see more: moe-rules report {logdir}, or tensorboard --logdir {logdir}"


def test_figures(audited):
    figures = audited[0].figures
    assert figures["router_gradient_norm"] > 0
    assert figures["dropped_token_fraction"] == 0  # capacity_factor is E / k
    assert figures["bigram_entropy"] < figures["unigram_entropy"] < np.log(128)
    assert 0.25 <= figures["busiest_expert_share"] <= figures["routing_accuracy"] <= 1
    assert 0.5 <= figures["domain_specialisation"] <= 1


def test_it_learns(audited):
    losses = audited[0].losses
    assert losses[0] == pytest.approx(np.log(256), abs=0.1)
    assert losses[-1] < losses[0] - 0.5


def test_a_run_repeats_and_the_audit_changes_nothing(audited, bare):
    np.testing.assert_allclose(audited[0].losses, bare.losses, rtol=1e-5)
    assert bare.history is None


def test_the_seed_decides(bare):
    other = train(dataclasses.replace(TINY, seed=1), str)
    assert np.abs(other.losses - bare.losses).max() > 1e-3


def test_noise_is_fresh_at_every_step():
    config = dataclasses.replace(TINY, router_noise=1.0)
    graphdef, state = jax.jit(create, static_argnums=0)(config)
    tokens, domain = jnp.zeros((8, 17), jnp.int32), jnp.zeros(8, jnp.int32)
    step = jax.jit(functools.partial(learn, graphdef=graphdef, config=config, domains=1))
    state, first = step(state, tokens, domain)  # the learning rate of the first step is 0
    state, second = step(state, tokens, domain)
    weights = [np.asarray(jax.tree.leaves(metrics["params"])[0]) for metrics in (first, second)]
    assert np.abs(weights[0]).max() > 0
    assert np.abs(np.asarray(first["router_logits"][0] - second["router_logits"][0])).max() > 1


@pytest.mark.slow
def test_four_devices_train_as_one(bare):
    program = (
        "import jax, json, sys; from reference.config import Config; from reference.train import train\n"
        "assert jax.device_count() == 4\n"
        "print(json.dumps(train(Config(**json.loads(sys.argv[1])), str).losses.tolist()))"
    )
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    env = os.environ | devices | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", program, json.dumps(dataclasses.asdict(TINY))]
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), bare.losses, atol=1e-4)


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(ConfigError) as raised:
        train(dataclasses.replace(TINY, groups=3), str)
    assert str(raised.value) == (
        "A batch of 8 sequences cannot be shared evenly among 1 devices and 3 groups. "
        "Choose a --batch that is a multiple of both."
    )


def test_the_command_line_ends_with_a_message(monkeypatch, tmp_path):
    missing = tmp_path / "missing.txt"
    monkeypatch.setattr(sys, "argv", ["train", "--text", str(missing)])
    with pytest.raises(SystemExit) as ended:
        trainer.main()
    assert str(ended.value).startswith(f"Cannot read {missing}: ")
