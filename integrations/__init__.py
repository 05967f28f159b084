"""One small module per framework; each is imported only by those who use that framework.

- `optax`: the audit as a gradient transformation, its state in the optimizer's.
- `flax_nnx`: router probabilities from NNX intermediates; the audit inside an `nnx.Optimizer`.
- `flax_linen`: router probabilities from Linen's `sow`; a `TrainState` that hands metrics on.
- `equinox`: router probabilities from a model nobody changed, or from an `eqx.nn.State`.
- `penzai`: router probabilities from selected layers; named axes put in order.
- `haiku`: router probabilities by way of Haiku's state, recorded by a method interceptor.
- `keras`: a callback for `Model.fit` of Keras 3 on JAX.
- `clu`: a hook of CLU training loops.
- `tunix`: beside the trainers of google-tunix.
- `levanter`: beside the Trainer of marin-levanter.
"""
