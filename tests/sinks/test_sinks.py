from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fake_records as fake
import pluggy
import pytest

from moe_rules_callback import hookspecs, sinks
from moe_rules_callback.errors import PluginError, UnknownNameError
from moe_rules_callback.hookspecs import hookimpl
from moe_rules_callback.sinks import CluSink, ConsoleSink, TensorBoardSink, ZarrSink, make_sink


class Plugin:
    @hookimpl
    def on_records(self, records):
        pass


class Writer:
    def write_scalars(self, step, scalars):
        pass


@pytest.mark.parametrize(
    ("name", "kind"), [("tensorboard", TensorBoardSink), ("zarr", ZarrSink), ("console", ConsoleSink)]
)
def test_names(name, kind):
    assert type(make_sink(name)) is kind


def test_objects():
    plugin = Plugin()
    assert make_sink(plugin) is plugin
    assert isinstance(make_sink(Writer()), CluSink)


def test_an_unknown_name_lists_the_closest_and_all():
    want = r"There is no sink 'tensorbord'. Did you mean tensorboard\? There are: console, tensorboard, zarr;"
    with pytest.raises(UnknownNameError, match=want):
        make_sink("tensorbord")


@pytest.mark.parametrize("spec", [3, print, object()])
def test_an_object_that_is_no_sink(spec):
    with pytest.raises(PluginError, match=r"neither a method marked with @hookimpl nor write_scalars"):
        make_sink(spec)


@pytest.mark.parametrize("name", ["zarr", "tensorboard", "console"])
def test_sinks_take_part_in_the_hooks(name, tmp_path, capsys):
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    manager.register(make_sink(name))
    manager.check_pending()
    run, records = fake.make_run(tmp_path), fake.make_records(3)
    manager.hook.on_train_start(run=run)
    manager.hook.on_records(records=records)
    manager.hook.on_train_end(run=run)
    assert list(tmp_path.iterdir()) or capsys.readouterr().err


def test_public_names_exist():
    assert sorted(sinks.__all__) == sinks.__all__
    for name in sinks.__all__:
        assert hasattr(sinks, name)
    assert not hasattr(sinks, "ParquetSink")


def test_nothing_heavy_is_imported_before_a_run_starts():
    code = (
        "import sys\n"
        "from moe_rules_callback.sinks import *\n"
        "[make_sink(name) for name in ('zarr', 'tensorboard', 'console')]\n"
        "heavy = {'zarr', 'xarray', 'tensorboardX', 'matplotlib', 'clu', 'tensorflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(root)}, timeout=120)
