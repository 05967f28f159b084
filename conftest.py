"""What every test runs under, and the collection of the code blocks in README.md and docs/ as tests.

In a page, `python` blocks are executed in one namespace and one empty working directory, `toml` and `bash`
blocks are parsed, and `text` blocks only show something. A `<!-- skip: next -->` above a block leaves it out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import tomllib
from typing import Any

# Read when jax and matplotlib are first imported, so set before anything else.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Most of the time goes to compiling, and much of it to the same small programs: they are kept, also for the
# processes that tests start.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="moe_rules_compiled_"))
if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # a worker might read what another is writing
    os.environ["JAX_COMPILATION_CACHE_DIR"] += f"/{worker}"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import hypothesis
import pytest
from sybil import Sybil
from sybil.example import Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

# The first example of a property pays for compilation: a deadline would measure that.
hypothesis.settings.register_profile("moe_rules_callback", deadline=None)
hypothesis.settings.load_profile("moe_rules_callback")


def pytest_unconfigure(config: pytest.Config) -> None:
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if "moe_rules_compiled_" in folder and not hasattr(config, "workerinput"):
        shutil.rmtree(folder, ignore_errors=True)


def parse_toml(example: Example) -> None:
    tomllib.loads(example.parsed)


def parse_bash(example: Example) -> None:
    done = subprocess.run(["bash", "-n"], input=example.parsed, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def enter_directory(namespace: dict[str, Any]) -> None:
    namespace["_directory"], namespace["_before"] = tempfile.TemporaryDirectory(), os.getcwd()
    os.chdir(namespace["_directory"].name)


def leave_directory(namespace: dict[str, Any]) -> None:
    os.chdir(namespace["_before"])
    namespace["_directory"].cleanup()


pytest_collect_file = Sybil(
    parsers=[
        PythonCodeBlockParser(),
        CodeBlockParser("toml", parse_toml),
        CodeBlockParser("bash", parse_bash),
        SkipParser(),
    ],
    patterns=["README.md", "docs/*.md"],
    setup=enter_directory,
    teardown=leave_directory,
).pytest()
