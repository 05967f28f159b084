"""The history of an audit as an `xarray.Dataset`, from rows in memory or from a store on disk.

    history = open_history("runs/demo")               # a log directory, the path of a store, or a URL
    history.truth.sel(rule="load_imbalance", bound="lower")
    history.moe_rules["load_imbalance"]               # its two bounds over step
    history.moe_rules.states("load_imbalance")        # 1 where it is TRUE; see its flag_meanings
    history.moe_rules.first_true("load_imbalance")    # a step, or None
    history.moe_rules.plot("audit.png")
    history.moe_rules                                 # in a notebook: what the run says about its rules

`columns` lists the variables. Importing this module imports xarray and registers `.moe_rules`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from .columns import attributes, columns, coordinates
from .damage import damage, damaged
from .errors import HistoryError, MoeRulesError, UnknownNameError, closest
from .paths import AnyPath, as_path, zarr_store
from .records import Records, State
from .verdicts import Verdict, verdicts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def records_to_dataset(
    records: Records | Iterable[Records], config: Mapping[str, Any] | None = None
) -> xr.Dataset:
    """Rows in memory as a dataset; the same that `open_history` gives for a store of these rows.

    Args:
        records: one batch of rows, or several of one run in the order of their steps.
        config: kept as JSON in the attribute `config`.

    Raises:
        HistoryError: no batch at all; a batch without rows is fine, since it carries a schema.
    """
    batches = [records] if isinstance(records, Records) else list(records)
    if not batches:
        raise HistoryError(
            "records_to_dataset got no batch of records, so it cannot know which rules and layers "
            "the dataset is about. Pass at least one batch; it may be empty."
        )
    schema = batches[0].schema
    variables = {}
    for column in columns(schema):
        values = np.concatenate([getattr(batch, column.name) for batch in batches])
        variables[column.name] = (column.dims, values.astype(column.dtype, copy=False), dict(column.attrs))
    return xr.Dataset(variables, coordinates(schema), attributes(schema, config or {}))


def open_history(path: str | AnyPath) -> xr.Dataset:
    """The history on disk, read lazily; also while its run is writing, and after it was killed.

    Args:
        path: a log directory, whose newest `audit*.zarr` is opened, or the path of a store; or its URL.

    Returns:
        The variables of `columns`, without rows that are not written.

    Raises:
        HistoryError: there is no history, or what is there is not one.
    """
    from .stores import stores

    store = path = as_path(path)
    if not (path / "zarr.json").exists():
        found = stores(path / "audit.zarr")
        if not (found or path.is_dir()):
            raise HistoryError(
                f"There is no directory {path}. open_history takes the logdir of a run, or the path of "
                "its audit.zarr."
            )
        if not found:
            raise HistoryError(
                f"{path} holds no audit.zarr. Either the run has not started, or it ran without a "
                'zarr sink (it writes one with logdir=..., or sinks=["zarr"]).'
            )
        store = found[-1]
    try:
        dataset = _open(store)
    except (MoeRulesError, OSError):
        raise
    except Exception as error:  # whatever zarr and xarray raise over what something else wrote
        told = " ".join(str(error).split())[:200]
        raise damaged(store, f"zarr says {type(error).__name__}: {told}") from error
    if what := damage(dataset):
        raise damaged(store, what)
    return dataset


def _open(store: AnyPath) -> xr.Dataset:
    from .stores import written_rows
    from .trimmed import Trimmed

    trimmed: Any = Trimmed(zarr_store(store, read_only=True), written_rows(store))
    dataset = xr.open_dataset(trimmed, engine="zarr", chunks=None, consolidated=False)
    dataset.attrs.pop("writer", None)  # of the process, nothing about the run
    # Text comes as StringDType, from an older xarray as objects; netCDF and the rows in memory know neither.
    text = [name for name in dataset.coords if dataset[name].dtype.kind in "OT"]
    return dataset.assign_coords({name: np.array(dataset[name].values.tolist(), np.str_) for name in text})


@xr.register_dataset_accessor("moe_rules")
class MoeRules:
    """What a history says about single rules, as `dataset.moe_rules`."""

    def __init__(self, dataset: xr.Dataset) -> None:
        self._dataset = dataset

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, in the order of the run."""
        return tuple(self._dataset["rule"].values.tolist())

    def __getitem__(self, rule: str) -> xr.DataArray:
        """Truth of a rule over step: float32 [step, bound], with bound "lower" and "upper".

        Raises:
            UnknownNameError: the history has no such rule.
        """
        return self._dataset["truth"].sel(rule=self._known(rule), drop=True).rename(rule)

    def states(self, rule: str | None = None) -> xr.DataArray:
        """int8 [step], or [step, rule] without a name: 0 FALSE, 1 TRUE, 2 UNKNOWN, 3 CONTRADICTORY."""
        states = self._dataset["state"]
        return states if rule is None else states.sel(rule=self._known(rule), drop=True).rename(rule)

    def first_true(self, rule: str) -> int | None:
        """The step at which a rule first was TRUE, warm-up or not; None: at none.

        Raises:
            UnknownNameError: the history has no such rule.
        """
        steps = self._dataset["step"].values[self.states(rule).values == State.TRUE]
        return int(steps.min()) if len(steps) else None

    def rolling(self, rows: int = 30) -> xr.DataArray:
        """Rolling mean of the truth intervals, as the picture draws them: [step, rule, bound].

        Centred, so that a curve stands where its data do; for an even number, one row more before than
        after. At both ends it is the mean of the rows that there are, and NaN does not count.

        Args:
            rows: of the window, at least 1. (The picture takes at most a tenth of the run.)
        """
        return self._dataset["truth"].rolling(step=rows, center=True, min_periods=1).mean()

    def verdicts(self) -> tuple[Verdict, ...]:
        """What the run says about each of its rules, see `verdicts.verdicts`."""
        return verdicts(self._dataset)

    def _repr_html_(self) -> str:
        from .html import audit_html

        return audit_html(self._dataset, self.verdicts())

    def plot(self, path: str | AnyPath | None = None, **options: Any) -> Figure:
        """Loss above, truth intervals below; see `plots.plot_audit` for the options."""
        from .plots import plot_audit

        return plot_audit(self._dataset, path, **options)

    def to_tutorial(self) -> xr.Dataset:
        """`loss`, and `<rule>_L` and `<rule>_U` for every rule, over step: the tutorial's variables."""
        bounds = {
            f"{rule}_{letter}": self[rule].sel(bound=bound, drop=True)
            for rule in self.rules
            for letter, bound in (("L", "lower"), ("U", "upper"))
        }
        return xr.Dataset({"loss": self._dataset["loss"], **bounds})

    def _known(self, rule: str) -> str:
        if rule not in self.rules:
            raise UnknownNameError(
                f"This history has no rule {rule!r}.{closest(rule, self.rules)} "
                f"It has: {', '.join(self.rules)}."
            )
        return rule
