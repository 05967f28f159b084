"""The reference trainer: a Nano-MoE language model in Flax NNX, audited while it trains.

    python -m reference.train --steps 500 --logdir runs/demo

`config` holds every setting, `data` the text, `model` the model, `learning` a step, `figures` the numbers
reported about the router, `train` the loop, and `faults` what can be made to go wrong. It lives beside the
package and is not installed with it.
"""
