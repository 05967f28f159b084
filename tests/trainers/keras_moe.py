# pyright: reportMissingImports=false
"""A small Keras classifier with a Mixture-of-Experts layer, written as a user of Keras would."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import layers, ops

EXPERTS, K, WIDTH, CLASSES = 4, 2, 8, 3


class MoE(layers.Layer):
    """Every token's two most probable of four experts."""

    def build(self, input_shape: Any) -> None:
        self.router = layers.Dense(EXPERTS, use_bias=False, name="router")
        self.router.build(input_shape)
        self.experts = self.add_weight(shape=(EXPERTS, WIDTH, WIDTH), name="experts")

    def call(self, x: Any) -> Any:
        gate, index = ops.top_k(ops.softmax(self.router(x)), K)
        weights = ops.sum(ops.one_hot(index, EXPERTS) * gate[..., None], axis=-2)
        return ops.einsum("be,bd,edf->bf", weights, x, self.experts)


def make_model(optimizer: Any = None, dropout: float = 0.1, **compiled: Any) -> keras.Model:
    """The same weights every time."""
    keras.utils.set_random_seed(0)
    x = layers.Input((WIDTH,))
    y = layers.Dense(CLASSES, name="head")(layers.Dropout(dropout)(x + MoE(name="moe")(x)))
    model = keras.Model(x, y)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.SGD(0.5), loss, metrics=["accuracy"], **compiled)
    return model


def make_data(rows: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """[rows, width], and classes that follow from it."""
    x = np.random.default_rng(0).normal(size=(rows, WIDTH)).astype(np.float32)
    return x, x[:, :CLASSES].argmax(-1)
