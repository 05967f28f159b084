"""Training logs that something else has written: read to columns, columns mapped to signals.

    log = read_log("training_log.txt")            # JSON lines, CSV, TensorBoard events, zarr, netCDF
    log.columns["utilization"]                    # float64 [n, E]
    mapping = map_columns(log)                    # which column is which signal, in which unit, and why
    print(mapping)
    replay(mapping.metrics, rules, steps=log.steps)

`files` finds the reader, `cells` collects what it finds, `log` brings it into the order of the steps,
`mapping` guesses with the names in `names` and the units in `units`.
"""

from __future__ import annotations

from .files import FORMATS, read_log
from .log import Log
from .mapping import Assignment, SignalMapping, map_columns

__all__ = ["FORMATS", "Assignment", "Log", "SignalMapping", "map_columns", "read_log"]
