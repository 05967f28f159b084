"""Run by test_processes.py as each of several processes: a small Mixture of Experts trains and is audited.

python training_process.py CASES PROCESS COUNT PORT FOLDER       # prints JSON: case -> what it came to
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from moe_rules_callback import RuleAuditCallback, callback, hookimpl

BATCH, WIDTH, EXPERTS, STEPS, FLUSH = 16, 8, 4, 12, 4
SIGNALS = ("load_gini", "router_mutual_information", "expert_coactivation")
OF_ROUTERS = {
    "sure": "0.85 :: high_routing_confidence & low_router_entropy",
    "uneven": "always[2](high_load_cv) | decreasing_loss",
}
RULES = OF_ROUTERS | {"growing": "increasing_weight_norm -> low_gradient_norm"}
QUICK = {"r": "low_router_entropy"}
EVENTS = ("on_train_start", "on_step", "on_records", "on_train_end")


class Trainer:
    """Data-parallel over all devices of all processes: the batch is sharded, parameters are replicated."""

    def __init__(self) -> None:
        mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
        self.whole, self.tokens = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self._step = jax.jit(self._trained, out_shardings=(self.whole, None))

    def metrics(self) -> Iterator[dict[str, Any]]:
        """Trains; gives what each step hands over."""
        params = self._parameters()
        for step in range(STEPS):
            params, metrics = self._step(params, self.batch(step))
            yield metrics
            jax.block_until_ready(params)  # processes that run ahead of each other can hang jax

    def states(self, audit: RuleAuditCallback) -> Iterator[Any]:
        """Trains with the audit inside the step; gives its states."""

        def audited(params: Any, state: Any, x: jax.Array) -> Any:
            params, metrics = self._trained(params, x)
            return params, audit.update(state, metrics)

        step = jax.jit(audited, donate_argnums=1, out_shardings=self.whole)
        params, shapes = self._parameters(), jax.eval_shape(self._step, self._parameters(), self.batch(0))[1]
        state = jax.jit(lambda state: state, out_shardings=self.whole)(audit.init(shapes))
        for number in range(STEPS):
            params, state = step(params, state, self.batch(number))
            yield state
            jax.block_until_ready(params)

    def watched(self, audit: RuleAuditCallback, what: str) -> Iterator[dict[str, Any]]:
        """Trains with a watched loss, or a step that is watched from outside; gives the scalars of each."""
        if what == "step":
            step = audit.watch(self._step)
        else:
            loss = audit.watch(lambda params, x: self.loss(params, x)[0])

            def trained(params: Any, x: jax.Array) -> tuple[Any, dict[str, Any]]:
                value, grads = jax.value_and_grad(loss)(params, x)
                return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), {"loss": value}

            step = jax.jit(trained, out_shardings=self.whole)
        params = self._parameters()
        for number in range(STEPS):
            params, metrics = step(params, self.batch(number))
            yield {"loss": metrics["loss"]}
            jax.block_until_ready(params)

    def loss(self, params: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        probs = jax.nn.softmax(x @ params["router"])
        weights, index = jax.lax.top_k(probs, 2)
        out = jnp.einsum("tk,tkdf,td->tf", weights, params["experts"][index], x)
        return jnp.square(out - jnp.roll(x, 1, axis=1)).mean(), {"router_probs": probs, "expert_index": index}

    def _trained(self, params: Any, x: jax.Array) -> tuple[Any, dict[str, Any]]:
        (loss, routing), grads = jax.value_and_grad(self.loss, has_aux=True)(params, x)
        metrics = {"loss": loss, "params": params, "grads": grads} | routing
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, grads), metrics

    def batch(self, step: int) -> jax.Array:
        return self._placed(np.random.default_rng(step).normal(size=(BATCH, WIDTH)), self.tokens)

    def _parameters(self) -> dict[str, jax.Array]:
        rng = np.random.default_rng(0)
        shapes = {"router": (WIDTH, EXPERTS), "experts": (EXPERTS, WIDTH, WIDTH)}
        return {name: self._placed(rng.normal(size=shape), self.whole) for name, shape in shapes.items()}

    def _placed(self, x: np.ndarray, where: NamedSharding) -> jax.Array:
        x = x.astype(np.float32)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])


class Plugin:
    """Counts what it is told."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = dict.fromkeys(EVENTS, 0)

    def _count(self, event: str) -> None:
        self.counts[event] += 1

    @hookimpl
    def on_train_start(self) -> None:
        self._count("on_train_start")

    @hookimpl
    def on_step(self) -> None:
        self._count("on_step")

    @hookimpl
    def on_records(self) -> None:
        self._count("on_records")

    @hookimpl
    def on_train_end(self) -> None:
        self._count("on_train_end")


class Fails(Plugin):
    """Does something at one of its events on one of the processes."""

    def __init__(self, at: str, process: int, deed: Callable[[], Any]) -> None:
        super().__init__()
        self._at, self._process, self._deed = at, process, deed

    def _count(self, event: str) -> None:
        super()._count(event)
        if event == self._at and jax.process_index() == self._process:
            self._deed()


class Messages(logging.Handler):
    """Warnings and errors of the audit."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def digest(state: Any) -> str:
    """Of a state that is replicated, as this process holds it."""
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    held = [np.asarray(leaf.addressable_data(0)).tobytes() for leaf in jax.tree.leaves(state)]
    return hashlib.sha256(b"".join(held)).hexdigest()


def audited(rules: dict[str, str], logdir: Path, *plugins: Plugin) -> RuleAuditCallback:
    return RuleAuditCallback(rules, logdir=logdir, plugins=plugins, signals=SIGNALS, flush_every=FLUSH)


def beside(trainer: Trainer, audit: RuleAuditCallback) -> str:
    """Trains with the audit beside the step; gives a digest of its last state."""
    with audit:
        for metrics in trainer.metrics():
            audit.on_step(metrics)
        assert audit._outgoing is not None
        return digest(audit._outgoing.latest)


def inside(trainer: Trainer, audit: RuleAuditCallback) -> str:
    """The same with the audit inside the step."""
    with audit:
        for state in trainer.states(audit):
            audit.drain(state)
        assert audit._outgoing is not None
        return digest(audit._outgoing.latest)


def watching(trainer: Trainer, audit: RuleAuditCallback, what: str) -> str:
    """The same with the audit of a watched function; its state is each process's own."""
    with audit:
        for metrics in trainer.watched(audit, what):
            audit.on_step(metrics)
    return ""


def broken() -> None:
    raise ValueError("broken")


def simple(trainer: Trainer, logdir: Path, *plugins: Plugin) -> str:
    """Trains with an audit that is quickly compiled."""
    return beside(trainer, RuleAuditCallback(QUICK, logdir=logdir, plugins=plugins, flush_every=FLUSH))


def resumed(trainer: Trainer, logdir: Path, *plugins: Plugin) -> str:
    """Trains twice into one history, whose last step only process 0 can see."""
    for resume in (False, True):
        audit = RuleAuditCallback(QUICK, logdir=logdir, plugins=plugins, flush_every=FLUSH, resume=resume)
        state = beside(trainer, audit)
    return state


def no_directory(trainer: Trainer, logdir: Path, plugin: Plugin) -> str:
    """The log directory cannot be made, for a file is in the way."""
    logdir.parent.mkdir(exist_ok=True)
    logdir.touch()
    return simple(trainer, logdir / "below", plugin)


def hangs(trainer: Trainer, logdir: Path, plugin: Plugin) -> str:
    callback.PATIENCE = 2.0
    return simple(trainer, logdir, Fails("on_records", 0, threading.Event().wait), plugin)


CASES: dict[str, Callable[[Trainer, Path, Plugin], str]] = {
    "beside": lambda trainer, logdir, plugin: beside(trainer, audited(RULES, logdir, plugin)),
    "inside": lambda trainer, logdir, plugin: inside(trainer, audited(RULES, logdir, plugin)),
    "watched step": lambda trainer, *rest: watching(trainer, audited(OF_ROUTERS, *rest), "step"),
    "watched loss": lambda trainer, *rest: watching(trainer, audited(OF_ROUTERS, *rest), "loss"),
    "resumed": resumed,
    "records raise": lambda *given: simple(*given, Fails("on_records", 0, broken)),
    "step raises": lambda *given: simple(*given, Fails("on_step", 1, broken)),
    "start raises": lambda *given: simple(*given, Fails("on_train_start", 0, broken)),
    "no directory": no_directory,
    "hangs": hangs,  # comes last: neither may the thread that hangs keep the process from ending
}


def main(cases: str, process: str, count: str, port: str, folder: str) -> None:
    jax.distributed.initialize(f"localhost:{port}", int(count), int(process))
    assert jax.process_count() == jax.device_count() == int(count)
    told: dict[str, Any] = {}
    trainer, log = Trainer(), logging.getLogger("moe_rules_callback")
    for name in cases.split(","):
        log.addHandler(handler := Messages())
        plugin = Plugin()
        state = CASES[name](trainer, Path(folder) / name / process, plugin)  # each its own: who writes shows
        log.removeHandler(handler)
        told[name] = {"state": state, "plugin": plugin.counts, "messages": handler.messages}
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
