"""The routers' statistics out of a function, beside its results: they leave the device by a callback.

    watched = watch(loss_fn, ask=audit.statistics, deliver=print)
    loss, grads = jax.jit(jax.value_and_grad(watched))(params, batch)      # the results that loss_fn has

What is delivered is small: for each layer the number of its tokens and means over them. It is computed
where the probabilities are, inside scans and remats, and the probabilities are dropped there.

Training is told from evaluation by the backward pass. The statistics wait in it as residuals do, and the
callback stands in its first equation, so it runs once for each forward that is differentiated: not for an
evaluation, and not a second time for a forward that `jax.checkpoint` repeats. A function that differentiates
inside, a whole training step, delivers in every call.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.custom_derivatives import SymbolicZero

from ..metrics import collect, natural, stacked_names
from ..statistics import summarise
from ..summaries import Summary
from .arguments import Arguments, is_array
from .discovery import differentiates, discover
from .evaluate import Evaluator
from .flow import Flow
from .program import Program
from .routers import Choice, Router
from .tap import Run, instrumented, tapping
from .walk import shape_of

PROBABILITIES, LOGITS = "router_probs", "router_logits"


class Reduced(NamedTuple):
    """What one router delivers, or several of one kind: an array float32 [repeats.., layers, blocks, 1 + n].

    Repeats are micro-batches, blocks the devices of a `shard_map`. In the last axis stand the number of
    tokens, then the statistics, raveled; all of them zero where a branch was not taken.

    Attributes:
        metric: what was tapped, "router_probs" or "router_logits".
        names: of the layers.
        experts, k: see `Routers`.
        repeats: number of leading axes that are no layers.
        shapes: (name, shape for one layer) of each statistic.
    """

    metric: str
    names: tuple[str, ...]
    experts: int
    k: int | None
    repeats: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def empty(self) -> Summary:
        """A summary without values."""
        return Summary(self.names, self.experts, self.k, np.zeros(len(self.names), np.float32), {})

    def totals(self, array: np.ndarray) -> np.ndarray:
        """float64 [layers, 1 + n]: tokens, and sums over them. To be added up over forwards."""
        width = array.shape[-1]
        x = array.astype(np.float64).reshape(
            math.prod(array.shape[: self.repeats]), len(self.names), array.shape[-2], width
        )
        count = x[..., :1]
        sums = np.where(count > 0, count * x[..., 1:], 0)  # means over no token are NaN
        return np.concatenate([count, sums], axis=-1).sum((0, 2))

    def summary(self, totals: np.ndarray) -> Summary:
        """Means from sums; NaN for a layer that saw no token."""
        count, sums = totals[:, 0], totals[:, 1:]
        means = np.where(count[:, None] > 0, sums / np.maximum(count[:, None], 1), np.nan).astype(np.float32)
        ends = np.cumsum([math.prod(shape) for _, shape in self.shapes])
        parts = np.split(means, ends[:-1], axis=1)
        values = {
            name: part.reshape(len(self.names), *shape)
            for (name, shape), part in zip(self.shapes, parts, strict=True)
        }
        return Summary(self.names, self.experts, self.k, count.astype(np.float32), values)


Ask = Callable[[dict[str, list[Summary]]], Sequence[str]]
Deliver = Callable[[Sequence[Reduced], Sequence[Any]], None]


def watch(
    fn: Callable[..., Any],
    *,
    ask: Ask,
    deliver: Deliver,
    top_k: int | None = None,
    routers: Choice = None,
) -> Callable[..., Any]:
    """The function itself, to the bit, whose routers' statistics are delivered on the side.

    Args:
        fn: a loss or a forward pass that somebody differentiates, or a whole training step.
        ask: called while tracing, with metrics that hold summaries without values: which statistics are
            wanted, see `statistics.STATISTICS`.
        deliver: called for each forward with what describes the arrays, and the arrays; on a thread of the
            runtime, so it should only hand them on.
        top_k: experts that a token uses; None: as many as the model selects.
        routers: as for `tap`.

    Raises:
        TracingError: when called, as for `tap`.
    """

    def prepare(program: Program) -> Run:
        chosen = sorted(discover(program).chosen(routers), key=lambda router: natural(router.name))
        reduced = _reduced(program, chosen, top_k, ask)
        changes = [(router, partial(_reduce, to=to)) for router, to in zip(chosen, reduced, strict=True)]
        evaluator = Evaluator(tapping(program, changes))
        names = [router.name for router in chosen]
        whole_step = differentiates(program)

        def run(arguments: Arguments) -> Any:
            result, taps = program.run(evaluator, arguments)
            arrays = [taps[name] for name in names]
            send = partial(_send, partial(deliver, _described(reduced, arrays)))
            together = _joined(reduced, arrays)
            if not whole_step:
                return _when_differentiated(result, together, send)
            send(together)
            return result

        return run

    return instrumented(fn, prepare, "watch")


def _reduced(program: Program, routers: Sequence[Router], top_k: int | None, ask: Ask) -> tuple[Reduced, ...]:
    """What each router is to deliver; asks which statistics."""
    flow = Flow(program.closed)
    found: list[Reduced] = []
    for router in routers:
        metric = LOGITS if router.kind == "logits" else PROBABILITIES
        layers = _layers(program, flow, router)
        names = stacked_names(router.name, math.prod(layers)) if layers else (router.name,)
        k = top_k or (None if router.expert_choice else router.k)
        repeats = len(router.layers) - len(layers)
        found.append(Reduced(metric, names, router.experts, k, repeats, ()))
    wanted = ask({metric_of(found): [each.empty for each in found]})
    return tuple(each._replace(shapes=_shapes(each, wanted)) for each in found)


def _groups(reduced: Sequence[Reduced], arrays: Sequence[jax.Array]) -> dict[Any, list[int]]:
    """Routers whose arrays can be one: callbacks and rows cost by the array, not by the layer."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, (each, x) in enumerate(zip(reduced, arrays, strict=True)):
        groups[each._replace(names=()), x.shape[: each.repeats], x.shape[-2:]].append(i)
    return groups


@partial(jax.jit, static_argnums=0)
def _joined(reduced: Sequence[Reduced], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """An array for each group of routers."""
    return [
        jnp.concatenate([arrays[i].reshape(*ahead, -1, *behind) for i in members], axis=kind.repeats)
        for (kind, ahead, behind), members in _groups(reduced, arrays).items()
    ]


def _described(reduced: Sequence[Reduced], arrays: Sequence[jax.Array]) -> list[Reduced]:
    """What describes those arrays."""
    return [
        kind._replace(names=tuple(itertools.chain(*(reduced[i].names for i in members))))
        for (kind, *_), members in _groups(reduced, arrays).items()
    ]


def metric_of(reduced: Sequence[Reduced]) -> str:
    """What statistics of all routers pass for: logits only if all are."""
    return LOGITS if all(each.metric == LOGITS for each in reduced) else PROBABILITIES


def _layers(program: Program, flow: Flow, router: Router) -> tuple[int, ...]:
    """Lengths of those scans around a router that run over layers: each turn has its part of the parameter.

    The others, outermost, run over micro-batches, in which the same parameter serves again and again.
    """
    name = re.sub(r"#\d+$", "", router.name)
    if name in program.names:
        size = program.arguments.arrays[program.names.index(name)].size
        eqn = flow.equations[router.matmul]
        (contracted, _), _ = eqn.params["dimension_numbers"]
        weights = router.experts * math.prod(shape_of(eqn.invars[0])[axis] for axis in contracted)
        for start in range(len(router.layers) + 1):
            if size == weights * math.prod(router.layers[start:]):
                return router.layers[start:]
    return router.layers


def _means(x: jax.Array, of: Reduced, wanted: Sequence[str]) -> Summary:
    (routers,) = collect({of.metric: x}, of.k, None)
    return summarise(routers, wanted)


def _shapes(of: Reduced, wanted: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    token = jax.ShapeDtypeStruct((1, of.experts), jnp.float32)
    values = jax.eval_shape(lambda x: _means(x, of, wanted).values, token)
    return tuple((name, values[name].shape[1:]) for name in wanted)


def _reduce(x: jax.Array, to: Reduced) -> jax.Array:
    """[tokens, experts] -> [1, 1 + n]; see `Reduced`."""
    # The trainer may have made its step strict about promotion; this is not its code.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        # Without gradients, so that nothing of it is kept for a backward pass.
        summary = _means(jax.lax.stop_gradient(x), to, [name for name, _ in to.shapes])
        parts = [summary.values[name].reshape(1, -1) for name, _ in to.shapes]
        return jnp.concatenate([summary.tokens[:, None], *parts], axis=1)


def _when_differentiated(result: Any, arrays: list[jax.Array], send: Callable[[list[Any]], None]) -> Any:
    """The result, marked so that its backward pass, and nothing else, sends the arrays."""
    leaves, tree = jax.tree.flatten(result)
    arrays_at = (i for i, leaf in enumerate(leaves) if is_array(leaf))
    floats = [i for i in arrays_at if jnp.issubdtype(leaves[i].dtype, jnp.inexact)]

    @jax.custom_vjp
    def marked(values: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
        return values

    def forward(values: list[Any], arrays: list[Any]) -> tuple[list[jax.Array], list[jax.Array]]:
        return [value.value for value in values], [array.value for array in arrays]

    def backward(arrays: list[jax.Array], cotangents: list[Any]) -> tuple[list[Any], None]:
        send(arrays)
        # What nobody differentiates stays out of the backward pass: a zero there may become NaN.
        return [None if isinstance(c, SymbolicZero) else c for c in cotangents], None

    marked.defvjp(forward, backward, symbolic_zeros=True)
    for i, value in zip(floats, marked([leaves[i] for i in floats], arrays), strict=True):
        leaves[i] = value
    return jax.tree.unflatten(tree, leaves)


def _send(deliver: Callable[[Sequence[Any]], None], arrays: Sequence[jax.Array]) -> None:
    if any(isinstance(array, Tracer) for array in arrays):
        # Copied: what a callback is given may lie in a buffer that is used again.
        jax.debug.callback(lambda *given: deliver([np.array(x) for x in given]), *arrays)
        return
    for array in arrays:  # outside of jit a callback would wait for the device
        array.copy_to_host_async()
    deliver(arrays)
