"""Faults that befall the reference trainer, and the benchmark made of them.

    python -m reference.train --fault dead_expert --fault-step 300     # one run, to look at
    python -m reference.faults record                                  # every fault, and healthy controls

`catalogue` lists the faults: each is a change of `knobs`, numbers that a step takes beside its batch, from
some step on. `learning` is the learner that obeys them, so that all faults share one compiled program.
`runs` is the table of what is recorded, `record` records it. The plain trainer knows nothing of them.
"""
