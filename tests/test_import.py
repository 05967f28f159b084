"""What `import moe_rules_callback` brings in, and the names it offers."""

from __future__ import annotations

import subprocess
import sys

import moe_rules_callback

PUBLIC = [
    "Alert",
    "Audit",
    "AuditState",
    "Evaluation",
    "HistoryError",
    "Interval",
    "MetricsError",
    "MissingSignalError",
    "MoeRulesError",
    "PluginError",
    "Predicate",
    "ProbeState",
    "Records",
    "RouterProbe",
    "Rule",
    "RuleAuditCallback",
    "RuleSyntaxError",
    "Rulebook",
    "RulebookError",
    "Run",
    "Schema",
    "Signal",
    "SignalInfo",
    "State",
    "TryAgain",
    "UnknownNameError",
    "evaluate",
    "get_plugin_manager",
    "hookimpl",
    "load_rules",
    "open_history",
    "parse_rule",
]
FRAMEWORKS = {"equinox", "flax", "haiku", "keras", "optax", "penzai", "tensorflow", "torch"}
LATER = {
    "clu", "fsspec", "lark", "matplotlib", "pandas", "tensorboard", "tensorboardX", "upath", "xarray", "zarr",
}  # fmt: skip
IMPORT_ALL = """
import importlib, pkgutil, moe_rules_callback
for module in pkgutil.walk_packages(moe_rules_callback.__path__, "moe_rules_callback."):
    if "integrations" not in module.name and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def loaded_by(program: str) -> set[str]:
    """Top-level names of the modules that `program` leaves in sys.modules of a new interpreter."""
    program += "\nimport sys; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_public_names_are_sorted_and_pinned():
    assert moe_rules_callback.__all__ == PUBLIC == sorted(PUBLIC)
    assert [name for name in PUBLIC if not hasattr(moe_rules_callback, name)] == []


def test_import_brings_in_no_framework_and_nothing_that_is_used_later():
    offenders = loaded_by("import moe_rules_callback") & (FRAMEWORKS | LATER)
    assert not offenders, f"importing the package imports {sorted(offenders)}: import them on first use"


def test_no_module_of_the_core_imports_a_framework():
    offenders = loaded_by(IMPORT_ALL) & FRAMEWORKS
    assert not offenders, f"a module of the core imports {sorted(offenders)}: that belongs in integrations/"
