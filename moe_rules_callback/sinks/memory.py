"""The history of a run that has nowhere to write: the last rows, in memory."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from ..hookspecs import hookimpl
from ..records import ARRAYS, Records, Run

if TYPE_CHECKING:
    import xarray as xr

log = logging.getLogger("moe_rules_callback")
LIMIT = 256 * 2**20


class MemorySink:
    """Keeps records until they take more than `limit` bytes, then forgets the oldest, saying so once."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit, self._bytes = limit, 0
        self._batches: deque[Records] = deque()
        self._told = False

    @hookimpl
    def on_records(self, records: Records) -> None:
        self._batches.append(records)
        self._bytes += _size(records)
        while self._bytes > self._limit and len(self._batches) > 1:
            self._bytes -= _size(self._batches.popleft())
            if not self._told:
                self._told = True
                log.warning(
                    "the history in memory has reached %d MiB, so its oldest rows are dropped from now on; "
                    "pass logdir=... to keep all of them on disk",
                    self._limit // 2**20,
                )

    @hookimpl
    def on_rewind(self, step: int) -> None:
        dropped = 0
        while self._batches:
            batch = self._batches.pop()
            self._bytes -= _size(batch)
            kept = np.flatnonzero(batch.step < step)
            dropped += len(batch) - (keep := int(kept[-1]) + 1 if len(kept) else 0)
            if keep:
                self._batches.append(batch[:keep])
                self._bytes += _size(batch[:keep])
                break
        if dropped:
            log.warning(
                "%d rows from step %d on are replaced, since an older state was restored", dropped, step
            )

    def held(self, records: Records) -> int:
        """How many of these rows, from the first on, are kept, see `Records.held`."""
        batches, first = list(self._batches), records.step[0]
        begins = [number for number, batch in enumerate(batches) if (batch.step == first).any()]
        return Records.joined(batches[begins[-1] :]).held(records) if begins else 0

    def dataset(self, run: Run) -> xr.Dataset:
        """What is kept, as a dataset. Call it while no records arrive."""
        from ..history import records_to_dataset

        return records_to_dataset([Records.empty(run.schema), *self._batches], run.config)


def _size(records: Records) -> int:
    return sum(getattr(records, name).nbytes for name in ARRAYS)
