"""Layers that reckon in float32 as if in int8, so that training sees what quantisation does to a model.

Jacob et al. 2018, https://arxiv.org/abs/1712.05877: what passes is rounded to 255 or 256 steps of a range, and
gradients go through unchanged where nothing is clipped. Kernels have the range of their largest weight, for each output
channel of a convolution; activations a moving average of their extremes. The wrapper and both quantisers are TFMOT's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusion.compat import keras, tf, tfmot
from fusion.compression.base import kernel_of

_quantization: Any = tfmot().quantization.keras
_quantizers: Any = _quantization.quantizers

MOST_VALUES = 256
"""A kernel (or each of its output channels) with more distinct values was not clustered: int8 has no more."""


@keras.utils.register_keras_serializable("fusion")
class SimulatedInt8(keras.layers.Layer):
    """Rounds what passes to the 256 numbers of int8 between two bounds, which follow its extremes while training."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._quantizer = _quantizers.MovingAverageQuantizer(8, per_axis=False, symmetric=False, narrow_range=False)

    def build(self, input_shape: Any) -> None:
        self._range = self._quantizer.build(input_shape, "output", self)
        super().build(input_shape)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        return self._quantizer(inputs, bool(training), self._range)

    def set_range(self, low: float, high: float) -> None:
        """Sets the bounds; zero is always between them, because padding and ReLU need it exactly."""
        low, high = min(low, 0.0), max(high, 0.0)
        self._range["min_var"].assign(low)
        self._range["max_var"].assign(high if high > low else 1.0)  # what is always 0 has any range


@keras.utils.register_keras_serializable("fusion")
class Fold(keras.layers.Layer):
    """All axes but the last become one: `[B, L, H]` -> `[B * L, H]`. LiteRT has int8 products of matrices only."""

    def call(self, inputs: Any) -> Any:
        return tf.reshape(inputs, (-1, inputs.shape[-1]))


@keras.utils.register_keras_serializable("fusion")
class Unfold(keras.layers.Layer):
    """Undoes `Fold`: `[B * L, D]` and what was folded, `[B, L, H]`, -> `[B, L, D]`."""

    def call(self, inputs: Any) -> Any:
        rows, folded = inputs
        unfolded = tf.reshape(rows, tf.concat([tf.shape(folded)[:-1], [rows.shape[-1]]], axis=0))
        unfolded.set_shape([*folded.shape[:-1], rows.shape[-1]])
        return unfolded


@dataclass(frozen=True)
class Structure:
    """What a kernel owes to earlier steps, read off its weights.

    Attributes:
        mask: 0 where a weight is zero, else 1, of the kernel's shape; None for a kernel without zeros. Training makes
            none: zeros were pruned, or are so few that it costs nothing to keep them.
        groups: for each weight in C order the number of the value that it shares with others, int32 `[n]`; None for a
            kernel that is not clustered.
    """

    mask: np.ndarray | None
    groups: np.ndarray | None

    @classmethod
    def of(cls, kernel: np.ndarray) -> Structure:
        """Reads the structure of a kernel whose last axis is that of output channels."""
        mask = (kernel != 0).astype(np.float32) if (kernel == 0).any() else None
        return cls(mask, _groups(kernel))

    @property
    def kept(self) -> str:
        """In words: what is kept."""
        return " and ".join(
            word for word, part in (("zeros", self.mask), ("shared values", self.groups)) if part is not None
        )

    def project(self, kernel: Any) -> Any:
        """The nearest kernel with this structure: shared values are the mean of their weights, pruned ones are 0."""
        if self.groups is not None:
            count = int(self.groups.max()) + 1
            means = tf.math.unsorted_segment_mean(tf.reshape(kernel, [-1]), self.groups, count)
            kernel = tf.reshape(tf.gather(means, self.groups), kernel.shape)
        return kernel if self.mask is None else kernel * self.mask


def _groups(kernel: np.ndarray) -> np.ndarray | None:
    """Which weights share a value: within the kernel if it has few values, else within each of its channels."""
    if _is_clustered(kernel.ravel()):
        return np.unique(kernel, return_inverse=True)[1].reshape(-1).astype(np.int32)
    channels = kernel.reshape(-1, kernel.shape[-1]).T
    if not all(_is_clustered(channel) for channel in channels):
        return None
    numbers, count = np.empty(channels.shape, np.int32), 0
    for number, channel in zip(numbers, channels, strict=True):
        values, number[:] = np.unique(channel, return_inverse=True)
        number += count
        count += len(values)
    return numbers.T.ravel()


def _is_clustered(weights: np.ndarray) -> bool:
    """Whether values repeat so often that it is no accident. Zeros do not count: pruning makes them."""
    weights = weights[weights != 0]
    return len(np.unique(weights)) <= min(MOST_VALUES, len(weights) // 2)


class KernelQuantizer(_quantizers.LastValueQuantizer):
    """TFMOT's quantiser of kernels, symmetric about 0, that keeps the structure of the kernel while it is trained.

    TFMOT has schemes for that (prune-preserving, cluster-preserving). They are not used, because a single quantiser
    stands for all layers there, and the first layer without zeros switches off that zeros are kept in all of them; and
    because channels whose numbers of values differ by more than one lose their own values. Here weights that share a
    value move together, by the mean of their gradients (Han et al. 2016, https://arxiv.org/abs/1510.00149, figure 3).
    """

    def __init__(self, structure: Structure, per_axis: bool) -> None:
        super().__init__(num_bits=8, per_axis=per_axis, symmetric=True, narrow_range=True)
        self.structure = structure

    def __call__(self, inputs: Any, training: bool, weights: Any, **kwargs: Any) -> Any:
        inputs = self.structure.project(inputs) if training else inputs
        return super().__call__(inputs, training, weights, **kwargs)


class _KernelConfig(_quantization.QuantizeConfig):
    """Tells TFMOT's wrapper to quantise one variable of a layer, and nothing else."""

    def __init__(self, name: str, quantizer: KernelQuantizer) -> None:
        self._name, self._quantizer = name, quantizer

    def get_weights_and_quantizers(self, layer: keras.layers.Layer) -> list[Any]:
        return [(getattr(layer, self._name), self._quantizer)]

    def set_quantize_weights(self, layer: keras.layers.Layer, quantize_weights: list[Any]) -> None:
        setattr(layer, self._name, quantize_weights[0])

    def get_activations_and_quantizers(self, layer: keras.layers.Layer) -> list[Any]:
        return []

    def set_quantize_activations(self, layer: keras.layers.Layer, quantize_activations: list[Any]) -> None:
        """There are none: ranges of activations belong to `SimulatedInt8`."""

    def get_output_quantizers(self, layer: keras.layers.Layer) -> list[Any]:
        return []

    def get_config(self) -> dict[str, Any]:
        return {}


class QuantizedKernel(_quantization.QuantizeWrapperV2):
    """A layer whose kernel is rounded to int8 whenever it is used; it has the name of the layer."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        kernel = kernel_of(layer)
        name = next(name for name, value in vars(layer).items() if value is kernel)
        structure = Structure.of(kernel.numpy())
        per_axis = isinstance(layer, keras.layers.Conv2D | keras.layers.DepthwiseConv2D)
        super().__init__(layer, _KernelConfig(name, KernelQuantizer(structure, per_axis)), name_prefix="")
        self._kernel_name, self.structure = name, structure

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        outputs = super().call(inputs, training=bool(training))
        ((kernel, quantizer, bounds),) = self._weight_vars
        # TFMOT leaves a tensor of the graph in the place of the variable, where it is of no use to anybody.
        setattr(self.layer, self._kernel_name, kernel)
        if isinstance(self.layer, keras.layers.Embedding):
            # Changes nothing, but tells the converter that rows have the table's scale: with another one, LiteRT would
            # scale the whole table again whenever it runs.
            return quantizer(outputs, False, bounds)
        return outputs

    def settle(self) -> None:
        """Rounds the kernel itself, by the range that it has now; the last step of training changed both."""
        ((kernel, quantizer, bounds),) = self._weight_vars
        kernel.assign(quantizer(kernel, True, bounds))
