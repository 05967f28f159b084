"""What happens to a router's logits: the gate, noise, biases, and which value tells most about it.

softmax          probabilities, also where the model computes them beside the selection
sigmoid          scores
softmax after    logits: the model only normalises the chosen ones
none             logits
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from .dispatch import is_random
from .flow import Flow, Value
from .logits import Chain, Span, Step, operands_with
from .routers import Router
from .walk import Path, enclosing, shape_of, tag

_STILL_LOGITS = {
    *("", "convert_element_type", "reshape", "transpose", "squeeze", "psum", "psum_invariant", "copy"),
    *("name", "stop_gradient", "sharding_constraint", "reshard", "pvary", "pcast", "optimization_barrier"),
}
_STILL_CHOSEN = {
    *("sub", "reshape", "squeeze", "convert_element_type", "slice", "gather", "select_n", "lt", "add"),
    *("broadcast_in_dim", "neg"),
}


def described(flow: Flow, router: Router, chain: Chain, span: Span) -> Router:
    """Adds the gate, the layers and the value to tap."""
    steps = _respanned(flow, chain, span) if router.expert_choice else chain.steps
    kinds = [tag(step.eqn) if step.eqn is not None else "" for step in steps]  # selection first
    exp = kinds.index("exp") if "exp" in kinds else 0
    logits = _plain_logits(flow, steps)
    noisy = any(is_random(flow, v) for v in partners(flow, chain))
    gate, kind, step = "none", "logits", logits
    if "div" in kinds[:exp]:
        # The one that comes right after the exp: a further one only normalises what was left by a mask.
        div = max(i for i in range(exp) if kinds[i] == "div")
        gate, kind, step = "softmax", "probabilities", steps[div]
    elif "logistic" in kinds:
        gate, kind, step = "sigmoid", "scores", steps[kinds.index("logistic")]
    elif aside := _softmax_of(flow, logits):
        gate, kind, step = "softmax", "probabilities", aside
    elif _softmax_follows(flow, router.path):
        gate = "softmax after"
    after = steps[: steps.index(step if step in steps else logits)]
    biased = any(tag(s.eqn) == "add" and _adds_parameter(flow, s, steps) for s in after if s.eqn is not None)
    around = (flow.equations[p] for p in enclosing((*flow.lifted(step.value).frame, 0)))
    return replace(
        router,
        gate=gate,
        kind=kind,
        noisy=noisy,
        biased=biased,
        layers=tuple(eqn.params["length"] for eqn in around if tag(eqn) == "scan"),
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
            rank = len(shape_of(step.value.var))
            for start in range(rank):
                for k, back in operands_with(step.eqn, use.number, (start, start + 1)):
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


def _adds_parameter(flow: Flow, step: Step, steps: list[Step]) -> bool:
    """Whether everything else that goes into an addition (or a product) is a parameter or a constant."""
    return all(flow.parameter(v) and not is_random(flow, v) for v in _others(flow, step, steps))


def _plain_logits(flow: Flow, steps: list[Step]) -> Step:
    """The matmul's result with its bias, cast and scale, before noise, mask or gate.

    What is added is the layer's bias if the sum alone is used on; where the sum only serves to choose, it
    is a bias that balances the load.
    """
    best = steps[-1]
    for before, step in pairwise(reversed(steps)):
        kind = tag(step.eqn) if step.eqn is not None else ""
        if kind in ("add", "mul", "div"):
            alone = kind != "add" or len(flow.uses[before.value]) == 1
            if not alone or not _adds_parameter(flow, step, steps):
                break
        elif kind not in _STILL_LOGITS:
            break
        if step.value in flow.made:  # not the name that a body has for it
            best = step
    return best


def _softmax_of(flow: Flow, logits: Step) -> Step | None:
    """The softmax of the logits over the experts, where the model computes it beside the selection."""
    values, seen = [logits.value], set()
    while values and len(seen) < 60:
        value = values.pop(0)
        if value in seen or shape_of(value.var) != shape_of(logits.value.var):
            continue
        seen.add(value)
        values += flow.after[value]
        for use in flow.uses[value]:
            eqn = flow.equations[use.path]
            kind = tag(eqn)
            if kind == "div" and use.number == 0:
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
            if kind in _STILL_CHOSEN:
                values += flow.results(use.path)
    return False


def partners(flow: Flow, chain: Chain) -> Iterator[Value]:
    """What is added to the scores on their way to the selection."""
    along = {step.value for step in chain.steps}
    for step in chain.steps:
        if step.eqn is not None and tag(step.eqn) in ("add", "sub", "add_any"):
            operands = flow.operands(flow.made[step.value].path)
            yield from (v for v in operands if v is not None and v not in along)
