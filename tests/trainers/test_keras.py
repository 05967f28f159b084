# pyright: reportMissingImports=false
"""`Model.fit(callbacks=[RuleAudit(audit)])` changes nothing and makes a row of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import numpy as np
import pytest

pytest.importorskip("keras")

import jax
import keras
from keras_moe import EXPERTS, make_data, make_model
from moe_rules_callback.integrations.keras import RuleAudit

from moe_rules_callback import RuleAuditCallback
from moe_rules_callback.errors import MetricsError, TracingError

X, Y = make_data()
BATCH, BATCHES = 8, 5
FIT: dict[str, Any] = {"batch_size": BATCH, "shuffle": False, "verbose": 0}
SIGNALS = ("routing_confidence", "router_entropy", "loss")


@pytest.fixture
def audit() -> Iterator[RuleAuditCallback]:
    with RuleAuditCallback({"r": "low_load_cv"}, signals=SIGNALS) as audit:
        yield audit


def assert_same(model: Any, other: Any) -> None:
    for a, b in zip(model.weights, other.weights, strict=True):
        np.testing.assert_array_equal(a.value, b.value, err_msg=a.path)


def by_hand(epochs: int) -> tuple[list[float], list[np.ndarray]]:
    """Loss of each batch, and the probabilities of its router, from weights that Keras trained alone."""
    model, losses, probs = make_model(), [], []
    for i in range(epochs * BATCHES):
        rows = slice(i % BATCHES * BATCH, (i % BATCHES + 1) * BATCH)
        scores = np.exp(X[rows] @ np.asarray(model.get_layer("moe").router.kernel.value))
        probs.append(scores / scores.sum(-1, keepdims=True))
        losses.append(model.train_on_batch(X[rows], Y[rows], return_dict=True)["loss"])
    return losses, probs


def signal(audit: RuleAuditCallback, name: str) -> np.ndarray:
    return audit.history.signal_pooled.sel(signal=name).values


def assert_rows_by_hand(audit: RuleAuditCallback, epochs: int) -> None:
    losses, probs = by_hand(epochs)
    assert audit.history.step.values.tolist() == list(range(epochs * BATCHES))
    confidence = [p.max(-1).mean() for p in probs]
    entropy = [-(p * np.log(p)).sum(-1).mean() / np.log(EXPERTS) for p in probs]
    np.testing.assert_allclose(signal(audit, "routing_confidence"), confidence, rtol=1e-5)
    np.testing.assert_allclose(signal(audit, "router_entropy"), entropy, rtol=1e-5)
    found = signal(audit, "loss")
    np.testing.assert_allclose(found, np.where(np.isnan(found), np.nan, losses), rtol=1e-5)


def test_results_stay_and_rows_are_those_of_the_batches(audit: RuleAuditCallback) -> None:
    plain, model = make_model(), make_model()
    expected = plain.fit(X, Y, epochs=2, validation_data=(X, Y), **FIT).history
    got = model.fit(X, Y, epochs=2, validation_data=(X, Y), callbacks=[RuleAudit(audit)], **FIT).history
    assert got == expected
    assert_same(model, plain)
    assert_rows_by_hand(audit, epochs=2)
    assert audit.history.layer.values.tolist() == ["moe/router/kernel"]
    assert not np.isnan(signal(audit, "loss")).any()
    np.testing.assert_allclose(signal(audit, "accuracy")[BATCHES - 1 :: BATCHES], got["accuracy"])


def test_only_training_in_fit_counts(audit: RuleAuditCallback) -> None:
    model = make_model()
    model.fit(X, Y, callbacks=[RuleAudit(audit)], **FIT)
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    model.train_on_batch(X, Y)
    model.fit(X, Y, **FIT)
    assert len(audit.history.step) == BATCHES


def test_a_further_fit_goes_on(audit: RuleAuditCallback) -> None:
    """Also after one without the callback, whose compiled step does not report."""
    plain, model, callback = make_model(), make_model(), RuleAudit(audit)
    for callbacks in ([], [callback], [], [callback]):
        plain.fit(X, Y, **FIT)
        model.fit(X, Y, callbacks=callbacks, **FIT)
    model.compile(keras.optimizers.Adam(), "mse", metrics=["accuracy"])
    model.fit(X, np.eye(3)[Y], callbacks=[callback], **FIT)
    plain.compile(keras.optimizers.Adam(), "mse", metrics=["accuracy"])
    plain.fit(X, np.eye(3)[Y], **FIT)
    assert_same(model, plain)
    assert audit.history.step.values.tolist() == list(range(3 * BATCHES))


def test_several_steps_per_execution(audit: RuleAuditCallback) -> None:
    plain, model = make_model(steps_per_execution=2), make_model(steps_per_execution=2)
    plain.fit(X, Y, epochs=2, **FIT)
    model.fit(X, Y, epochs=2, callbacks=[RuleAudit(audit)], **FIT)
    assert_same(model, plain)
    assert_rows_by_hand(audit, epochs=2)
    assert np.isnan(signal(audit, "loss")).tolist() == 2 * [True, False, True, False, False]


def test_without_jit(audit: RuleAuditCallback) -> None:
    make_model(jit_compile=False).fit(X, Y, callbacks=[RuleAudit(audit)], **FIT)
    assert_rows_by_hand(audit, epochs=1)


class Interrupts(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        raise KeyboardInterrupt


def test_an_interrupted_fit(audit: RuleAuditCallback) -> None:
    plain, model, callback = make_model(), make_model(), RuleAudit(audit)
    for each, callbacks in ((plain, []), (model, [callback])):
        with pytest.raises(KeyboardInterrupt):
            each.fit(X, Y, callbacks=[*callbacks, Interrupts()], **FIT)
        each.fit(X, Y, **FIT)
    assert len(audit.history.step) == 1
    plain.fit(X, Y, **FIT)
    model.fit(X, Y, callbacks=[callback], **FIT)
    assert_same(model, plain)
    assert len(audit.history.step) == 1 + BATCHES


class Own(keras.Model):
    """A training step of its own, as Keras's guide has it, and no loss among the metrics."""

    def train_step(self, state: Any, data: Any) -> Any:
        trainable, frozen, optimizer, metrics = state
        x, y = data

        def loss_of(trainable: Any) -> Any:
            predicted, new = self.stateless_call(trainable, frozen, x, training=True)
            return self.compute_loss(x, y, predicted), new

        (loss, frozen), grads = jax.value_and_grad(loss_of, has_aux=True)(trainable)
        trainable, optimizer = self.optimizer.stateless_apply(optimizer, grads, trainable)
        return {"own": loss}, (trainable, frozen, optimizer, metrics)


def test_a_training_step_of_the_users() -> None:
    functional = make_model()
    model = Own(functional.inputs, functional.outputs)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.5), loss)
    with RuleAuditCallback({"r": "low_load_cv"}, signals=["own"]) as audit:
        model.fit(X, Y, callbacks=[RuleAudit(audit)], **FIT)
        losses, _ = by_hand(1)
        np.testing.assert_allclose(signal(audit, "own"), losses, rtol=1e-5)


def test_variables_of_the_same_path_stay_apart(audit: RuleAuditCallback) -> None:
    block = make_model().get_layer("moe")
    twin = type(block)(name="moe")
    x = keras.layers.Input(X.shape[1:])
    model = keras.Sequential([x, _Pair(block, twin)])
    model.compile("sgd", "mse")
    model.fit(X, X, callbacks=[RuleAudit(audit)], **FIT)
    assert len(set(audit.history.layer.values.tolist())) == 2


class _Pair(keras.layers.Layer):
    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second

    def build(self, input_shape: Any) -> None:
        self.second.build(input_shape)

    def call(self, x: Any) -> Any:
        return self.second(x + self.first(x))


def test_keras_need_not_wait_for_the_batches() -> None:
    """Keras waits for the logs of each batch if a callback overrides one of these."""
    assert not {"on_train_batch_end", "on_batch_end"} & set(vars(RuleAudit))


def test_what_is_refused(audit: RuleAuditCallback, monkeypatch: pytest.MonkeyPatch) -> None:
    model = keras.Sequential([keras.layers.Input(X.shape[1:]), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    with pytest.raises(TracingError, match="No router was found"):
        model.fit(X, X[:, :3], callbacks=[RuleAudit(audit)], **FIT)
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(MetricsError, match="Set KERAS_BACKEND=jax, and no KERAS_NNX_ENABLED, before keras"):
        RuleAudit(audit)
