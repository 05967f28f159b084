"""Traces a function, asks what is in it, finds its routers, taps and changes them. No framework is needed.

    print(discover_routers(loss, params, batch))        # which routers are there?
    loss, probs = tap(loss_fn)(params, batch)           # what do they do?

    traced = trace(model.apply, params, x)
    find(traced, '//module_call[@features=10]')
    substitute(traced, '//pjit[@name="relu"]', jax.nn.gelu)(params, x)
    intervene(loss_fn, {"router/kernel": lambda logits: logits.at[:, 0].set(-1e9)})

A value is followed from the router's weights through the jaxpr, whatever the trainer wraps around it: jit,
scan, while, cond, remat, shard_map, grad, vmap.
"""

from __future__ import annotations

from .discovery import discover_routers
from .intervene import intervene
from .query import find
from .routers import Discovery, Router
from .substitute import substitute
from .tap import tap
from .tree import Node, Trace, trace

__all__ = [
    "Discovery",
    "Node",
    "Router",
    "Trace",
    "discover_routers",
    "find",
    "intervene",
    "substitute",
    "tap",
    "trace",
]
