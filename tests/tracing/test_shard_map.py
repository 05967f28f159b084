"""Taps and watched functions on several devices, in a process that has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("script", ["on_four_devices.py", "watch_on_four_devices.py"])
def test_on_four_devices(script: str) -> None:
    path = Path(__file__).with_name(script)
    done = subprocess.run([sys.executable, str(path)], text=True, capture_output=True, check=False)
    assert done.stdout == "ok\n", done.stderr
