"""Levanter's own Trainer trains Levanter's own Mixtral, neither of them changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from moe_rules_callback import MetricsError, RuleAuditCallback
from moe_rules_callback.errors import TracingError
from moe_rules_callback.tracing import tap

levanter = pytest.importorskip("levanter", reason="marin-levanter is not installed")

# By name, for type checkers that do not have them.
hax, optax, eqx = map(import_module, ("haliax", "optax", "equinox"))
trainers, schedule, dataset = map(
    import_module, ("levanter.trainer", "levanter.schedule", "levanter.data.dataset")
)
MixtralConfig = import_module("levanter.models.mixtral").MixtralConfig
LmExample = import_module("levanter.models.lm_model").LmExample
DictTracker = import_module("levanter.tracker.tracker").DictTracker

from moe_rules_callback.integrations.levanter import attach  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:jax.core.is_constant_dim:DeprecationWarning")  # by haliax

LAYERS, EXPERTS, K, BATCH, LENGTH, WORDS = 2, 4, 2, 4, 8, 32
ROUTER = "transformer/layers/stacked/block_sparse_moe/gate/weight"
FIRST, STEPS = 4, 6  # optimizer steps until train returns, and until it returns the second time
CONFIG = MixtralConfig(
    max_seq_len=LENGTH, hidden_dim=8, intermediate_dim=8, num_layers=LAYERS, num_heads=2, num_kv_heads=2,
    n_routed_experts=EXPERTS, num_experts_per_tok=K, use_flash_attention=False,
)  # fmt: skip


class Trainer(trainers.Trainer):
    """Notes the model and the batch of every step, its loss, and what is logged."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tracker = DictTracker()
        self.steps: list[tuple[Any, Any]] = []
        self.losses: list[float] = []

    def train_step(self, state: Any, batch: Any) -> Any:
        self.steps.append((jax.tree.map(np.asarray, state.model), batch))  # the state is donated
        info = super().train_step(state, batch)
        self.losses.append(info.loss)
        return info


def loss_function(model: Any, example: Any, *, key: Any = None) -> Any:
    with levanter.tracker.defer_tracker_for_jit() as logged:
        loss = model.compute_next_token_loss(example, key=key)
    return loss, logged


def make(folder: Path, loss: Any = loss_function, **options: Any) -> Trainer:
    settings = {"train_batch_size": BATCH, "per_device_eval_parallelism": BATCH, **options}
    config = trainers.TrainerConfig(
        id="tiny", num_train_steps=FIRST, steps_per_eval=3, tracker=levanter.tracker.NoopConfig(),
        log_dir=folder, log_jaxprs=False, log_xla_hlo=False, **settings,
    )  # fmt: skip
    return Trainer(config, optax.adam(0.02), loss, add_default_hooks=False)


def examples(number: int) -> list[Any]:
    words = np.random.default_rng(number).integers(WORDS, size=(number, LENGTH)).astype(np.int32)
    return [LmExample.causal(hax.named(row, CONFIG.max_Pos)) for row in words]


TRAINED, HELD_OUT = examples(STEPS * BATCH), examples(2 * BATCH)


def random_mixtral() -> Any:
    """As `CONFIG.build` makes it, which takes long to compile, with other random weights."""
    rng, key = np.random.default_rng(0), jax.random.PRNGKey(0)
    shapes = eqx.filter_eval_shape(CONFIG.build, hax.Axis("vocab", WORDS), key=key)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype), shapes)


def train(trainer: Trainer) -> Any:
    """Until `FIRST`, then on until `STEPS`; with evaluation on the way. Returns the last model."""
    with trainer:
        state = trainer.initial_state(jax.random.PRNGKey(0), model=random_mixtral())
        loader = trainer.data_loader(dataset.ListAsyncDataset(TRAINED))
        trainer.add_eval_hook(dataset.ListAsyncDataset(HELD_OUT))
        state = trainer.train(state, loader).state
        trainer.config = dataclasses.replace(trainer.config, num_train_steps=STEPS)
        return trainer.train(state, loader.iter_from_step(FIRST)).model


@pytest.fixture(scope="module", params=[-1, 2], ids=["whole batches", "micro-batches"])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The trainers without and with an audit, their last models, and the audit."""
    options = {"per_device_parallelism": request.param}
    plain = make(tmp_path_factory.mktemp("plain"), **options)
    audited = make(tmp_path_factory.mktemp("audited"), **options)
    with RuleAuditCallback("router_health", signals=("router_entropy",)) as audit:
        attach(audited, audit)
        yield plain, audited, train(plain), train(audited), audit


def test_training_is_the_same_to_the_bit(runs: Any) -> None:
    plain, audited, model, model_audited, _ = runs
    assert len(plain.losses) == STEPS
    assert audited.losses == plain.losses
    last = f"step_{STEPS - 1}"  # when evaluation is the last that is logged
    assert audited.tracker.metrics[last]["eval/loss"] == plain.tracker.metrics[last]["eval/loss"]
    jax.tree.map(np.testing.assert_array_equal, model_audited, model)


@eqx.filter_jit
def fed_to_routers(model: Any, layers: Any, batch: Any) -> list[Any]:
    """Mixtral's forward pass, layer by layer, without its scan and its remat."""
    fed, x = [], model.embeddings.embed(batch.tokens)
    for layer in layers:
        x = x + layer.self_attn(x=layer.input_layernorm(x), mask=batch.attn_mask)
        fed.append(layer.post_attention_layernorm(x))
        x = x + layer.block_sparse_moe(fed[-1])[0]
    return fed


def recomputed(trainer: Trainer, step: int) -> np.ndarray:
    """[layers, tokens, experts]: softmax of what the routers are fed, times their weights, in float64."""
    model, batch = trainer.steps[step]
    layers = model.transformer.layers.unstacked()
    with trainer:
        fed = fed_to_routers(model, layers, batch)
    probs = []
    for layer, x in zip(layers, fed, strict=True):
        weights = layer.block_sparse_moe.gate.weight.rearrange(("embed", "experts")).array
        x = x.rearrange(("batch", "position", "embed")).array
        logits = np.asarray(x, np.float64).reshape(BATCH * LENGTH, -1) @ np.asarray(weights, np.float64)
        odds = np.exp(logits - logits.max(-1, keepdims=True))
        probs.append(odds / odds.sum(-1, keepdims=True))
    return np.stack(probs)


def test_tapped_probabilities_are_those_of_the_routers_own_weights(runs: Any) -> None:
    _, audited, *_ = runs
    tapped = eqx.filter_jit(tap(make(audited.config.log_dir).loss_fn))
    for step in range(STEPS):
        with audited:
            _, probs = tapped(*audited.steps[step], key=None)
        assert list(probs) == [ROUTER]
        expected = recomputed(audited, step)
        np.testing.assert_allclose(probs[ROUTER].reshape(expected.shape), expected, atol=1e-5, rtol=0)


def test_a_row_for_every_step_and_none_for_evaluation(runs: Any) -> None:
    _, audited, _, _, audit = runs
    rows = audit.history
    assert rows.step.values.tolist() == list(range(STEPS))
    assert rows.layer.values.tolist() == [f"{ROUTER}_{i}" for i in range(LAYERS)]
    np.testing.assert_array_equal(rows.loss, np.float32(audited.losses))
    for step in range(STEPS):
        probs, row = recomputed(audited, step), rows.sel(step=step)
        entropy = -(probs * np.log(probs)).sum(-1).mean(-1) / np.log(EXPERTS)
        np.testing.assert_allclose(row.signal_value.sel(signal="router_entropy"), entropy, atol=1e-5)
        chosen = np.argsort(probs, axis=-1)[..., -K:]
        share = (chosen[..., None] == np.arange(EXPERTS)).sum((1, 2)) / chosen[0].size
        np.testing.assert_allclose(row.expert_share, share, atol=1e-6)


def test_batch_sizes_that_change_the_number_of_micro_batches_are_refused(tmp_path: Path) -> None:
    sizes = [schedule.ScheduleStep(0, 4), schedule.ScheduleStep(10, 8)]
    trainer = make(tmp_path, train_batch_size=sizes, per_device_parallelism=2)
    with RuleAuditCallback() as audit, pytest.raises(MetricsError, match=r"\[4, 8\] make \[2, 4\] micro-b"):
        attach(trainer, audit)
    assert "loss_fn" not in vars(trainer)


def test_batch_sizes_may_change_without_micro_batches(tmp_path: Path) -> None:
    sizes = [schedule.ScheduleStep(0, 4), schedule.ScheduleStep(10, 8)]
    with RuleAuditCallback() as audit:
        attach(make(tmp_path, train_batch_size=sizes), audit)


def test_a_model_without_routers_says_so(tmp_path: Path) -> None:
    def loss(model: Any, example: Any, *, key: Any = None) -> Any:
        return hax.mean(model.weight)

    wide, key = hax.Axis("width", 2), jax.random.PRNGKey(0)
    with RuleAuditCallback() as audit, make(tmp_path, loss) as trainer:
        attach(trainer, audit)
        model = hax.nn.Linear.init(wide, wide.alias("out"), key=key)
        with pytest.raises(TracingError, match="No router was found"):
            trainer.train(trainer.initial_state(key, model=model), [hax.named(np.ones(BATCH), "batch")])
