"""What the audit adds to a step, in microseconds, for short and long steps, few and many layers and rules.

    python -m benchmarks.step_cost [--rounds 15] [--bare 1 5 50] [--sizes 1x8 32x64 61x256] [--files]

A step routes tokens through all layers and multiplies matrices until it lasts as long as asked. Loops take
turns, so that a machine whose speed drifts slows all alike; each is timed until its work is done:

    bare        the step alone
    again       the step alone, for the noise of the machine
    inside      the audit rides in the step: six rules (nano_moe), and a hundred
    beside      the step returns what its routers did and `on_step` gets it; likewise
    watched     `audit.watch(step)`, and `on_step` gets the loss
    device_get, clu, eager: what people do without this package, see `rivals`

The floor is what must be read at least, probabilities and indices once, over the bandwidth of the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_rules_callback import RuleAuditCallback

from .rivals import Averages, Eager, scalars
from .turns import take_turns

WIDTH, K, BALLAST, FLUSH = 64, 2, 128, 64
TURN = 0.2  # seconds
PREDICATES = (
    "high_routing_confidence", "low_activation_entropy", "high_expert_imbalance", "stable_loss",
    "increasing_weight_magnitude", "high_load_cv", "low_routing_margin", "high_router_mutual_information",
)  # fmt: skip


@dataclass(frozen=True)
class Size:
    """Routers of a model: their number, their experts, and the tokens that each sees in a step."""

    layers: int
    experts: int
    tokens: int

    @property
    def bytes(self) -> int:
        """Of probabilities (float32) and indices (int32)."""
        return 4 * self.layers * self.tokens * (self.experts + K)


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
            jax.block_until_ready(jax.tree.leaves(audit._latest))

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


def seconds_a_step(run: Callable[[int], None], steps: int = 20) -> float:
    """The best of three turns."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run(steps)
        times.append((time.perf_counter() - began) / steps)
    return min(times)


def set_work(bench: Bench, seconds: float) -> None:
    """Choose `work` so that a bare step lasts as long as asked, or as little as it can."""
    run = bench.loops["bare"]
    bench.work = 0
    run(1)
    least = seconds_a_step(run)
    bench.work = 100
    unit = (seconds_a_step(run) - least) / 100
    bench.work = max(0, round((seconds - least) / unit))


def bandwidth() -> float:
    """Bytes a second that one program reads of an array of 256 MB."""
    array = jnp.ones((64, 2**20), jnp.float32)
    total = jax.jit(jnp.sum)
    total(array).block_until_ready()
    return array.nbytes / seconds_a_step(
        lambda n: [total(array).block_until_ready() for _ in range(n)][-1], 5
    )


def print_table(title: str, seconds: dict[str, np.ndarray]) -> None:
    """Added microseconds within each round, and the ratio to the bare step."""
    bare = seconds["bare"]
    print(f"\n{title}: bare {np.median(bare) * 1e3:.2f} ms")
    print(f"{'':12}{'added us: median':>18}{'quartiles':>18}{'ratio':>8}")
    for name, times in seconds.items():
        if name != "bare":
            low, mid, high = np.quantile((times - bare) * 1e6, [0.25, 0.5, 0.75])
            print(f"{name:12}{mid:18.0f}{f'{low:.0f} .. {high:.0f}':>18}{np.median(times / bare):8.3f}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each size and length of a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bare", type=float, nargs="+", default=[1, 5, 50], help="milliseconds")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="layers x experts")
    parser.add_argument("--loops", nargs="+", help="only these and the bare loop")
    parser.add_argument("--files", action="store_true", help="write TensorBoard files and histories too")
    options = parser.parse_args(arguments)
    logging.getLogger("moe_rules_callback").setLevel(logging.ERROR)  # alerts are not the point here
    rate = bandwidth()
    print(f"{jax.devices()[0].device_kind}, {rate / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as logdir:
        for name in options.sizes:
            size = SIZES[name]
            bench = Bench(size, logdir if options.files else None)
            for milliseconds in options.bare:
                set_work(bench, milliseconds / 1e3)
                steps = max(FLUSH, round(TURN / (milliseconds / 1e3)) // FLUSH * FLUSH)
                chosen = ["bare", *(options.loops or [n for n in bench.loops if n != "bare"])]
                seconds = take_turns({n: bench.loops[n] for n in chosen}, options.rounds, steps)
                title = f"{size.layers} layers, {size.experts} experts, {size.tokens} tokens"
                print_table(f"{title}, floor {size.bytes / rate * 1e6:.0f} us", seconds)
            bench.close()


if __name__ == "__main__":
    main()
