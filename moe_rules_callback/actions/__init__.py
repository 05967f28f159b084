"""What may be done when a rule fires, besides saying so.

    actions = [StopTraining(on="error", after=3), RequestCheckpoint(), SnapshotRouting(rows=8)]
    with RuleAuditCallback(rules, logdir="runs/demo", actions=actions, dry_run=False) as audit:
        for x, y in batches:
            ...
            audit.on_step({"loss": loss, "router_probs": router_probs})
            if audit.should_checkpoint:
                save(state)
            if audit.should_stop:
                break

Nothing is done to the training itself: an action asks, and the loop looks. In a dry run, the default, each
action says once in the log what it would have done. Rows are read in batches, so an action hears of a row
up to `flush_every` steps or 10 seconds after it.
"""

from .action import Action
from .requests import RequestCheckpoint, StopTraining
from .snapshot import SnapshotRouting

__all__ = ["Action", "RequestCheckpoint", "SnapshotRouting", "StopTraining"]
