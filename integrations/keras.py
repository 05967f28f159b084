# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Rules over the routers of a Keras model on JAX while `fit` trains it, without a change to the model.

    audit = RuleAuditCallback("router_health", logdir="runs/demo")
    model.fit(x, y, callbacks=[RuleAudit(audit)])

Routers are found in `train_step`, the model's own or yours, and named by the path of their kernel:
`moe/router/kernel`. Every batch makes one row; `evaluate`, `predict` and validation make none. `fit`
waits for nothing, and Keras calls its callbacks off the training thread as it does without this one.

A row's `loss` is that of its batch: Keras logs the mean since the epoch began, which jumps when the next one
begins. Other logs come as Keras has them. With `steps_per_execution` above 1 Keras returns those of the last
batch only: for the others they are NaN.

What the rules remember is saved with the weights, in `.weights.h5` and `.keras` files, and comes back with
them. Under `BackupAndRestore` a run that is started again goes on by itself; from other files, of
`ModelCheckpoint` or your own, so:

    callback = RuleAudit(RuleAuditCallback("router_health", logdir="runs/demo", resume=True))
    callback.set_model(model)
    model.optimizer.build(model.trainable_variables)
    model.load_weights("checkpoint.weights.h5")  # also in the middle of a run, to roll it back
    model.fit(x, y, initial_epoch=3, epochs=10, callbacks=[callback])

Rules that have changed begin anew.

Rows are then those of an unbroken run, to the bit, where the training is. Keras saves neither the seeds of
layers such as `Dropout` nor NumPy's generator, with which it shuffles arrays, and it begins an epoch anew
that it was in the middle of. Its `OrbaxCheckpoint` saves variables alone: save `audit.state` beside it, and
hand it to `audit.restore`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import keras

from moe_rules_callback.errors import MetricsError
from moe_rules_callback.metrics import scalars

from ._remembered import named, nested

if TYPE_CHECKING:
    from moe_rules_callback import RuleAuditCallback
    from moe_rules_callback.tracing.routers import Choice

LOSS = "loss of the batch"  # under this key the training step hands it over, and nobody else sees it


class RuleAudit(keras.callbacks.Callback):
    """For `Model.fit(callbacks=[RuleAudit(audit)])`.

    After `fit` all rows are in `audit.history`, and `audit` stays open: keep this object and pass it to a
    further `fit`, which goes on with them.

    Args:
        audit: what evaluates the rules.
        routers: as for `RuleAuditCallback.watch`.

    Raises:
        MetricsError: Keras does not run on JAX, or keeps its variables in Flax NNX; `audit` has other
            sources of metrics.
        TracingError: by `fit`: no router is found.
    """

    def __init__(self, audit: RuleAuditCallback, *, routers: Choice = None) -> None:
        super().__init__()
        if keras.backend.backend() != "jax" or keras.config.is_nnx_enabled():
            raise MetricsError(
                "Keras runs on another backend than JAX, or on JAX with its variables in Flax NNX. Set "
                "KERAS_BACKEND=jax, and no KERAS_NNX_ENABLED, before keras is imported."
            )
        self._audit = audit
        self._watched = audit.watch(self._train_step, routers=routers)
        self._plain: Callable[..., Any] | None = None  # the model's train_function, and what stands for it
        self._audited: Callable[..., Any] | None = None
        self._begun = False
        self._remembered = _Remembered(audit)

    def set_model(self, model: Any) -> None:
        """Let the model's files hold what the rules remember."""
        super().set_model(model)
        model.rule_audit = self._remembered

    def on_train_begin(self, logs: Any = None) -> None:
        """Give the model a training function that is audited."""
        model: Any = self.model
        if model.train_function is not self._audited:  # else `fit` was interrupted
            if model.train_function is not self._plain:  # else its compiled function serves again
                self._plain, self._audited = model.train_function, self._function(model)
            model.train_function = self._audited

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """The next call of the training function belongs to this `fit`."""
        self._begun = True

    def on_train_end(self, logs: Any = None) -> None:
        """Give the model its own function back, and bring all rows to the sinks."""
        self.model.train_function = self._plain
        self._audit.flush()

    def _function(self, model: Any) -> Callable[..., Any]:
        """A new `model.train_function`."""
        plain = model.train_function
        trainable, frozen = _names(model.trainable_variables), _names(model.non_trainable_variables)

        def train_step(state: Any, data: Any) -> Any:
            named = dict(zip(trainable, state[0], strict=True)), dict(zip(frozen, state[1], strict=True))
            return self._watched(*named, state[2:], data)

        # Keras reads these attributes, so that it compiles and shards the step in its own way.
        model.train_step = train_step
        model.make_train_function(force=True)
        del model.train_step
        compiled, model.train_function = model.train_function, plain

        def train_function(state: Any, batches: Iterable[Any]) -> Any:
            if not self._begun:  # by `train_on_batch`, or after a `fit` that was interrupted
                return plain(state, batches)
            self._begun = False
            self._remembered.restore()
            counted = _Counted(batches)
            logs, state = compiled(state, counted)
            loss = {"loss": logs.pop(LOSS)} if LOSS in logs else {}
            last = scalars(logs) | loss
            for _ in range(counted.number - 1):
                self._audit.on_step(dict.fromkeys(last, math.nan))
            self._audit.on_step(last)
            return logs, state

        return train_function

    def _train_step(self, trainable: Any, frozen: Any, rest: Any, data: Any) -> Any:
        """The model's own step, of variables by name; it also returns the loss of the batch."""
        model: Any = self._model
        ordered = (
            [trainable[name] for name in _names(model.trainable_variables)],
            [frozen[name] for name in _names(model.non_trainable_variables)],
        )
        logs, state = model.train_step((*ordered, *rest), data)
        return {**logs, **_loss_of_batch(model, rest[-1], state[-1])}, state


class _Remembered(keras.Operation):
    """The audit's state, for Keras to find among the model's attributes and save with its weights."""

    def __init__(self, audit: RuleAuditCallback) -> None:
        super().__init__(name="rule_audit")
        self._audit = audit
        self._loaded: dict[str, Any] | None = None

    def save_own_variables(self, store: Any) -> None:
        """One entry for each array: `0002.recent.0`. Files give them back sorted by name."""
        state = self._audit.state if self._loaded is None else self._loaded
        for i, (name, array) in enumerate(named(state or {}).items()):
            store[f"{i:04}.{name}"] = array

    def load_own_variables(self, store: Any) -> None:
        """Only put aside: the weights may have come to be used, by a model whose audit is over."""
        loaded = nested((key.partition(".")[2], store[key]) for key in sorted(store.keys()))
        self._loaded = loaded or None

    def restore(self) -> None:
        """Go on from what was loaded since the last step."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._audit.restore(loaded)


class _Counted(Iterator[Any]):
    """An iterator that knows how many items it has given."""

    def __init__(self, items: Iterable[Any]) -> None:
        self._items, self.number = iter(items), 0

    def __next__(self) -> Any:
        item = next(self._items)
        self.number += 1
        return item


def _names(variables: Iterable[Any]) -> list[str]:
    """Path of each variable, with its number behind it where several have the same."""
    paths = [variable.path for variable in variables]
    seen = Counter(paths)
    return [path if seen[path] == 1 else f"{path}.{i}" for i, path in enumerate(paths)]


def _loss_of_batch(model: Any, before: list[jax.Array], after: list[jax.Array]) -> dict[str, jax.Array]:
    """What a step has added to the mean that Keras logs as `loss`; nothing where a model keeps none."""
    numbers = {id(variable): i for i, variable in enumerate(model.metrics_variables)}
    for metric in model.metrics:
        if metric.name == "loss" and isinstance(metric, keras.metrics.Mean):
            total, count = (numbers[id(variable)] for variable in (metric.total, metric.count))
            return {LOSS: (after[total] - before[total]) / (after[count] - before[count])}
    return {}
