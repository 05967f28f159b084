"""Finds the routers in a function that nobody changed.

    >>> print(discover_routers(loss, params, batch))
    ['layers']['router']['kernel']  8 experts, top 2, softmax, 12 layers
        top_k at model.py:41 (moe) chooses over the output of this matmul, and a gather dispatches by it
    not taken:
    ['head']['kernel']  argmax at train.py:20 (accuracy): compared with an argument, as an accuracy is

A router is a top_k, approx_top_k, argmax or sort over a short axis of floats, whose operand goes back to a
matmul with weights that have this axis, and whose outcome goes on to dispatch: a gather, scatter, ragged_dot,
switch or one-hot matmul. The path of the weights names it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from ..errors import TracingError, closest
from .arguments import Arguments
from .dispatch import Dispatch, is_random
from .flow import Flow, Value
from .logits import Chain, Span, Step, chain_of, operands_with
from .program import Program
from .walk import Path, enclosing, source_of, tag

MAX_EXPERTS = 1024  # the choice over a longer axis is one of a word

Choice = Callable[["Router"], bool] | Iterable[str] | None


@dataclass(frozen=True)
class Router:
    """A selection, taken for a router or not.

    Attributes:
        name: key path of the matmul's weights, `['layers'][0]['moe']['router']['kernel']`.
        taken: whether it is a router.
        reason: why, or why not.
        selection: the primitive that chooses.
        source: file, line and function of it.
        k: experts per token, or tokens per expert under expert choice; None where a sort does not tell.
        experts: number of experts.
        gate: "softmax" or "sigmoid" of the logits before the choice, "softmax after" it, or "none".
        noisy: random numbers are added to the logits.
        biased: a parameter is added to the scores after the gate, to balance the load.
        expert_choice: experts choose tokens.
        layers: lengths of the scans around it, outermost first: () for a router of one layer.
        kind: what a tap returns: "probabilities" (softmax), "scores" (sigmoid) or "logits" (without noise).
        tapped: the value that a tap returns, as a step of the chain from the selection to the matmul.
        logits: the logits, likewise.
        path, matmul: where the selection and the matmul stand.
    """

    name: str
    taken: bool
    reason: str
    selection: str
    source: str
    k: int | None
    experts: int
    gate: str = "none"
    noisy: bool = False
    biased: bool = False
    expert_choice: bool = False
    layers: tuple[int, ...] = ()
    kind: str = "logits"
    tapped: Step | None = field(default=None, repr=False)
    logits: Step | None = field(default=None, repr=False)
    path: Path = field(default=(), repr=False)
    matmul: Path = field(default=(), repr=False)

    def __str__(self) -> str:
        if not self.taken:
            return f"{self.name or '(no parameter)'}  {self.selection} at {self.source}: {self.reason}"
        traits = [f"{self.experts} experts", f"{'capacity' if self.expert_choice else 'top'} {self.k}", self.gate]
        traits += [t for t in ("noisy", "biased") if getattr(self, t)]
        traits += ["expert choice"] * self.expert_choice
        traits += [f"{math.prod(self.layers)} layers"] * bool(self.layers)
        return f"{self.name}  {', '.join(traits)}\n    {self.selection} at {self.source} {self.reason}"


class Discovery(Sequence[Router]):
    """The routers of a function, in the order in which they run.

    Attributes:
        rejected: selections that were not taken, each with its reason.
    """

    def __init__(self, candidates: Iterable[Router]) -> None:
        candidates = list(candidates)
        self._taken = [c for c in candidates if c.taken]
        self.rejected = [c for c in candidates if not c.taken]

    def __getitem__(self, index: Any) -> Any:
        return self._taken[index]

    def __len__(self) -> int:
        return len(self._taken)

    def __str__(self) -> str:
        lines = [str(router) for router in self._taken] or ["no router found"]
        return "\n".join([*lines, *["not taken:"] * bool(self.rejected), *map(str, self.rejected)])

    def chosen(self, choice: Choice) -> list[Router]:
        """The routers that the user wants.

        Args:
            choice: None for all that were taken; names, also of selections that were not; or a function of a
                `Router`, asked about each selection that goes back to a matmul.

        Raises:
            TracingError: there is none, or none of a given name.
        """
        known = [c for c in (*self._taken, *self.rejected) if c.tapped is not None]
        if choice is None:
            wanted = self._taken
        elif callable(choice):
            wanted = [c for c in known if choice(c)]
        else:
            by_name = {c.name: c for c in known}
            for name in choice:
                if name not in by_name:
                    raise TracingError(
                        f"No selection is fed by {name!r}.{closest(name, by_name)} What was found:\n{self}"
                    )
            wanted = [by_name[name] for name in choice]
        if not wanted:
            raise TracingError(
                "No router was found: no top_k, argmax or sort over the output of a matmul goes on to dispatch. "
                "Usual causes: the function does not run the model, or its router chooses in another way. "
                f"Choose by name with routers=[..] from what was found:\n{self}"
            )
        return wanted


def discover_routers(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Discovery:
    """The routing sites of a function; it is traced, not run.

    Args:
        fn: a forward pass, a loss or a whole training step.
        *args, **kwargs: its arguments; `jax.ShapeDtypeStruct` in the place of arrays will do.

    Returns:
        The routers, and what was not taken for one, with reasons; print it.
    """
    return discover(Program.of(fn, Arguments(fn, args, kwargs)))


def discover(program: Program) -> Discovery:
    """`discover_routers` on a program that was traced before."""
    flow = Flow(program.closed)
    found = [c for path, eqn in flow.equations.items() if (c := _candidate(flow, program, path, eqn))]
    return Discovery(_numbered(_merged(found)))


def _axis(eqn: JaxprEqn) -> int | None:
    """The axis that a selection of floats chooses over, or None for any other equation."""
    kind, aval = tag(eqn), eqn.invars[0].aval if eqn.invars else None
    if kind not in ("top_k", "approx_top_k", "argmax", "sort") or not jnp.issubdtype(aval.dtype, jnp.floating):
        return None
    if kind == "argmax":
        return eqn.params["axes"][0]
    key = {"top_k": "axis", "approx_top_k": "reduction_dimension", "sort": "dimension"}[kind]
    return eqn.params.get(key, -1) % len(aval.shape)


def _is_recomputed(flow: Flow, path: Path) -> bool:
    """Whether an equation belongs to a backward pass: a remat's second forward, or a transposition."""
    around = [flow.equations[p] for p in (*enclosing(path), path)]
    stacks = [str(eqn.source_info.name_stack) for eqn in around]
    return any("rematted_computation" in stack or "transpose(" in stack for stack in stacks)


def _candidate(flow: Flow, program: Program, path: Path, eqn: JaxprEqn) -> Router | None:
    axis = _axis(eqn)
    if axis is None or _is_recomputed(flow, path):
        return None
    operand = flow.operands(path)[0]
    if operand is None:
        return None
    size = operand.var.aval.shape[axis]
    # jax keeps no lines inside its own jitted functions (jnp.argsort): take those of the call.
    sources = (source_of(flow.equations[p]) for p in (path, *reversed([*enclosing(path)])))
    source = next(filter(None, sources), "?")
    base = Router("", False, "", tag(eqn), source, _k(flow, path, eqn, axis), size, path=path)
    chain = chain_of(flow, operand, axis)
    if chain is None:
        return replace(base, reason="no matmul has the axis that it chooses over among its outputs")
    weights, other = flow.parameter(chain.weights), flow.parameter(chain.other)
    by_expert = _is_expert_choice(flow, weights, other)
    if by_expert:
        weights = other
    if weights is None:
        return replace(base, reason="its scores are a product of two activations, not of a parameter")
    matmul = flow.equations[chain.matmul]
    span = chain.steps[-1].span
    if by_expert:
        span = _other_axes(matmul, span)
    experts = math.prod(matmul.outvars[0].aval.shape[slice(*span)])
    base = replace(
        base, name=_name(flow, program, weights, eqn), experts=experts, matmul=chain.matmul, expert_choice=by_expert
    )
    base = _described(flow, base, chain, span)
    if max(size, experts) > MAX_EXPERTS and not by_expert:
        return replace(base, reason=f"an axis of {size} is longer than any router's ({MAX_EXPERTS})")
    if experts < 2:
        return replace(base, reason="it chooses among tokens by a single output, not among experts")
    dispatch = Dispatch(flow, path, operand)
    if dispatch.found is None:
        seen = "; ".join(dispatch.seen) or "what it chooses reaches no gather, scatter or matmul"
        if any(is_random(flow, v) for v in _partners(flow, chain)):
            seen = "random numbers are added and nothing is dispatched, as in sampling"
        return replace(base, reason=seen)
    reason = f"chooses over the output of this matmul, and a {dispatch.found[0]} dispatches by it"
    return replace(base, taken=True, reason=reason)


def _is_expert_choice(flow: Flow, weights: Value | None, other: Value | None) -> bool:
    """Whether the chosen axis is that of the tokens: then the parameter is the matmul's other operand."""
    if other is None:
        return False
    return weights is None or (len(flow.uses[weights]) > 1 and len(flow.uses[other]) == 1)


def _other_axes(matmul: JaxprEqn, span: Span) -> Span:
    """The axes of a dot_general's result that come from the operand which does not have the axes `span`."""
    (contract, _), (batch, _) = matmul.params["dimension_numbers"]
    left = len(matmul.invars[0].aval.shape) - len(contract)
    return (left, len(matmul.outvars[0].aval.shape)) if span[1] <= left else (len(batch), left)


def _k(flow: Flow, path: Path, eqn: JaxprEqn, axis: int) -> int | None:
    if tag(eqn) != "sort":
        return 1 if tag(eqn) == "argmax" else eqn.params["k"]
    values = list(flow.results(path))
    for value in values:
        values += [v for v in flow.after[value] if v not in values]
        for use in flow.uses[value]:
            user = flow.equations[use.path]
            if tag(user) == "slice":
                start, limit = user.params["start_indices"][axis], user.params["limit_indices"][axis]
                if limit - start < value.var.aval.shape[axis]:
                    return limit - start
            elif tag(user) in ("rev", "convert_element_type"):
                values += flow.results(use.path)
    return None


def _name(flow: Flow, program: Program, weights: Value, eqn: JaxprEqn) -> str:
    if weights in flow.inputs:
        return program.names[flow.inputs[weights]]
    stack = str(eqn.source_info.name_stack)
    return f"{stack}/constant" if stack else "constant"


def _partners(flow: Flow, chain: Chain) -> Iterator[Value]:
    """What is added to the scores on their way to the selection."""
    along = {step.value for step in chain.steps}
    for step in chain.steps:
        if step.eqn is not None and tag(step.eqn) in ("add", "sub", "add_any"):
            operands = flow.operands(flow.made[step.value].path)
            yield from (v for v in operands if v is not None and v not in along)


def _described(flow: Flow, router: Router, chain: Chain, span: Span) -> Router:
    """Adds the gate, the layers and the value to tap."""
    steps = _respanned(flow, chain, span) if router.expert_choice else chain.steps
    kinds = [tag(step.eqn) if step.eqn is not None else "" for step in steps]  # selection first
    exp = next((i for i, kind in enumerate(kinds) if kind == "exp"), None)
    div = next((i for i in range(exp or 0) if kinds[i] == "div"), None)
    sigmoid = next((i for i, kind in enumerate(kinds) if kind == "logistic"), None)
    logits = _plain_logits(flow, steps)
    noisy = any(is_random(flow, v) for v in _partners(flow, chain))
    gate, kind, step = "none", "logits", logits
    if exp is not None and div is not None:
        # the last div before the exp on the way: a later one only normalises again
        div = max(i for i in range(exp) if kinds[i] == "div")
        gate, kind, step = "softmax", "probabilities", steps[div]
    elif sigmoid is not None:
        gate, kind, step = "sigmoid", "scores", steps[sigmoid]
    elif aside := _softmax_of(flow, logits):
        gate, kind, step = "softmax", "probabilities", aside
    elif _softmax_follows(flow, router.path):
        gate = "softmax after"
    gated = steps.index(step) if step in steps and gate != "none" else 0
    biased = any(
        step.eqn is not None
        and tag(step.eqn) == "add"
        and any(flow.parameter(v) for v in _others(flow, step, steps) if not is_random(flow, v))
        for step in steps[:gated]
    )
    frame = flow.lifted(step.value).frame
    scans = [flow.equations[p] for p in enclosing((*frame, 0)) if tag(flow.equations[p]) == "scan"]
    return replace(
        router,
        gate=gate,
        kind=kind,
        noisy=noisy,
        biased=biased,
        layers=tuple(eqn.params["length"] for eqn in scans),
        tapped=step,
        logits=logits,
    )


def _respanned(flow: Flow, chain: Chain, span: Span) -> list[Step]:
    """The chain's steps with the axes of the experts instead of those of the tokens, from the matmul on."""
    steps = [chain.steps[-1]._replace(span=span)]
    for step in reversed(chain.steps[:-1]):
        source, found = steps[-1], None
        if step.eqn is None:
            found = source.span
        else:
            use = flow.made[step.value]
            rank = len(step.value.var.aval.shape)
            for start in range(rank):
                for k, back in operands_with(step.eqn, use.index, (start, start + 1)):
                    if back == source.span and flow.operands(use.path)[k] == source.value:
                        found = (start, start + 1)
        if found is None:
            break
        steps.append(step._replace(span=found))
    return steps[::-1]


def _others(flow: Flow, step: Step, steps: list[Step]) -> Iterator[Value]:
    along = {s.value for s in steps}
    for value in flow.operands(flow.made[step.value].path):
        if value is not None and value not in along:
            yield value


def _plain_logits(flow: Flow, steps: list[Step]) -> Step:
    """The matmul's result with its bias, cast and scale, before noise, mask or gate."""
    best = steps[-1]
    for step in reversed(steps[:-1]):
        kind = tag(step.eqn) if step.eqn is not None else ""
        if kind in ("", "convert_element_type", "reshape", "transpose", "squeeze", "psum", "psum_invariant"):
            best = step
        elif kind in ("add", "mul", "div") and not any(
            is_random(flow, v) or not flow.parameter(v) for v in _others(flow, step, steps)
        ):
            best = step
        elif kind not in ("stop_gradient", "copy", "name", "sharding_constraint", "pvary", "neg"):
            break
    return best


def _softmax_of(flow: Flow, logits: Step) -> Step | None:
    """The softmax of the logits over the experts, where the model computes it beside the selection."""
    values, seen = [logits.value], set()
    while values and len(seen) < 60:
        value = values.pop(0)
        if value in seen or value.var.aval.shape != logits.value.var.aval.shape:
            continue
        seen.add(value)
        values += flow.after[value]
        for use in flow.uses[value]:
            eqn = flow.equations[use.path]
            kind = tag(eqn)
            if kind == "div" and use.index == 0:
                made = flow.maker(flow.origin(value))
                if made and tag(made[1]) == "exp":
                    return Step(flow.results(use.path)[0], logits.span, eqn)
            if kind in ("sub", "exp", "convert_element_type", "stop_gradient"):
                values += flow.results(use.path)
    return None


def _softmax_follows(flow: Flow, path: Path) -> bool:
    """Whether the chosen values, or scores gathered by the choice, are exponentiated."""
    values, seen = list(flow.results(path)), set()
    while values and len(seen) < 60:
        value = values.pop(0)
        if value in seen:
            continue
        seen.add(value)
        values += flow.after[value]
        for use in flow.uses[value]:
            kind = tag(flow.equations[use.path])
            if kind == "exp":
                return True
            if kind in ("sub", "reshape", "squeeze", "convert_element_type", "slice", "gather", "select_n", "lt", "add"):
                values += flow.results(use.path)
    return False


def _merged(found: list[Router]) -> list[Router]:
    """One router per matmul: GShard's two argmax are a top 2."""
    by_matmul: dict[Path, Router] = {}
    rest = []
    for router in found:
        first = by_matmul.get(router.matmul) if router.taken else None
        if not router.taken:
            rest.append(router)
        elif first is None:
            by_matmul[router.matmul] = router
        else:
            summed = (first.k or 0) + (router.k or 0) if router.selection == first.selection == "argmax" else router.k
            by_matmul[router.matmul] = replace(first, k=summed)
    order = [*by_matmul.values(), *rest]
    return sorted(order, key=lambda router: router.path)


def _numbered(found: list[Router]) -> Iterator[Router]:
    """Names made unique: a router that runs twice is `name` and `name#2`."""
    seen: Counter[str] = Counter()
    for router in sorted(found, key=lambda router: (not router.taken, router.path)):
        seen[router.name] += 1
        count = seen[router.name]
        yield replace(router, name=f"{router.name}#{count}") if router.name and count > 1 else router
