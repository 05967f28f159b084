"""What is read is data: nothing in the package can run it. Asked of the source, line by line."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fake_records as fake
import jax.numpy as jnp
import numpy as np
import pytest

from moe_rules_callback.errors import TracingError
from moe_rules_callback.history import open_history
from moe_rules_callback.sinks import TensorBoardSink, ZarrSink
from moe_rules_callback.tracing import find, trace

ROOT = Path(__file__).parents[2]
FOLDERS = ("moe_rules_callback", "integrations", "reference")
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
BUILTINS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
MODULES = {
    "pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "dbm", "yaml", "ctypes",
    "code", "codeop", "runpy", "subprocess", "pty", "xmlrpc", "telnetlib", "xml", "lxml", "bs4",
}  # fmt: skip
CALLS = {
    "os.system", "os.popen", "os.execv", "os.execve", "os.spawnl", "os.startfile", "np.load", "numpy.load",
    "pd.eval", "pd.read_pickle", "importlib.import_module", "import_module",
}  # fmt: skip
# Where one of these stands all the same, and why that is no way in.
ALLOWED = {
    ("commands/check_reports.py", "xml"): "ElementTree only writes, and escapes",
    ("tracing/tree.py", "xml"): "ElementTree only writes; xml() reads back what it has just written",
    ("sinks/__init__.py", "import_module"): "a name out of a table of this package",
    ("sinks/events.py", "import_module"): "a name that stands in the source",
    ("plugins.py", "importlib.import_module"): "a name out of a table of this package",
    ("_remembered.py", "np.load"): "with allow_pickle=False; see test_remembered.py",
}


def found_in(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What of the above a file has, and where."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in BUILTINS | CALLS:
                yield name, node.lineno
            case ast.Call(func=ast.Attribute()) if (name := ast.unparse(node.func)) in CALLS:
                yield name, node.lineno
            case ast.Import(names=names):
                yield from ((n, node.lineno) for each in names if (n := each.name.split(".")[0]) in MODULES)
            case ast.ImportFrom(module=str(module), level=0) if (name := module.split(".")[0]) in MODULES:
                yield name, node.lineno
            case ast.keyword(arg="allow_pickle" | "shell", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    yield f"{node.arg}=", value.lineno


def found_everywhere() -> Iterator[tuple[str, str, int]]:
    for path in FILES:
        for name, line in found_in(ast.parse(path.read_text("utf-8"))):
            yield path.relative_to(ROOT).as_posix(), name, line


def test_nothing_in_the_source_runs_what_is_read():
    strange = [
        f"{path}:{line}: {name}"
        for path, name, line in found_everywhere()
        if not any(path.endswith(f"/{end}") and name == what for end, what in ALLOWED)
    ]
    assert strange == []
    assert len(FILES) > 100


def test_every_exception_is_still_needed():
    there = {(path, name) for path, name, _ in found_everywhere()}
    for end, name in ALLOWED:
        assert any(path.endswith(f"/{end}") and what == name for path, what in there), (end, name)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("eval('1')", "eval"),
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import xml.etree.ElementTree", "xml"),
        ("np.load('x')", "np.load"),
        ("f(allow_pickle=True)", "allow_pickle="),
        ("run('x', shell=flag)", "shell="),
        ("os.system('x')", "os.system"),
    ],
)
def test_the_search_finds_what_it_is_for(source: str, name: str):
    assert [what for what, _ in found_in(ast.parse(source))] == [name]


def test_elementtree_is_only_given_what_this_package_made():
    """No parser of XML sees text from outside: `fromstring` reads the output of `tostring`, nothing else."""
    parsers = {"fromstring", "XML", "iterparse", "XMLParser"}
    parsed = [
        (path.name, ast.unparse(node))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in parsers
    ]
    assert parsed == [("tree.py", "ElementTree.fromstring(ElementTree.tostring(self._tree[0]))")]


SECRET = "doc('{0}')", "//sin[doc('{0}')//a = 'secret']", "doc-available('{0}')", "unparsed-text('{0}')"


@pytest.mark.parametrize("query", SECRET)
def test_a_query_reads_no_file(query: str, tmp_path: Path):
    """XPath 2.0 knows `doc`; it finds nothing there but what it was given, which is one trace."""
    (tmp_path / "secret.xml").write_text("<a>secret</a>")
    traced = trace(jnp.sin, 1.0)
    with pytest.raises(TracingError, match=r"^(Cannot read the query|The query .* selects something else)"):
        find(traced, query.format((tmp_path / "secret.xml").as_uri()))


@pytest.mark.parametrize("query", ["//sin[" + "(" * 900 + "1" + ")" * 900 + "]", "//sin" + "[1]" * 3000])
def test_a_query_of_thousands_of_parts_is_refused(query: str):
    with pytest.raises(TracingError, match="nests hundreds of parts"):
        find(trace(jnp.sin, 1.0), query)


def test_a_query_of_a_million_characters_is_refused():
    with pytest.raises(
        TracingError, match=r"^A query has at most 10,000 characters, this one has 1,000,000\.$"
    ):
        find(trace(jnp.sin, 1.0), "/" * 1_000_000)


def test_a_snapshot_stays_in_its_folder(tmp_path: Path):
    """Its file is named by the number of the step alone; names of layers are names inside it."""
    import zipfile

    from moe_rules_callback.actions import snapshot

    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        for name in ("../../etc/passwd", "/etc/passwd", "a\0b"):
            snapshot._add(file, f"312/router_probs/{name}", np.zeros(2))
    with zipfile.ZipFile(tmp_path / "x.npz") as file:
        assert all(name.startswith("312/router_probs/") for name in file.namelist())
        file.extractall(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"x.npz", "out"}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", "a\\..\\b", "c:\\x"])
def test_names_of_rules_and_layers_name_no_files(name: str, tmp_path: Path):
    schema = fake.make_schema(1, rules=(replace(fake.RULES[0], name=name),))
    schema = replace(schema, layers=(name,))
    run = fake.make_run(tmp_path / "logs" / "run", schema)
    for sink in (ZarrSink(), TensorBoardSink()):
        fake.feed(sink, fake.make_records(3, schema), run)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["run"]
    stored = open_history(tmp_path / "logs" / "run")
    assert stored["rule"].values.tolist() == stored["layer"].values.tolist() == [name]
