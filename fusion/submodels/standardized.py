"""What stands in for batch normalisation in Big Transfer: standardised kernels and normalised groups of channels."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusion.compat import keras, tf

layers = keras.layers

EPSILON = 1e-10
"""Added to the variance of a kernel, as in the code of Big Transfer."""


@keras.utils.register_keras_serializable("fusion")
class StandardizedConv2D(keras.layers.Conv2D):  # type: ignore[misc]
    """A Conv2D that reads its kernel less its mean and over its deviation, both of each filter (weight standardisation,
    Qiao et al. 2019, arXiv:1903.10520, eq. 5).

    It stands in the graph, so that gradients go through it and learning rates mean what they mean in published recipes:
    a constraint that standardises after each step would move filters by other lengths, and would make of a mean of
    several weights another function. Converters find a constant and keep a plain convolution.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        return super().convolution_op(inputs, standardized(kernel))


@keras.utils.register_keras_serializable("fusion")
class GroupNormalization(keras.layers.GroupNormalization):  # type: ignore[misc]
    """Keras' layer for maps `[B, H, W, C]`, from statistics of channels (Wu and He 2018, arXiv:1803.08494, eq. 1, 7).

    Keras' own goes through a mask of ones and five axes; what the converter makes of that stops in LiteRT where there
    is more than one row ("Output shape must be broadcastable from input shape").
    """

    def call(self, inputs: Any, mask: Any = None) -> Any:
        centred = inputs - self._of_groups(inputs)
        deviation = tf.math.rsqrt(self._of_groups(tf.square(centred)) + self.epsilon)
        return centred * (deviation * self.gamma) + self.beta

    def _of_groups(self, values: Any) -> Any:
        """The mean of each group, `[B, 1, 1, C]`, the same for all its channels."""
        channels = values.shape[-1]
        means = tf.reshape(tf.reduce_mean(values, axis=[1, 2]), [-1, self.groups, channels // self.groups])
        each = tf.zeros_like(means) + tf.reduce_mean(means, axis=2, keepdims=True)
        return tf.reshape(each, [-1, 1, 1, channels])


def standardized(kernel: Any) -> Any:
    """A kernel `[H, W, I, O]` with mean 0 and deviation 1 of each filter; reckoned in float32, in its dtype."""
    wide = tf.cast(kernel, tf.float32)
    mean, variance = tf.nn.moments(wide, axes=[0, 1, 2], keepdims=True)
    return tf.cast((wide - mean) * tf.math.rsqrt(variance + EPSILON), kernel.dtype)


def folded(model: keras.Model) -> keras.Model:
    """The model with plain convolutions of standardised kernels, which are what others may set to zero or round; the
    model itself where it has nothing to fold."""
    if not any(isinstance(layer, StandardizedConv2D) for layer in model.layers):
        return model
    plain = keras.models.clone_model(model, clone_function=_plain)
    for old, new in zip(model.layers, plain.layers, strict=True):
        weights = old.get_weights()
        if isinstance(old, StandardizedConv2D):
            weights[0] = np.asarray(standardized(tf.constant(weights[0])))
        new.set_weights(weights)
    return plain


def _plain(layer: keras.layers.Layer) -> keras.layers.Layer:
    kind = layers.Conv2D if isinstance(layer, StandardizedConv2D) else type(layer)
    return kind.from_config(layer.get_config())
