"""RuleAuditCallback: the one object that a trainer holds.

    with RuleAuditCallback(rules, logdir="runs/demo") as audit:
        for x, y in batches:
            loss, router_probs = train_step(model, optimizer, x, y)
            audit.on_step({"loss": loss, "router_probs": router_probs})

    audit.history                      # an xarray.Dataset

Beside the step, `on_step` is one asynchronous dispatch. Inside the step, carry `audit.init(metrics)` and
`audit.update(state, metrics)` in the jitted function and call `audit.drain(state)` in the loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, SupportsIndex

import jax
import jax.numpy as jnp

from .actions import agreement
from .actions.action import Action, bound
from .at_exit import close_at_exit, hold, hurry, patience, release
from .audit import Audit
from .beside import Beside, Step
from .errors import HistoryError, MetricsError
from .events import Events
from .hookspecs import hookimpl
from .outgoing import Outgoing
from .paths import AnyPath, as_path
from .plugins import get_plugin_manager
from .records import Run
from .rulebook import Source
from .sinks import make_sink
from .sinks.memory import MemorySink
from .state import AuditState, step_of

if TYPE_CHECKING:
    import xarray as xr

    from .tracing.routers import Choice
    from .watched import Watched

log = logging.getLogger("moe_rules_callback")
PATIENCE = 60.0  # seconds that flush and close wait for the device and the sinks


class RuleAuditCallback:
    """Evaluates rules over a router while it trains, and keeps, shows and logs what they say.

    Args:
        rules, top_k, layer_axis, signals, max_experts, every_n: see `Audit`.
        logdir: where TensorBoard files and the history go, a folder or a URL such as gs://bucket/runs/demo;
            None: the history stays in memory.
        sinks: "tensorboard", "zarr", "console", objects with the hooks of a sink, or CLU metric writers.
            None: TensorBoard and zarr if there is a logdir.
        plugins: objects with any other hooks (see `hookspecs`).
        actions: what is to be done when rules fire (see `actions`), with `dry_run=False`.
        dry_run: whether each action only says in the log, once, what it would have done.
        flush_every: rows that are brought to the host together. A row is shown after so many steps, or
            after 10 seconds.
        resume: continue the history that stands in `logdir`.
        config: whatever should be kept beside the history (JSON values).

    Raises:
        RuleSyntaxError, RulebookError, UnknownNameError: the rules cannot be read.
        PluginError: plugins contradict each other, or something is no action.
        HistoryError: the package that reaches the URL is not installed.
    """

    def __init__(
        self,
        rules: Source = None,
        *,
        logdir: str | AnyPath | None = None,
        sinks: Iterable[Any] | None = None,
        plugins: Iterable[Any] = (),
        actions: Iterable[Action] = (),
        dry_run: bool = True,
        flush_every: int = 64,
        resume: bool = False,
        top_k: int | None = None,
        layer_axis: int | None = None,
        signals: Sequence[str] | str = (),
        max_experts: int = 256,
        every_n: int = 1,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if flush_every < 1:
            raise ValueError(f"flush_every is {flush_every}; it counts rows and must be at least 1.")
        self._logdir = None if logdir is None else as_path(logdir)
        if sinks is None:
            sinks = ("zarr", "tensorboard") if logdir is not None else ()
        made = [make_sink(sink) for sink in ([sinks] if isinstance(sinks, str) else sinks)]
        # The history is read back from a zarr sink if there is one, so that memory does not grow.
        self._store: Any = next((sink for sink in made if _is_store(sink)), None) or MemorySink()
        if self._store not in made:
            made.append(self._store)
        self._actions, self._requests = bound(actions, flush_every, dry_run)
        self._manager = get_plugin_manager([*made, *self._actions, *plugins])
        self.audit = Audit(
            rules, top_k=top_k, layer_axis=layer_axis, signals=signals, max_experts=max_experts,
            rows=2 * flush_every, every_n=every_n, plugin_manager=self._manager,
        )  # fmt: skip
        self._events = Events(self._manager)
        self._flush_every, self._resume, self._config = flush_every, resume, dict(config or {})
        self._beside: Beside | None = None
        self._watched: Watched | None = None
        self._restored: Any = None  # a state that waits for the first step
        self._outgoing: Outgoing | None = None  # from the first step on
        self._taking = threading.Lock()  # a state is donated to the next step, whoever takes it
        self._closed = False
        self._resumed_key = agreement.new_key("resumed")
        close_at_exit(self)

    # Beside the step.

    def on_step(self, metrics: Mapping[str, Any], step: SupportsIndex | None = None) -> None:
        """Take in the metrics of a training step. Does not wait for the device.

        Args:
            metrics: `loss`, `router_probs` [.., tokens, experts] or `router_logits`, `expert_index`,
                `token_mask`, or only `expert_load` [experts], `params`, `grads` and any scalars; on any
                device, sharded, or NumPy.
            step: its number, at least 0; None: one more than the last, also of a run that is resumed.

        Raises:
            UnknownNameError, MissingSignalError, MetricsError: at the first step, if a rule cannot be
                evaluated on these metrics; later, if their layout changes.
        """
        self._check_open()
        if self._watched is None:
            self._take([(metrics, step)])
        else:
            self._watched.hook(metrics, step)
        self._events.step(metrics=metrics, step=step)
        if self._requests.possible:
            self._requests.step()

    @hookimpl(specname="on_step")
    def step_event(self, metrics: Mapping[str, Any], step: int | None) -> None:
        """`on_step` for a plugin manager, which passes nothing to an argument with a default."""
        self.on_step(metrics, step)

    @hookimpl(specname="on_train_end")
    def end_event(self) -> None:
        """`close` for a plugin manager."""
        self.close()

    # Inside somebody else's step.

    def watch(
        self, fn: Callable[..., Any], *, routers: Choice = None, forwards_per_step: int = 1
    ) -> Callable[..., Any]:
        """The function with the same results, whose routers are audited while it is trained.

            loss_fn = audit.watch(loss_fn)                    # before jit and value_and_grad
            ..                                                # after each step, if the trainer has a hook:
            audit.on_step({"loss": loss})

        Statistics of a few numbers for each layer leave the device on their own; nobody waits for them. A
        forward counts when it is differentiated, once: evaluation does not, nor what `jax.checkpoint`
        repeats. A function that differentiates inside, a whole training step, counts in every call, and
        scans in it over micro-batches are averaged. Under vmap and inside a shard_map of the trainer's own
        each member and each device is a forward, and devices that share tokens count them each;
        `audit.watch(jax.jit(step))` around the shard_map counts every token once. Forward-mode derivatives
        of a watched loss (`jax.jvp`, `jax.jacfwd`) are refused by JAX; those of its gradient are not.

        The n-th call of `on_step` belongs to the n-th row and brings its scalars; if it is not called, rows
        are without them. After the first, rows are audited in blocks of 16, or of `flush_every` if that is
        less; none waits for its block longer than two seconds. Statistics are of the tapped probabilities, so
        experts count as used when they are the k most probable ones: a bias or noise of the selection is not
        seen.

        Where the loop calls a jitted step, watching that from outside, `step = audit.watch(jax.jit(step))`,
        costs less than watching the loss in it: statistics are further results then, and the device need
        not call the host.

        Args:
            fn: the loss that is differentiated, or the training step.
            routers: None for all that are found, or a choice of them, see `tracing.tap`.
            forwards_per_step: differentiated forwards of an optimizer step: micro-batches that are
                accumulated. They are averaged, weighted by their tokens, and make one row.

        Raises:
            MetricsError: this callback watches a function, or was given router metrics, before.
            TracingError: when the function is traced: no router is found, or one is out of reach.
        """
        from .tracing.watch import watch
        from .watched import BLOCK, Watched

        self._check_open()
        if forwards_per_step < 1:
            raise ValueError(f"forwards_per_step is {forwards_per_step}; it counts forwards: 1, 2, ..")
        if self._watched is not None or self._outgoing is not None:
            raise MetricsError(
                "this callback has its router metrics from elsewhere, another watched function or on_step. "
                "Make a callback for each function that is watched, and wrap it before the first step."
            )
        self._watched = Watched(
            forwards_per_step, self._take, min(BLOCK, self._flush_every), kept=self._writes
        )
        audit = self.audit
        return watch(
            fn, ask=audit.statistics, deliver=self._watched.deliver, top_k=audit.top_k, routers=routers
        )

    # Inside the step.

    def init(self, metrics: Mapping[str, Any]) -> AuditState:
        """State before the first step, see `Audit.init`."""
        return replace(self.audit.init(metrics), step=jnp.int32(self._step_before()))

    def update(self, state: AuditState, metrics: Mapping[str, Any], step: Any = None) -> AuditState:
        """Take in one step; pure, see `Audit.update`."""
        return self.audit.update(state, metrics, step)

    def drain(self, tree: Any) -> None:
        """Beside a loop that carries the state inside the step: now and then read its finished rows.

        Args:
            tree: the `AuditState`, or any pytree that holds one, such as an optimizer's state. Call this
                after every step, before the tree is donated to the next one.

        Raises:
            MetricsError: there is no `AuditState` in the tree.
        """
        outgoing = self._outgoing
        if outgoing is None or self._closed:
            self._check_open()
            outgoing = self._begin()
        outgoing.drain(tree)
        if self._requests.possible:
            self._requests.step()

    # Checkpoints.

    @property
    def state(self) -> AuditState | None:
        """What the audit remembers beside the step or watched, for the trainer's checkpoint: a copy, which no
        later step donates. None before the first step, and where the state is carried inside the step: there
        it is saved with what carries it.

        It holds the last `2 * flush_every` rows: with the book `router_health`, 80 kB for 2 layers of 8
        experts, 5 MB for 48 of 128.

        Waits for the forwards of a watched function; of several processes, process 0 alone has its rows.
        """
        if self._watched is not None:
            self._settle(time.monotonic() + PATIENCE, patient=True)
        return None if self._beside is None else self._beside.copy()

    def restore(self, state: Any) -> None:
        """Go on from a state that was saved, in a new process (with `resume=True`) or in the middle of a run:
        the next step is the one after it, and rows from there on replace those that the history holds.

        Args:
            state: what `state` gave, or the nested mapping that Orbax makes of it where it is told no target.

        A state of other rules is of no use to these. Before the first step, when a run with changed rules
        begins, it is passed over with a warning, as the old history is; windows begin anew.

        Raises:
            HistoryError: after the first step, it is no state of this audit.
        """
        self._check_open()
        if self._beside is None:
            self._restored = state
        else:
            self._settle(time.monotonic() + PATIENCE)
            self._beside.restore(state)

    # Actions.

    @property
    def should_stop(self) -> bool:
        """Whether an action asks to end training; stays True.

        With several processes it changes on all of them at the same call of `on_step` or `drain`, one of
        every `flush_every`: look at it on all of them, at the same place in the loop.
        """
        return self._requests.stop

    @property
    def should_checkpoint(self) -> bool:
        """Whether an action asks for a checkpoint: from then until the first step after this was read.

        With several processes as `should_stop`.
        """
        return self._requests.checkpoint

    # Results.

    @property
    def history(self) -> xr.Dataset:
        """All rows so far. Waits until they are written; a plugin finds in it what it has been told of.

        Raises:
            HistoryError: no step has been taken, or this process is not the one that writes.
        """
        own = self._events.on_own_thread
        if self._watched is not None and not (self._closed or own):
            self.flush()
        if self._outgoing is None:
            raise HistoryError("there is no history yet: no step has been taken.")
        if jax.process_index():
            raise HistoryError("only process 0 writes the history; read it there, or open its logdir.")
        if own:
            self._events.wait_for(self._store, time.monotonic() + PATIENCE)
        elif not self._closed:
            self.flush()
        if isinstance(self._store, MemorySink):
            return self._store.dataset(self._outgoing.run)
        if self._store.path is None:
            raise HistoryError("there is no history: the zarr sink could not be started, the log says why.")
        from .history import open_history

        return open_history(self._store.path)

    @property
    def path(self) -> AnyPath | None:
        """The zarr store of the history, a Path or for a URL a UPath; None while there is none."""
        if isinstance(self._store, MemorySink):
            return None
        if self._store.path is None and not self._closed:
            self._events.wait_for(self._store, time.monotonic() + PATIENCE)
        return self._store.path

    def flush(self) -> None:
        """Bring all rows to the sinks now and wait for them, up to a minute; the log says what is missing.

        Raises:
            HistoryError: called by a plugin on its own thread, for which it would wait.
        """
        self._check_thread()
        deadline = time.monotonic() + PATIENCE
        self._settle(deadline)
        if self._watched is not None:
            self._watched.check()
        if self._outgoing is not None:
            self._outgoing.wait(deadline)
            self._events.wait(deadline)

    def close(self) -> None:
        """Write what is left and close the sinks, within a minute, or 20 seconds after SIGTERM. The log says
        what could not be written. Does nothing the second time.

        Raises:
            HistoryError: called by a plugin on its own thread, for which it would wait.
        """
        self._check_thread()
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + patience(PATIENCE)
        try:
            self._settle(deadline, ending=True)
            if self._outgoing is not None:
                self._outgoing.wait(deadline, ending=True)
        except BaseException as error:
            deadline = min(deadline, time.monotonic() + hurry(error))
            raise
        finally:
            if self._outgoing is not None:
                self._events.close(self._outgoing.run, deadline)
            release(self)

    def __enter__(self) -> RuleAuditCallback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Inner workings.

    @property
    def _writes(self) -> bool:
        return jax.process_index() == 0

    def _step_before(self) -> int:
        """The last step of the history that is resumed; -1 where none is."""
        if not self._resume or isinstance(self._store, MemorySink):
            return -1
        return agreement.of_first(self._resumed_key, lambda: self._store.last_step(self._logdir))

    def _check_open(self) -> None:
        if self._closed:
            raise HistoryError("this callback is closed: make a new one for another run.")

    def _check_thread(self) -> None:
        if self._events.on_own_thread:
            raise HistoryError(
                "flush and close wait until on_records and on_alert have returned, so a plugin cannot call "
                "them there. To stop training, set a flag that the loop looks at."
            )

    def _take(self, rows: Sequence[Step]) -> None:
        """Dispatch the audit of a step, or of a block of steps at once."""
        # NaN stands for what a step does not have, and numbers of the host are meant to be transferred.
        with self._taking, jax.debug_nans(False), jax.transfer_guard_host_to_device("allow"):
            if self._beside is None:
                beside = self._begun_beside(rows[0][0])
                self._begin()
                self._beside = beside
            assert self._outgoing is not None
            if not (due := self._beside.due(rows)):
                return
            state = self._beside.step(*due[0]) if len(due) == 1 else self._beside.block(due)
            self._outgoing.take(state, len(due))

    def _begun_beside(self, metrics: Mapping[str, Any]) -> Beside:
        """After the state that was restored, or the history that is resumed."""
        if (saved := self._restored) is None:
            return Beside(self.audit, metrics, self._step_before())
        beside = Beside(self.audit, metrics, step_of(saved))
        try:
            beside.restore(saved)
        except HistoryError as error:
            log.warning("%s This run begins so.", error)
        self._restored = None
        return beside

    def _begin(self) -> Outgoing:
        """Once the layout of the metrics is known."""
        run = Run(self.audit.schema, self._logdir, self._flush_every, self._resume, self._config)
        for action in self._actions:
            action.start(run)
        hold(self)
        self._outgoing = Outgoing(self.audit, run, self._events, self._store)
        return self._outgoing

    def _settle(self, deadline: float, ending: bool = False, patient: bool = False) -> None:
        """Send what has not been sent, from the thread that makes the rows."""
        if self._watched is None:
            self._send_rest()
        elif not self._watched.settle(self._send_rest, deadline, ending, patient):
            log.warning("the watched function's last rows were not made in time")

    def _send_rest(self) -> None:
        if self._outgoing is not None:
            self._outgoing.send_rest()


def _is_store(sink: Any) -> bool:
    """Whether a sink is a `ZarrSink`, without importing zarr to find out."""
    return any(base.__name__ == "ZarrSink" for base in type(sink).__mro__)
