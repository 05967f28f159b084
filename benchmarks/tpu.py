"""What the audit adds to a training step on TPUs, by what their compiler makes of it. No TPU is needed:

    pip install 'jax[tpu]==0.10.2'                   # brings the compiler, libtpu 0.0.42
    python -m benchmarks.tpu [--models nano wide] [--topologies v5e:2x2 v5p:2x2x1 v6e:2x2] [--check]

The reference trainer's step is compiled ahead of time for four chips that share each batch, bare and with
the audit inside; nothing is executed. `nano` is the trainer's default, `wide` has 32,768 tokens a step and
64 experts. The table has the bare step, for one chip, and what the audit adds to it:

    GFLOP         as XLA counts
    GB touched    operands and results of all instructions but copies
    GB accessed   as XLA counts, with copies between HBM and VMEM: these follow the schedule, which any change
                  of the program reshuffles by some per cent in either direction
    GB peak       arguments, results that are not donated, and temporaries: these follow the schedule too
    collectives   how many, and their bytes
    largest       bytes of the largest array among the exchanged ones that are the audit's
    donated       arrays of the state whose memory is used again, of all
    s             that the compiler took

With `--check` the exit status is 1 when an audit exceeds a bound.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moe_rules_callback import Audit
from moe_rules_callback.signals import ROUTER_SIGNALS
from reference.config import Config
from reference.learning import SCALARS, create, learn, make_step

from . import hlo

TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")
CHIPS, DOMAINS = 4, 3
MODELS = {
    "nano": Config(groups=CHIPS),
    "wide": Config(
        layers=4, width=512, heads=4, context=512, batch=64, experts=64, expert_width=512, groups=CHIPS
    ),
}
JUDGED = [name for name, signal in ROUTER_SIGNALS.items() if signal.ramps]
HUNDRED = {
    f"rule_{i}": f"always[8](high_{a} -> ~low_{b})"
    for i, (a, b) in enumerate(itertools.islice(itertools.combinations(JUDGED, 2), 100))
}
RULES: dict[str, Any] = {"nano_moe": "nano_moe", "router_health": "router_health", "100 rules": HUNDRED}

# What a step may grow by, as a share of the bare one: `nano` has next to no work beside the audit's.
BOUNDS = {
    "nano": {"flops": 0.01, "touched": 0.1, "accessed": 0.1, "peak": 1.0},
    "wide": {"flops": 0.001, "touched": 0.005, "accessed": 0.05, "peak": 0.05},
}
STATISTICS = 64 * 1024  # bytes: what the audit exchanges is as large as layers x experts, not as tokens


@dataclass(frozen=True)
class Program:
    """What is known of a compiled step."""

    flops: float
    touched: float  # bytes, as are the next two
    accessed: float
    peak: float
    collectives: Counter[str]  # by kind
    exchanged: Counter[str]  # arrays, as HLO writes them
    donated: int
    state: int
    seconds: float

    def growth(self, name: str, bare: Program) -> float:
        return getattr(self, name) / getattr(bare, name) - 1

    def largest(self, bare: Program) -> float:
        """Bytes of the largest array that this program exchanges and the bare one does not."""
        return max(map(hlo.bytes_of, self.exchanged - bare.exchanged), default=0)

    @property
    def exchanged_bytes(self) -> float:
        return sum(map(hlo.bytes_of, self.exchanged.elements()))


def compile_step(topology: str, config: Config, rules: Any = None) -> Program:
    """The step of `config` for four chips, with an audit of `rules` if there are any."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices).reshape(CHIPS), ("data",), axis_types=(AxisType.Auto,))
    everywhere, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    graphdefs = []

    def begin() -> Any:
        graphdef, state = create(config)
        graphdefs.append(graphdef)
        return state

    with mock.patch("jax.default_backend", return_value="tpu"):  # the model asks it what to compute in
        state = jax.eval_shape(begin)
    batch = (
        jax.ShapeDtypeStruct((config.batch, config.context + 1), np.int32, sharding=shared),
        jax.ShapeDtypeStruct((config.batch,), np.int32, sharding=shared),
    )
    audit = None
    if rules is not None:
        audit = Audit(rules, signals=SCALARS)
        look = functools.partial(learn, graphdef=graphdefs[0], config=config, domains=DOMAINS)
        _, metrics = jax.eval_shape(look, state, *batch)
        state["audit"] = jax.eval_shape(functools.partial(audit.init, metrics))
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), state)
    step = make_step(graphdefs[0], config, DOMAINS, audit)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=everywhere).lower(state, *batch)
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began

    cost, memory, text = compiled.cost_analysis() or {}, compiled.memory_analysis(), compiled.as_text() or ""
    assert memory is not None
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Program(
        cost["flops"],
        hlo.touched(text),
        cost["bytes accessed"],
        memory.argument_size_in_bytes + outputs + memory.temp_size_in_bytes,
        *hlo.collectives(text),
        hlo.aliases(text),
        len(jax.tree.leaves(state)),
        seconds,
    )


def excesses(audited: Program, bare: Program, bounds: dict[str, float]) -> list[str]:
    """In what a step with the audit goes beyond the bounds."""
    found = [
        f"{name} {growth:+.2%}, at most {bound:.2%}"
        for name, bound in bounds.items()
        if (growth := audited.growth(name, bare)) > bound
    ]
    if (largest := audited.largest(bare)) > STATISTICS:
        found.append(f"an array of {largest:,.0f} bytes is exchanged, at most {STATISTICS:,}")
    if audited.collectives["all-gather"] > bare.collectives["all-gather"]:
        found.append("an all-gather that the bare step lacks")
    if audited.donated < audited.state:
        found.append(f"{audited.donated} of {audited.state} arrays of the state are donated")
    return found


def line(title: str, program: Program, bare: Program | None = None) -> str:
    """A line of the table: a bare step, or what an audited one adds to it."""
    size, kinds = program.exchanged_bytes, program.collectives
    if bare is None:
        cells = [f"{getattr(program, name) / 1e9:,.3f}" for name in BOUNDS["nano"]]
        cells += [", ".join(f"{n} {kind}" for kind, n in kinds.items()), f"{size:,.0f}", ""]
    else:
        cells = [f"{program.growth(name, bare):+.3%}" for name in BOUNDS["nano"]]
        more, added = kinds.total() - bare.collectives.total(), size - bare.exchanged_bytes
        cells += [f"{more:+}", f"{added:+,.0f}", f"{program.largest(bare):,.0f}"]
    return (
        f"| {' | '.join([title, *cells, f'{program.donated}/{program.state}', f'{program.seconds:.0f}'])} |"
    )


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--check", action="store_true", help="exit status 1 when an audit exceeds a bound")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    # Several processes may load the compiler; it is not to ask the network what machine this is.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    os.environ.update(TPU_ACCELERATOR_TYPE="v5litepod-4", TPU_WORKER_HOSTNAMES="localhost")
    print(
        "| step | GFLOP | GB touched | GB accessed | GB peak | collectives | bytes | largest | donated | s |"
    )
    print("|---" + "|---:" * 9 + "|")
    failures = []
    for model, topology in itertools.product(options.models, options.topologies):
        bare = compile_step(topology, MODELS[model])
        print(line(f"**{model}, {topology}**", bare), flush=True)
        for name, rules in RULES.items():
            if rules is HUNDRED and (model, topology) != ("wide", TOPOLOGIES[0]):
                continue
            audited = compile_step(topology, MODELS[model], rules)
            print(line(f"+ {name}", audited, bare), flush=True)
            beyond = excesses(audited, bare, BOUNDS[model])
            failures += [f"{model}, {topology}, {name}: {what}" for what in beyond]
    if options.check and failures:
        sys.exit("\n".join(failures))


if __name__ == "__main__":
    main()
