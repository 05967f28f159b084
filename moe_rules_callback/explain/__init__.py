"""Why a rule says what it says at one step: its parts, the layer and expert behind it, what would change it.

    told = explain(open_history("runs/demo"), "load_imbalance", step=120)
    print(told)
    told.layer, told.tree.operands[0].truth, told.changes[0].signal

The row is judged again by the audit that judged it, with all sub-formulas beside the rules.
"""

from .counterfactual import Change
from .explanation import Expert, Explanation, explain
from .readings import Ramp
from .tree import Part, Reading

__all__ = ["Change", "Expert", "Explanation", "Part", "Ramp", "Reading", "explain"]
