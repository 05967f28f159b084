"""Two runs side by side: what the same rules say of both, and which of them parts ways first.

found = compare(open_history("runs/old"), open_history("runs/new"))
print(found)
found.first.rule, found.first.parting.steps, found.first.before
"""

from .comparison import By, Comparison, RuleComparison, compare
from .partings import Parting

__all__ = ["By", "Comparison", "Parting", "RuleComparison", "compare"]
