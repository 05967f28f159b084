"""Loops over one training step, bare, audited, and watched by others; see `step_cost`."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_rules_callback import RuleAuditCallback

from .rivals import Averages, Eager, scalars

WIDTH, K, BALLAST, FLUSH = 64, 2, 128, 64
PREDICATES = (  # over the signals of nano_moe, so that more rules read no more
    "high_routing_confidence", "low_routing_confidence", "low_activation_entropy", "high_expert_imbalance",
    "low_expert_imbalance", "increasing_weight_magnitude", "stable_loss", "decreasing_loss",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Routers of a model: their number, their experts, and the tokens that each sees in a step."""

    layers: int
    experts: int
    tokens: int

    @property
    def bytes(self) -> int:
        """Of what nano_moe reads: probabilities (float32), indices (int32), and parameters for their norm."""
        return 4 * self.layers * (self.tokens * (self.experts + K) + 2 * self.experts * WIDTH)


SIZES = {"1x8": Size(1, 8, 1024), "32x64": Size(32, 64, 64), "61x256": Size(61, 256, 64)}


def many(count: int) -> dict[str, str]:
    """So many rules over eight predicates, no two alike."""
    n, of = len(PREDICATES), PREDICATES
    return {
        f"rule_{i}": f"{0.6 + 0.39 * i / count:.4f} :: {of[i % n]} & ~{of[(i // n + i + 1) % n]}"
        f" | {1 + i / 100}*{of[(i + 3) % n]}"
        for i in range(count)
    }


def start(size: Size) -> dict[str, Any]:
    """What a step carries."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"router": (size.layers, WIDTH, size.experts), "experts": (size.layers, size.experts, WIDTH)}
    params = {
        name: 0.1 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=False)
    }
    return {"params": params, "ballast": 0.1 * jax.random.normal(keys[2], (BALLAST, BALLAST))}


def learn(state: dict[str, Any], x: jax.Array, work: jax.Array) -> tuple[Any, dict[str, Any]]:
    """A training step and its metrics; `work` matrix products make it longer."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        probs = jax.nn.softmax(jnp.einsum("td,lde->lte", x, params["router"]))
        gate, index = jax.lax.top_k(probs, K)
        weight = (jax.nn.one_hot(index, probs.shape[-1]) * gate[..., None]).sum(-2)
        y = jnp.einsum("lte,led->td", weight, params["experts"])
        return jnp.square(y - x).mean(), (probs, index)

    (loss, (probs, index)), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"])
    params = jax.tree.map(lambda p, g: p - 1e-3 * g, state["params"], grads)
    ballast = jax.lax.fori_loop(0, work, lambda _, b: jnp.tanh(b @ state["ballast"]), state["ballast"])
    metrics = {"loss": loss, "router_probs": probs, "expert_index": index, "params": params}
    return {**state, "params": params, "ballast": ballast}, metrics


class Bench:
    """The loops for routers of one size; `work` sets how long their steps are."""

    def __init__(self, size: Size, logdir: str | None) -> None:
        self.size, self.work = size, 0
        self._x = jax.random.normal(jax.random.key(1), (size.tokens, WIDTH))
        self._logdir, self._open = logdir, contextlib.ExitStack()
        self.loops: dict[str, Callable[[int], None]] = {"bare": self._bare(), "again": self._bare()}
        for name, rules in {"6": "nano_moe", "100": many(100)}.items():
            self.loops[f"inside {name}"] = self._inside(self._audit(rules))
        for name, rules in {"6": "nano_moe", "100": many(100)}.items():
            self.loops[f"beside {name}"] = self._beside(self._audit(rules))
        self.loops |= {
            "watched 6": self._watched(self._audit("nano_moe", None, K)),
            "device_get": self._device_get(),
            "clu": self._clu(),
            "eager": self._eager(),
        }

    def close(self) -> None:
        self._open.close()

    def _audit(self, rules: Any, layer_axis: int | None = 0, top_k: int | None = None) -> RuleAuditCallback:
        logdir = self._logdir and tempfile.mkdtemp(dir=self._logdir)
        audit = RuleAuditCallback(rules, logdir=logdir, flush_every=FLUSH, layer_axis=layer_axis, top_k=top_k)
        return self._open.enter_context(audit)

    def _loop(self, take: Callable[[Any, Any], Any], state: Any) -> Callable[[int], None]:
        holder = [state]

        def run(steps: int) -> None:
            work = np.int32(self.work)
            for _ in range(steps):
                holder[0] = take(holder[0], work)
            jax.block_until_ready(holder[0])

        return run

    def _bare(self) -> Callable[[int], None]:
        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, x: jax.Array, work: Any) -> Any:
            state, metrics = learn(state, x, work)
            return state, metrics["loss"]

        return self._loop(lambda state, work: step(state, self._x, work)[0], start(self.size))

    def _inside(self, audit: RuleAuditCallback) -> Callable[[int], None]:
        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, x: jax.Array, work: Any) -> Any:
            new, metrics = learn(state, x, work)
            return {**new, "audit": audit.update(state["audit"], metrics)}, metrics["loss"]

        def take(state: Any, work: Any) -> Any:
            state, _ = step(state, self._x, work)
            audit.drain(state["audit"])
            return state

        first = start(self.size)
        metrics = jax.eval_shape(learn, first, self._x, jnp.int32(0))[1]
        return self._loop(take, {**first, "audit": audit.init(metrics)})

    def _beside(self, audit: RuleAuditCallback) -> Callable[[int], None]:
        step = jax.jit(learn)  # its parameters are read beside it, so they cannot be donated

        def take(state: Any, work: Any) -> Any:
            state, metrics = step(state, self._x, work)
            audit.on_step(metrics)
            return state

        loop = self._loop(take, start(self.size))

        def run(steps: int) -> None:
            loop(steps)
            jax.block_until_ready(jax.tree.leaves(audit._outgoing and audit._outgoing.latest))

        return run

    def _watched(self, audit: RuleAuditCallback) -> Callable[[int], None]:
        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, x: jax.Array, work: Any) -> Any:
            state, metrics = learn(state, x, work)
            return state, metrics["loss"]

        watched = audit.watch(step)

        def take(state: Any, work: Any) -> Any:
            state, loss = watched(state, self._x, work)
            audit.on_step({"loss": loss})
            return state

        return self._loop(take, start(self.size))

    def _device_get(self) -> Callable[[int], None]:
        rows: list[Any] = []

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, x: jax.Array, work: Any) -> Any:
            state, metrics = learn(state, x, work)
            return state, scalars(metrics["loss"], metrics["router_probs"], metrics["params"])

        def take(state: Any, work: Any) -> Any:
            state, values = step(state, self._x, work)
            rows.append(jax.device_get(values))
            return state

        return self._loop(take, start(self.size))

    def _clu(self) -> Callable[[int], None]:
        rows: list[Any] = []

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state: Any, x: jax.Array, work: Any) -> Any:
            new, metrics = learn(state, x, work)
            values = scalars(metrics["loss"], metrics["router_probs"], metrics["params"])
            return {**new, "clu": state["clu"].merge(Averages.single_from_model_output(**values))}

        calls = [0]

        def take(state: Any, work: Any) -> Any:
            state = step(state, self._x, work)
            calls[0] += 1
            if calls[0] % FLUSH == 0:
                rows.append(state["clu"].compute())
                state = {**state, "clu": Averages.empty()}
            return state

        return self._loop(take, {**start(self.size), "clu": Averages.empty()})

    def _eager(self) -> Callable[[int], None]:
        step, monitor = jax.jit(learn), Eager()

        def take(state: Any, work: Any) -> Any:
            state, metrics = step(state, self._x, work)
            monitor(metrics["loss"], metrics["router_probs"], metrics["params"])
            return state

        return self._loop(take, start(self.size))
