"""What actions ask of the training loop, known to all processes at the same step.

Process 0 alone reads the records. With several processes it leaves, every so many steps, what has been asked
so far in the key-value store of `jax.distributed`, and the others fetch it at the same call of `on_step` or
`drain`. That is one message between hosts: no device takes part and no computation is waited for.

It cannot deadlock. Process 0 never waits. The others wait until it has come to the same call, for which it
needs nothing of them but steps that they have dispatched before; should it not come, they raise.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Literal

import jax
from jax._src.distributed import global_state  # has no public name; Orbax relies on it too

from ..errors import PluginError

Kind = Literal["stop", "checkpoint"]
PATIENCE = 1800.0  # seconds that a process waits for process 0, which may be evaluating or saving
_numbers = itertools.count()  # of callbacks, which all processes make in the same order


def new_key(what: str) -> str:
    """A place in the key-value store that is this callback's own, the same on all processes."""
    return f"moe_rules_callback/{what}/{next(_numbers)}"


def of_first(key: str, number: Callable[[], int]) -> int:
    """A number as process 0 finds it, which alone sees the history.

    Raises:
        PluginError: process 0 does not ask for it within PATIENCE.
    """
    if jax.process_count() == 1:
        return number()
    client = global_state.client
    assert client is not None
    if jax.process_index() == 0:
        found = number()
        client.key_value_set(key, str(found), allow_overwrite=True)
        return found
    try:
        return int(client.blocking_key_value_get(key, int(1000 * PATIENCE)))
    except jax.errors.JaxRuntimeError as error:
        raise PluginError(
            f"process {jax.process_index()} resumes a history, and within {PATIENCE:.0f} s process 0 has "
            "not. Usual cause: resume=True is not passed on process 0, or it has ended. Pass it on all."
        ) from error


class Requests:
    """Requests that were made, and those that the training loop may know of.

    Args:
        every: steps between two agreements of several processes; None: nothing is ever asked.

    Attributes:
        possible: whether anything may ever be asked; if not, `step` need not be called.
    """

    def __init__(self, every: int | None) -> None:
        self._every, self.possible = every, every is not None
        self._key = None if every is None else new_key("requests")
        self._lock = threading.Lock()
        self._asked: dict[Kind, int] = {"stop": 0, "checkpoint": 0}  # how often, on this process
        self._agreed: dict[Kind, int] = self._asked.copy()
        self._calls = 0
        self._read = self._done = 0  # requests for a checkpoint that the loop has read, and that are over

    def ask(self, kind: Kind) -> None:
        """Ask the training loop for something; on any thread of process 0."""
        with self._lock:
            self._asked[kind] += 1

    def step(self) -> None:
        """To be called once a step, on every process.

        Raises:
            PluginError: process 0 does not call it as often as this process.
        """
        self._done = self._read
        self._calls += 1
        if self._every is not None and self._calls % self._every == 0 and jax.process_count() > 1:
            self._agree(f"{self._key}/{self._calls}")

    @property
    def stop(self) -> bool:
        """Whether training is to end."""
        return self._known["stop"] > 0

    @property
    def checkpoint(self) -> bool:
        """Whether a checkpoint is asked for: from then until the first step after this was read."""
        self._read = self._known["checkpoint"]
        return self._read > self._done

    @property
    def _known(self) -> dict[Kind, int]:
        return self._agreed if self._every is not None and jax.process_count() > 1 else self._asked

    def _agree(self, key: str) -> None:
        client = global_state.client
        assert client is not None  # without it there are no several processes
        if jax.process_index() == 0:
            with self._lock:
                self._agreed = self._asked.copy()
            client.key_value_set(key, "{stop} {checkpoint}".format(**self._agreed))
            return
        try:
            told = client.blocking_key_value_get(key, int(1000 * PATIENCE))
        except jax.errors.JaxRuntimeError as error:
            raise PluginError(
                f"process {jax.process_index()} has taken {self._calls} steps, and within {PATIENCE:.0f} s "
                "process 0 has not. Usual causes: on_step or drain is not called on process 0, not as "
                "often as here, or process 0 has ended. Call it on every process after every step."
            ) from error
        stop, checkpoint = map(int, told.split())
        self._agreed = {"stop": stop, "checkpoint": checkpoint}
