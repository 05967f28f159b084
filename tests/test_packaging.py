"""What a wheel built from the sdist holds, and that it works away from the checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SUFFIXES = {".css", ".html", ".lark", ".py", ".toml", ".typed"}
USE = """
import sys
sys.path.insert(0, sys.argv[1])
import moe_rules_callback
from moe_rules_callback.integrations import optax
moe_rules_callback.RuleAuditCallback("nano_moe")
print(moe_rules_callback.__file__, optax.__file__, sep="\\n")
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist built from this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_with_the_adapters_inside_and_nothing_else(wheel: Path):
    def files(folder: str) -> set[str]:
        paths = (ROOT / folder).rglob("*")
        return {path.relative_to(ROOT).as_posix() for path in paths if path.suffix in SUFFIXES}

    expected = files("moe_rules_callback") - {"moe_rules_callback/integrations.py"}
    expected |= {f"moe_rules_callback/{name}" for name in files("integrations")}
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected
    run(sys.executable, "-m", "check_wheel_contents", wheel, cwd=ROOT)  # configured in pyproject.toml


def test_installed_wheel_finds_its_adapters_and_its_files(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    found = run(sys.executable, "-c", USE, tmp_path, cwd=tmp_path)
    assert [Path(line).relative_to(tmp_path).as_posix() for line in found.splitlines()] == [
        "moe_rules_callback/__init__.py",
        "moe_rules_callback/integrations/optax.py",
    ]
