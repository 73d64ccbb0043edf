"""SASRec: self-attention over the latest items of a history."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydantic
from pydantic import Field

from fusion.compat import keras, tf
from recsys.collaborative.sequences import LOWEST, SequenceMember, SequenceSettings

layers = keras.layers


class SASRec(SequenceMember):
    """Blocks of causal self-attention (Kang & McAuley 2018, "Self-Attentive Sequential Recommendation").

    Each block is attention and a two-layer network, both with a norm before and a residual around them (section
    III.B). Positions are counted back from the item that looks, as a learned bias of each distance and head (Raffel et
    al. 2020): every item of a window trains what an answer needs, and padding does not matter. Projections are Dense
    layers, because TFMOT cannot quantise Keras's attention layer. Without times the order is that of the item
    numbers, and the member is of no use. The defaults are those that validated best on 600 users.
    """

    class Config(SequenceSettings):
        """Settings of the transformer."""

        dropout: float = Field(0.5, ge=0, lt=1)
        """Share of entries that training silences, in the vectors of a history and within the network."""
        blocks: int = Field(1, ge=1, le=16)
        """How many blocks."""
        heads: int = Field(1, ge=1, le=32)
        """Heads of attention; they divide `dimensions`."""

        @pydantic.model_validator(mode="after")
        def _heads_divide_dimensions(self) -> SASRec.Config:
            if self.dimensions % self.heads:
                raise ValueError(
                    f"heads must divide dimensions; received {self.heads} heads and {self.dimensions} dimensions"
                )
            return self

    def _states(self, vectors: tf.Tensor, known: tf.Tensor) -> tf.Tensor:
        x = vectors
        for number in range(self.config.blocks):
            x = layers.Add()([x, self._attention(layers.LayerNormalization()(x), known, f"attention{number}")])
            x = layers.Add()([x, self._network(layers.LayerNormalization()(x), f"network{number}")])
        return layers.LayerNormalization()(x)

    def _attention(self, x: tf.Tensor, known: tf.Tensor, name: str) -> tf.Tensor:
        width = self.config.dimensions
        heads = CausalAttention(self.config.heads, name=name)([self._dense(x, 3 * width, f"{name}_inputs"), known])
        return self._dropout(self._dense(heads, width, f"{name}_output"), name)

    def _network(self, x: tf.Tensor, name: str) -> tf.Tensor:
        width = self.config.dimensions
        wide = self._dense(x, width, f"{name}_wide", activation="relu")
        return self._dropout(self._dense(wide, width, f"{name}_narrow"), name)


@keras.utils.register_keras_serializable("recsys")
class CausalAttention(keras.layers.Layer):
    """softmax(q kᵀ / √d + bias of the distance) v over an item and the earlier ones, in `heads` heads.

    Inputs are q, k and v side by side `[B, N, 3 D]`, and bool `[B, N]`, False for padding; output `[B, N, D]`.
    """

    def __init__(self, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = heads

    def build(self, input_shape: Any) -> None:
        length = input_shape[0][1]
        self.distance = self.add_weight(name="distance", shape=(self.heads, length), initializer="zeros")
        super().build(input_shape)

    def call(self, inputs: Any) -> Any:
        joined, known = inputs
        length, size = joined.shape[1], joined.shape[2] // 3 // self.heads
        parts = tf.transpose(tf.reshape(joined, (-1, length, 3, self.heads, size)), (2, 0, 3, 1, 4))
        query, key, value = parts[0], parts[1], parts[2]  # [B, heads, N, d]
        back = np.arange(length)[:, None] - np.arange(length)  # how many steps key j lies before query i
        bias = tf.gather(self.distance, np.maximum(back, 0), axis=1)
        scores = tf.matmul(query, key, transpose_b=True) * size**-0.5 + bias
        visible = tf.logical_and(known[:, None, None, :], tf.constant(back >= 0))
        weights = tf.nn.softmax(tf.where(visible, scores, LOWEST))
        return tf.reshape(tf.transpose(tf.matmul(weights, value), (0, 2, 1, 3)), (-1, length, self.heads * size))

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "heads": self.heads}
