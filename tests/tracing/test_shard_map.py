"""Taps on several devices, in a process that has them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_taps_on_four_devices() -> None:
    script = Path(__file__).with_name("on_four_devices.py")
    done = subprocess.run([sys.executable, str(script)], text=True, capture_output=True, check=False)
    assert done.stdout == "ok\n", done.stderr
