# pyright: reportMissingImports=false
"""Tunix's own PeftTrainer trains its own Qwen3-MoE, neither of them changed: with an audit and without."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback import MetricsError, RuleAuditCallback, open_history
from moe_rules_callback.errors import TracingError
from moe_rules_callback.tracing import tap

pytest.importorskip("tunix", reason="google-tunix is not installed")
import optax
from flax import nnx
from moe_rules_callback.integrations.tunix import attach
from tunix.models.qwen3.model import ModelConfig, Qwen3, RematConfig
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

LAYERS, EXPERTS, K, BATCH, LENGTH, WORDS = 2, 4, 2, 2, 6, 32
STEPS, ACCUMULATED = 3, 2
ROUTERS = [f"layers/{i}/mlp/router/kernel" for i in range(LAYERS)]
RULES = {"r": "high_router_entropy & low_loss"}


def qwen3() -> Qwen3:
    config = ModelConfig(
        num_layers=LAYERS, vocab_size=WORDS, embed_dim=16, hidden_dim=8, num_heads=2, head_dim=8,
        num_kv_heads=1, rope_theta=10_000, norm_eps=1e-6, num_experts=EXPERTS, num_experts_per_tok=K,
        remat_config=RematConfig.DECODER,
    )  # fmt: skip
    return Qwen3(config, rngs=nnx.Rngs(0))


def batch(number: int) -> dict[str, np.ndarray]:
    words = np.random.default_rng(number).integers(WORDS, size=(BATCH, LENGTH)).astype(np.int32)
    causal = np.tril(np.ones((LENGTH, LENGTH), bool))
    return {
        "input_tokens": words,
        "input_mask": np.ones_like(words, bool),
        "positions": np.tile(np.arange(LENGTH, dtype=np.int32), (BATCH, 1)),
        "attention_mask": np.tile(causal, (BATCH, 1, 1)),
    }


BATCHES, HELD_OUT = [batch(i) for i in range(STEPS * ACCUMULATED)], [batch(100)]


def parameters(model: nnx.Module) -> Any:
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))


class Noting(TrainingHooks):
    """Hooks of the user: what was called, and the parameters before each micro-batch."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.parameters: list[Any] = []
        self.losses: list[float] = []

    def on_train_start(self, train_ctx: PeftTrainer) -> None:
        self.calls["train start"] += 1

    def on_train_end(self, train_ctx: PeftTrainer) -> None:
        self.calls["train end"] += 1

    def on_train_step_start(self, train_ctx: PeftTrainer) -> None:
        self.parameters.append(parameters(train_ctx.model))

    def on_train_step_end(self, train_ctx: PeftTrainer, train_step: int, train_loss: float) -> None:
        self.losses.append(train_loss)

    def on_eval_step_start(self, train_ctx: PeftTrainer) -> None:
        self.calls["eval step start"] += 1

    def on_eval_step_end(self, train_ctx: PeftTrainer, eval_loss: float) -> None:
        self.calls["eval step end"] += 1


def make(model: nnx.Module, accumulated: int | None = None) -> PeftTrainer:
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=lambda step: 0.02 / (1 + step))
    config = TrainingConfig(
        eval_every_n_steps=2, gradient_accumulation_steps=accumulated, max_steps=STEPS, pbar_description=None
    )
    return PeftTrainer(model, optimizer, config)


def logged(trainer: PeftTrainer, name: str) -> np.ndarray:
    return trainer.metrics_logger.get_metric_history("", name, "train")


def ran(audit: RuleAuditCallback | None = None) -> SimpleNamespace:
    """A training of Qwen3 with hooks and evaluation."""
    trainer, noting = make(qwen3(), ACCUMULATED), Noting()
    trainer.with_training_hooks(noting)
    if audit is not None:
        attach(trainer, audit)
    trainer.train(BATCHES, HELD_OUT)
    rows = None if audit is None else audit.history
    return SimpleNamespace(trainer=trainer, noting=noting, rows=rows, parameters=parameters(trainer.model))


@pytest.fixture(scope="module")
def bare() -> SimpleNamespace:
    return ran()


@pytest.fixture(scope="module")
def audited() -> SimpleNamespace:
    with RuleAuditCallback(RULES, signals=("expert_imbalance",)) as audit:
        return ran(audit)


@pytest.fixture(scope="module")
def recomputed(audited: SimpleNamespace) -> np.ndarray:
    """[micro-batches, layers, tokens, experts], by NumPy from what Flax saw go into the routers."""
    model = qwen3()
    graph = nnx.graphdef(model)

    @jax.jit
    def inputs(state: Any, x: Any) -> list[jax.Array]:
        copy = nnx.merge(graph, state)
        run = nnx.capture(copy, nnx.Intermediate, method_outputs=nnx.Intermediate)
        _, seen = run(x["input_tokens"], x["positions"], None, x["attention_mask"])
        layers = nnx.to_pure_dict(seen)["layers"]
        return [layers[i]["post_attention_layernorm"]["__call__"][0] for i in range(LAYERS)]

    probabilities = []
    for values, x in zip(audited.noting.parameters, BATCHES, strict=True):
        state = nnx.state(model)
        nnx.replace_by_pure_dict(state, values)
        for i, hidden in enumerate(inputs(state, x)):
            kernel = values["layers"][i]["mlp"]["router"]["kernel"].astype(np.float64)
            scores = np.exp(np.asarray(hidden, np.float64).reshape(-1, kernel.shape[0]) @ kernel)
            probabilities.append(scores / scores.sum(-1, keepdims=True))
    return np.reshape(probabilities, (len(BATCHES), LAYERS, -1, EXPERTS))


def test_training_is_the_same_to_the_bit(bare: SimpleNamespace, audited: SimpleNamespace) -> None:
    for name in ("loss", "grad_norm"):
        np.testing.assert_array_equal(logged(audited.trainer, name), logged(bare.trainer, name))
    jax.tree.map(np.testing.assert_array_equal, audited.parameters, bare.parameters)
    jax.tree.map(np.testing.assert_array_equal, audited.noting.parameters, bare.noting.parameters)


def test_tapped_probabilities_are_those_of_the_routers_own_weights(
    audited: SimpleNamespace, recomputed: np.ndarray
) -> None:
    """In every layer and step, and with the loss unchanged."""
    model, loss = qwen3(), make(qwen3()).loss_fn
    graph = nnx.graphdef(model)
    plain = jax.jit(lambda state, x: loss(nnx.merge(graph, state), **x))
    tapped = jax.jit(lambda state, x: tap(loss)(nnx.merge(graph, state), **x))
    losses = []
    for values, x, expected in zip(audited.noting.parameters, BATCHES, recomputed, strict=True):
        state = nnx.state(model)
        nnx.replace_by_pure_dict(state, values)
        value, probs = tapped(state, x)
        losses.append(value)
        assert value == plain(state, x)
        assert list(probs) == ROUTERS
        np.testing.assert_allclose(np.stack([*probs.values()]), expected, atol=1e-5)
    losses = np.reshape(losses, (STEPS, ACCUMULATED)).mean(1)
    np.testing.assert_allclose(losses, logged(audited.trainer, "loss"), rtol=1e-5)  # these were the steps


def test_one_row_for_each_optimizer_step(audited: SimpleNamespace, recomputed: np.ndarray) -> None:
    rows, tokens = audited.rows, BATCH * LENGTH
    assert rows.step.values.tolist() == [1, 2, 3]
    assert rows.layer.values.tolist() == ROUTERS
    together = recomputed.reshape(STEPS, ACCUMULATED, LAYERS, tokens, EXPERTS).swapaxes(1, 2)
    together = together.reshape(STEPS, LAYERS, -1, EXPERTS)
    entropy = -(together * np.log(together)).sum(-1).mean(-1) / np.log(EXPERTS)
    got = rows.signal_value.sel(signal="router_entropy")
    np.testing.assert_allclose(got, entropy, atol=1e-5)
    chosen = np.argsort(-together)[..., :K].reshape(STEPS, LAYERS, -1)
    share = (chosen[..., None] == np.arange(EXPERTS)).mean(-2)
    np.testing.assert_allclose(rows.expert_share, share, atol=1e-6)


def test_rows_have_what_the_trainer_logs_of_their_step(audited: SimpleNamespace) -> None:
    for name in ("loss", "perplexity", "grad_norm", "learning_rate"):
        got = audited.rows.signal_pooled.sel(signal=name)
        np.testing.assert_allclose(got, logged(audited.trainer, name), rtol=1e-6)
    np.testing.assert_array_equal(audited.rows.loss, np.asarray(audited.noting.losses, np.float32))


def test_hooks_that_were_there_are_called_as_before(bare: SimpleNamespace, audited: SimpleNamespace) -> None:
    assert audited.noting.calls == bare.noting.calls
    assert set(bare.noting.calls) == {"train start", "train end", "eval step start", "eval step end"}
    assert audited.noting.losses == bare.noting.losses


class Layer(nnx.Module):
    """One MoE layer, for what has nothing to do with the model."""

    def __init__(self) -> None:
        self.router = nnx.Param(jax.random.normal(jax.random.key(0), (4, EXPERTS)))
        self.experts = nnx.Param(jax.random.normal(jax.random.key(1), (EXPERTS, 4, 4)))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, index = jax.lax.top_k(jax.nn.softmax(x @ self.router[...]), K)
        mask = (jax.nn.one_hot(index, EXPERTS) * gate[..., None]).sum(-2)
        return jnp.einsum("te,ti,eio->to", mask, x, self.experts[...])


def loss_fn(model: Layer, x: jax.Array) -> jax.Array:
    return jnp.square(model(x) - x).mean()


ROWS = [{"x": np.random.default_rng(i).normal(size=(5, 4)).astype(np.float32)} for i in range(8)]


def small() -> PeftTrainer:
    return make(Layer()).with_loss_fn(loss_fn)


def test_hooks_that_are_set_later_come_beside_the_audit(tmp_path: Path) -> None:
    trainer, before, after = small(), Noting(), Noting()
    trainer.with_training_hooks(before)
    with RuleAuditCallback(RULES, logdir=tmp_path, sinks="zarr") as audit:
        attach(trainer, audit)
        trainer.with_training_hooks(after)
        trainer.train(ROWS)
        assert audit.path is not None
        written = open_history(audit.path)  # which waits for nothing
        np.testing.assert_array_equal(written.loss, np.asarray(after.losses, np.float32))
        assert len(after.losses) == STEPS
    assert before.losses == []  # as without an audit


def test_a_further_training_goes_on() -> None:
    trainer = small()
    with RuleAuditCallback(RULES) as audit:
        attach(trainer, audit)
        trainer.train(ROWS)
        trainer.config.max_steps = 2 * STEPS
        trainer.train(ROWS)
        rows = audit.history
    assert rows.step.values.tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm"):
        got = rows.signal_pooled.sel(signal=name)
        np.testing.assert_allclose(got, logged(trainer, name), rtol=1e-6)


def test_a_learner_that_calls_train_again_and_again() -> None:
    """Its trainer ends a step in the next call, and the last one when it is closed."""
    trainer = small()
    trainer.is_managed_externally = True
    with RuleAuditCallback(RULES) as audit:
        attach(trainer, audit)
        for i in range(3):
            trainer.train(ROWS[2 * i : 2 * i + 2])
        assert audit.history.step.values.tolist() == [1, 2, 3, 4, 5]
        trainer.close()
        rows = audit.history
    assert rows.step.values.tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm"):
        got = rows.signal_pooled.sel(signal=name)
        np.testing.assert_allclose(got, logged(trainer, name), rtol=1e-6)


def test_what_is_refused() -> None:
    with RuleAuditCallback(RULES) as audit:
        trainer = small()
        attach(trainer, audit)
        with pytest.raises(MetricsError, match="has its router metrics from elsewhere"):
            attach(small(), audit)
        trainer.with_loss_fn(loss_fn)
        with pytest.raises(MetricsError, match="has another loss than the one that is watched"):
            trainer.train(ROWS)
    with RuleAuditCallback(RULES) as audit:
        trainer = make(Layer()).with_loss_fn(lambda model, x: jnp.square(x @ model.router[...]).mean())
        attach(trainer, audit)
        with pytest.raises(TracingError, match="No router was found"):
            trainer.train(ROWS)
