"""Adapters, one module a framework: `from moe_rules_callback.integrations import optax`.

In a checkout they lie in `integrations/` beside this package, and this module stands in for the folder: a
module with a `__path__` is a package. A wheel carries the folder itself, inside the package, in its place.
"""

from __future__ import annotations

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "integrations")]
