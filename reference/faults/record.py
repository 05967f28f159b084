"""Records the runs of the benchmark, one file each, so that rules can be judged by replay.

    record(select("tuning", "dead_expert*"), Path("runs/faults"))
    history = open_run(Path("runs/faults"), run)          # an xarray.Dataset, for replay_history

All signals that the audit knows are recorded, the trainer's scalars and those of a probe. Runs of one shape
share their compiled programs; what is recorded already, with the same configuration, is not recorded again.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from tqdm import tqdm

from moe_rules_callback import Audit
from moe_rules_callback.history import records_to_dataset
from moe_rules_callback.probes import ProbeState

from ..config import Config
from ..data import load_corpus
from ..learning import make_evaluation, make_step
from .injection import Injection, afflicted
from .learning import create, learn, make_probe
from .runs import RUNS, WARM, Run

RULES = {"imbalance": "0.9 :: high_load_cv"}  # somebody has to be judged; the replay brings its own
PROBED = 4  # sequences of the probe's batch


def select(split: str = "*", pattern: str = "*") -> list[Run]:
    """The runs of a split whose name matches a pattern of the shell."""
    return [run for run in RUNS if fnmatch(run.split, split) and fnmatch(run.name, pattern)]


def path_of(directory: Path, run: Run) -> Path:
    """Where a run is recorded."""
    return directory / run.split / f"{run.name}.nc"


def open_run(directory: Path, run: Run) -> xr.Dataset:
    """A recorded run, in memory."""
    return xr.load_dataset(path_of(directory, run), engine="scipy")


def record(runs: Iterable[Run], directory: Path, jobs: int = 1) -> None:
    """Record what is not recorded yet, with a progress bar; `jobs` processes share the work."""
    missing = [run for run in runs if not is_recorded(directory, run)]
    missing.sort(key=lambda run: repr(_shape(run)))  # stable; each program is compiled once
    one = functools.partial(_record_to, directory)
    with tqdm(total=len(missing), unit="run", disable=None) as bar:
        if jobs == 1:
            for run in missing:
                one(run)
                bar.update()
        else:
            with multiprocessing.get_context("spawn").Pool(jobs) as pool:
                for _ in pool.imap(one, missing):
                    bar.update()


def _shape(run: Run) -> Config:
    """What runs that share their programs have in common."""
    return replace(run.config, seed=0, fault="")


def _told(run: Run) -> dict[str, Any]:
    """What is kept beside the signals of a run."""
    return {**asdict(afflicted(run.config)), "split": run.split}


def is_recorded(directory: Path, run: Run) -> bool:
    """Whether a run is recorded, and with the configuration that it has in the table."""
    path = path_of(directory, run)
    if not path.exists():
        return False
    with xr.open_dataset(path, engine="scipy") as history:
        return _told(run).items() <= json.loads(history.attrs["config"]).items()


def _record_to(directory: Path, run: Run) -> None:
    if is_recorded(directory, run):
        return  # by another process in the meantime
    path = path_of(directory, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    record_run(run).to_netcdf(partial, engine="scipy")
    partial.replace(path)  # there whole, or not at all


def record_run(run: Run) -> xr.Dataset:
    """A run from beginning to end, as the history that its audit kept."""
    return _programs(_shape(run)).record(run)


@functools.lru_cache(maxsize=1)
def _programs(config: Config) -> Programs:
    return Programs(config)


class Programs:
    """What runs of one shape share: text, audit, probe, and the compiled step and evaluation."""

    def __init__(self, config: Config) -> None:
        self._corpus = load_corpus(config.dataset)
        domains = len(self._corpus.domains)
        graphdef, state = create(config)
        batch = self._corpus.batch(np.random.default_rng(0), config.batch, config.context, held_out=True)
        probe = make_probe(graphdef, config, batch[0][:PROBED, :-1], reference=state["learner"])
        advance = functools.partial(learn, probe=probe)
        # Until there is something to compare with, nothing is known of the reference.
        unknown = probe.init(state["learner"])
        self._probe = replace(unknown, reference=unknown.chosen)
        self._audit = Audit(RULES, signals="all", rows=config.steps)
        look = functools.partial(advance, graphdef=graphdef, config=config, domains=domains)
        self._begin = self._audit.init(jax.eval_shape(look, {**state, "probe": self._probe}, *batch)[1])
        self._step = jax.jit(make_step(graphdef, config, domains, self._audit, advance), donate_argnums=0)
        self._evaluation = jax.jit(make_evaluation(graphdef, config, domains))

    def record(self, run: Run) -> xr.Dataset:
        """Train from the first step to the last; the batches are those of `reference.train`."""
        injection = Injection(run.config, self._corpus)
        config, rng = injection.config, np.random.default_rng([run.seed, 0])
        size = config.batch, config.context
        held_out = [self._corpus.batch(rng, *size, held_out=True) for _ in range(config.eval_batches)]
        _, state = create(config)
        state |= jax.tree.map(jnp.copy, {"audit": self._begin, "probe": self._probe})  # steps eat their state
        for i in range(config.steps):
            if i % config.eval_every == 0:
                losses = [self._evaluation(state["learner"], *batch)[0] for batch in held_out]
                state["validation_loss"] = jnp.stack(losses).mean()
            if i == WARM:
                state["probe"] = _with_reference(state["probe"])
            state["knobs"] = injection.knobs(i)
            state, _ = self._step(state, *injection.batch(rng, *size, step=i))
        rows, numbers = jax.device_get(state["audit"].rows), np.arange(config.steps)
        records = self._audit.records(rows, numbers, np.full(config.steps, np.nan))
        return records_to_dataset(records, _told(run))


def _with_reference(probe: ProbeState) -> ProbeState:
    """What the last probe chose is what later ones are compared with."""
    return replace(probe, reference=jax.tree.map(jnp.copy, probe.chosen))
