# pyright: reportMissingImports=false
"""A `fit` that is killed and goes on from Keras's own checkpoints leaves the history of one that was not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"

import pytest

pytest.importorskip("keras")

import keras
import numpy as np
from keras_moe import MoE, make_data, make_model
from moe_rules_callback.integrations.keras import RuleAudit
from resumed_trainer import assert_same_history, audited, replaced

from moe_rules_callback import RuleAuditCallback

X, Y = make_data()
BATCHES, EPOCHS, SAVED = 5, 8, 4  # SAVED epochs before the checkpoint that is restored
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}


class Killed(keras.callbacks.Callback):
    """In the second batch after the checkpoint, without the end of training."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.model.optimizer.iterations == SAVED * BATCHES + 2:
            raise KeyboardInterrupt


def model() -> Any:
    """Without dropout, whose seeds Keras does not save, and with an optimizer that is ready to be loaded."""
    model = make_model(keras.optimizers.Adam(0.05), dropout=0)
    model.optimizer.build(model.trainable_variables)
    return model


def saver(file: str, folder: Path) -> keras.callbacks.Callback:
    if file == "backup":
        return keras.callbacks.BackupAndRestore(folder / file)
    return keras.callbacks.ModelCheckpoint(folder / file, save_weights_only=file.endswith(".h5"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    logdir = tmp_path_factory.mktemp("unbroken")
    with audited(logdir) as audit:
        model().fit(X, Y, epochs=EPOCHS, callbacks=[RuleAudit(audit)], **FIT)
    return logdir


@pytest.mark.parametrize(
    ("file", "turn"), [("backup", 1), ("backup", -1), ("saved.weights.h5", 1), ("saved.keras", 1)]
)
def test_a_fit_that_is_killed_and_resumed(file: str, turn: int, unbroken: Path, tmp_path: Path) -> None:
    """In either order of the callbacks, since one of Keras loads when `fit` begins."""
    with audited(tmp_path / "killed") as audit:
        callbacks = [RuleAudit(audit), saver(file, tmp_path)][::turn]
        with pytest.raises(KeyboardInterrupt):
            model().fit(X, Y, epochs=EPOCHS, callbacks=[*callbacks, Killed()], **FIT)

    with audited(tmp_path / "killed", resume=True) as audit:
        callback, resumed, begun = RuleAudit(audit), model(), {}
        if file != "backup":
            callback.set_model(resumed)
            resumed.load_weights(tmp_path / file)
            begun = {"initial_epoch": SAVED}
        callbacks = [callback, saver(file, tmp_path)][::turn]
        fitted = resumed.fit(X, Y, epochs=EPOCHS, callbacks=callbacks, **begun, **FIT)
    assert fitted.epoch == list(range(SAVED, EPOCHS))
    assert_same_history(tmp_path / "killed", unbroken)


def test_a_fit_that_is_rolled_back(unbroken: Path, tmp_path: Path) -> None:
    trained, weights = model(), tmp_path / "saved.weights.h5"
    with audited(tmp_path / "back") as audit:
        callback = RuleAudit(audit)
        trained.fit(X, Y, epochs=SAVED, callbacks=[callback], **FIT)
        trained.save_weights(weights)
        trained.fit(-X, Y, epochs=EPOCHS, callbacks=[callback], **FIT)
        trained.load_weights(weights)
        trained.save_weights(weights)  # which has the state of the first time, not of the steps since
        trained.fit(X, Y, epochs=1, callbacks=[callback], **FIT)
        trained.load_weights(weights)
        trained.fit(X, Y, epochs=EPOCHS, initial_epoch=SAVED, callbacks=[callback], **FIT)
    assert_same_history(tmp_path / "back", unbroken)
    assert [(each["from_step"], each["rows"]) for each in replaced(tmp_path / "back")] == [(20, 40)]
    trained.load_weights(weights)  # when the audit is over


def test_weights_with_nothing_or_something_else_to_remember(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained, weights = model(), tmp_path / "saved.weights.h5"
    trained.save_weights(weights)
    with RuleAuditCallback({"r": "low_load_cv"}, top_k=2) as audit:
        callback = RuleAudit(audit)
        callback.set_model(trained)
        trained.load_weights(weights)
        trained.fit(X, Y, callbacks=[callback], **FIT)
        trained.load_weights(weights)
        trained.fit(X, Y, callbacks=[callback], **FIT)
        assert audit.history.step.values.tolist() == list(range(2 * BATCHES))
        trained.save_weights(weights)
    with audited(tmp_path / "other") as audit:
        callback = RuleAudit(audit)
        callback.set_model(trained)
        trained.load_weights(weights)
        trained.fit(X, Y, callbacks=[callback], **FIT)
        assert audit.history.step.values.tolist() == list(range(2 * BATCHES, 3 * BATCHES))
    assert "the state to restore is not one of this audit" in caplog.text
    model().load_weights(weights)  # where nobody audits


def test_a_saved_model_is_loaded_where_nobody_audits(tmp_path: Path) -> None:
    trained = model()
    with RuleAuditCallback({"r": "low_load_cv"}, top_k=2) as audit:
        trained.fit(X, Y, callbacks=[RuleAudit(audit)], **FIT)
        trained.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", custom_objects={"MoE": MoE})
    np.testing.assert_array_equal(loaded.predict(X, verbose=0), trained.predict(X, verbose=0))
