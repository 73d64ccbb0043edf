"""Weights of one or two bits, binary and ternary, fine-tuned with the straight-through estimator.

The forward pass uses the projected kernel, the gradient moves a float kernel behind it as if there were no projection
(Bengio et al., https://arxiv.org/abs/1308.3432). What is left in the end are plain layers with projected kernels.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fusion.compat import keras, tf
from fusion.compression.base import (
    Applied,
    Compressed,
    CompressionData,
    FineTuned,
    LayerPatterns,
    Method,
    chosen_layers,
    clone,
    fine_tune,
    kernel_of,
    told,
)
from fusion.compression.codebooks import coded_bytes
from fusion.errors import GateError
from fusion.training.trainer import TrainingSettings

TERNARY_SHARE = 0.7
"""Of a channel's mean magnitude: weights below it become 0 (Li et al., equation 6)."""


class LowBitSettings(FineTuned):
    """Settings of binary and ternary weights."""

    layers: LayerPatterns = ()
    """Dense and convolution layers, by name or pattern; all but the first and the last where none is named."""
    training: TrainingSettings = TrainingSettings(epochs=10, batch_size=64, learning_rate=0.001)
    """The training loop, over the rows that the member was trained on."""


class LowBit(Method):
    """Projects kernels to few levels while it trains; subclasses say which."""

    Config = LowBitSettings

    @staticmethod
    @abc.abstractmethod
    def project(kernel: Any) -> Any:
        """A kernel `[..., channels]` in its levels."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """Fine-tunes with projected kernels and leaves them in plain layers; bytes are counted with codes of their
        levels, in Huffman's code where that is smaller."""
        chosen, alone = chosen_layers(subject.model, self.config.layers, self._why_not(subject.model))
        if not chosen:
            reasons = told(alone)
            raise GateError(
                "a model must have a Dense or convolution layer between its first and its last to have weights of few "
                f"bits; this one has none ({reasons}). Name layers."
            )
        names = {layer.name for layer in chosen}
        trained = clone(subject.model, lambda layer: self._through(layer) if layer.name in names else _copied(layer))
        fine_tune(trained, data, self.config.training)
        model = clone(subject.model)
        model.set_weights(trained.get_weights())
        facts = {}
        for name in sorted(names):
            kernel = kernel_of(model.get_layer(name))
            latent = kernel.numpy()
            kernel.assign(self.project(latent))
            facts[name] = {
                "squared_error": float(np.square(kernel.numpy() - latent).mean()),
                "zeros": float((kernel.numpy() == 0).mean()),
            }
        size = coded_bytes(model, huffman=True)
        changed = replace(subject, model=model, coded_bytes=size, huffman=True)
        return changed, Applied(alone, {"layers": facts, "coded_bytes": size})

    def _why_not(self, model: keras.Model) -> Callable[[keras.layers.Layer], str | None]:
        kernels = [layer.name for layer in model.layers if kernel_of(layer) is not None]

        def why_not(layer: keras.layers.Layer) -> str | None:
            if type(layer) not in _THROUGH:
                return f"is of the kind {type(layer).__name__}; Dense and Conv2D are projected"
            if not self.config.layers and layer.name in (kernels[0], kernels[-1]):
                return "is the first or the last one, which stays in float unless it is named"
            return None

        return why_not

    def _through(self, layer: keras.layers.Layer) -> keras.layers.Layer:
        copy = _THROUGH[type(layer)].from_config(layer.get_config())
        copy.project = self.project
        return copy


class Binary(LowBit):
    """sign(W) · α with one α a channel, the mean of |W|: one bit a weight.

    XNOR-Net's binary weights (Rastegari et al., https://arxiv.org/abs/1603.05279, equation 6); 0 counts as positive.
    """

    @staticmethod
    def project(kernel: Any) -> Any:
        """Levels -α, α."""
        alpha = tf.reduce_mean(tf.abs(kernel), axis=_inputs(kernel), keepdims=True)
        return tf.where(kernel < 0, -alpha, alpha)


class Ternary(LowBit):
    """{-1, 0, 1} · α: 0 below .7 of a channel's mean of |W|, and α the mean of |W| above it; two bits a weight or less.

    Ternary weight networks (Li et al., https://arxiv.org/abs/1605.04711, equations 5 and 6), a channel at a time.
    """

    @staticmethod
    def project(kernel: Any) -> Any:
        """Levels -α, 0, α."""
        size = tf.abs(kernel)
        threshold = TERNARY_SHARE * tf.reduce_mean(size, axis=_inputs(kernel), keepdims=True)
        kept = tf.cast(size > threshold, size.dtype)
        count = tf.maximum(tf.reduce_sum(kept, axis=_inputs(kernel), keepdims=True), 1.0)
        alpha = tf.reduce_sum(size * kept, axis=_inputs(kernel), keepdims=True) / count
        return tf.sign(kernel) * kept * alpha


def _inputs(kernel: Any) -> list[int]:
    """The axes of a kernel but that of its output channels."""
    return list(range(len(kernel.shape) - 1))


def _copied(layer: keras.layers.Layer) -> keras.layers.Layer:
    return type(layer).from_config(layer.get_config())


class _Through:
    """A layer that uses the projection of its kernel, with a gradient as if it were the kernel itself."""

    project: Callable[[Any], Any]

    def projected(self, kernel: Any) -> Any:
        return kernel + tf.stop_gradient(self.project(kernel) - kernel)


class _ThroughDense(_Through, keras.layers.Dense):
    def call(self, inputs: Any) -> Any:
        outputs = tf.matmul(inputs, self.projected(self.kernel))
        return self.activation(outputs + self.bias if self.use_bias else outputs)


class _ThroughConv2D(_Through, keras.layers.Conv2D):
    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        return super().convolution_op(inputs, self.projected(kernel))


_THROUGH: dict[type, Any] = {keras.layers.Dense: _ThroughDense, keras.layers.Conv2D: _ThroughConv2D}
