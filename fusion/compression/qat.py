"""Quantisation-aware training: a model learns with weights and activations rounded to int8, as LiteRT rounds them.

Where the rounding stands is decided here, because TFMOT's own layout leaves kernels in float32 without a word: those
of a `Dense` before a `ReLU`, and all with an input of rank 3, as in a transformer. It also refuses a whole model for
inputs of integers, or for one layer that it does not know.

A kernel becomes int8 in the file when its input, itself and its output are rounded and its input is a matrix or an
image. So each chosen layer rounds what it reads, inputs of rank 3 are folded around it, and what runtimes fuse into one
kernel (convolution, BatchNormalization, ReLU) is rounded once, behind its last part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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
    input_names,
)
from fusion.compression.codebooks import coded_bytes
from fusion.compression.fake_quantization import Fold, QuantizedKernel, SimulatedInt8, Unfold
from fusion.errors import GateError
from fusion.export.tflite import Conversion
from fusion.types import Features

layers = keras.layers

_CONVOLUTIONS = (layers.Conv2D, layers.DepthwiseConv2D)
_KERNELS = (*_CONVOLUTIONS, layers.Dense, layers.Embedding)
_DROPOUTS = (layers.Dropout, layers.SpatialDropout1D, layers.SpatialDropout2D)

_PASSING = (layers.MaxPooling2D, layers.GlobalMaxPooling2D, layers.Reshape, layers.Flatten, layers.Permute)
"""They only choose and move numbers: what is rounded stays rounded."""

_RECKONING = (layers.Add, layers.Concatenate, layers.AveragePooling2D, layers.GlobalAveragePooling2D)
"""LiteRT does them in int8 where all their inputs and their output are rounded."""

OUTLIER = 4.0
"""How often a channel's largest magnitude may be that of the middle channel before it counts as an outlier."""

_BATCH = 32
"""Rows at a time when the ranges of activations are read."""


class Qat(Method):
    """Trains with simulated int8 what has a kernel: convolutions, depthwise ones, Dense and embeddings, and what lies
    between them.

    Everything else stays in float32, as attention and LayerNormalization do. Zeros and shared values of kernels that
    were pruned or clustered before are kept. All weights are trained, also of layers that were frozen, but for frozen
    statistics of BatchNormalization. Dropout is left out: rounding is noise enough.
    """

    class Config(FineTuned):
        """Settings of quantisation-aware training."""

        layers: LayerPatterns = ()
        """Layers with a kernel that are quantised, by name or pattern; all where none is named."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        plain = _plain(subject.model)
        chosen, alone = chosen_layers(plain, self.config.layers, _why_not, smallest=1)
        if not chosen:
            raise GateError(
                "quantisation-aware training needs a Conv2D, DepthwiseConv2D, Dense or Embedding layer; "
                f"{subject.model.name} has none that it may work on. Use dynamic or full-integer quantisation after "
                "training."
            )
        names = {layer.name for layer in chosen}
        plain, scaled = _without_outliers(plain, names, data.representative)
        simulated = _Simulated(plain, names)
        simulated.read_ranges(data.representative)
        fine_tune(simulated.model, data, self.config.training)
        for kernel in simulated.kernels:
            kernel.settle()
        facts = {
            "quantised": [kernel.name for kernel in simulated.kernels],
            "kept": {kernel.name: kernel.structure.kept for kernel in simulated.kernels if kernel.structure.kept},
            "in_float": simulated.in_float,
            "outlier_channels": scaled,
            "without": [layer.name for layer in subject.model.layers if isinstance(layer, _DROPOUTS)],
        }
        alone = {name: reason for name, reason in alone.items() if name not in simulated.folded}
        # What an earlier step counted was of other numbers.
        coded = None if subject.coded_bytes is None else coded_bytes(simulated.model, subject.huffman)
        result = replace(subject, model=simulated.model, conversion=Conversion("int8"), coded_bytes=coded)
        return result, Applied(alone, facts)


def _why_not(layer: keras.layers.Layer) -> str | None:
    if type(layer) not in _KERNELS:
        return f"is a {type(layer).__name__}, which is not trained in int8"
    return None


# ---- the model as it is quantised ------------------------------------------------------------------------------


def _plain(model: keras.Model) -> keras.Model:
    """A copy in float32 without dropout, in which activations that no runtime fuses are layers of their own."""
    source = clone(model)

    def call(layer: keras.layers.Layer, inputs: list[Any]) -> Any:
        if isinstance(layer, _DROPOUTS):
            return inputs[0]
        config = layer.get_config()
        if str(layer.dtype_policy.name).startswith("mixed"):
            config["dtype"] = "float32"  # ranges of float16 cannot be rounded by TensorFlow's operations
        apart = None
        if type(layer) in _KERNELS and not _is_relu(layer) and config.get("activation", "linear") != "linear":
            apart, config["activation"] = config["activation"], "linear"
        # Rounding has to be compensated by all weights; statistics of BatchNormalization that were frozen remain so.
        config["trainable"] = layer.trainable or not isinstance(layer, layers.BatchNormalization)
        outputs = _called(type(layer).from_config(config), inputs)
        return layers.Activation(apart, name=f"{layer.name}_activation")(outputs) if apart else outputs

    inputs = {
        name: layers.Input(tensor.shape[1:], dtype=tensor.dtype, name=name)
        for name, tensor in zip(input_names(source), source.inputs, strict=True)
    }
    plain = keras.Model(list(inputs.values()), _walked(source, inputs, call), name=model.name)
    for layer in plain.layers:
        if layer.weights:
            layer.set_weights(source.get_layer(layer.name).get_weights())
    return plain


def _without_outliers(
    plain: keras.Model, names: set[str], representative: Features
) -> tuple[keras.Model, dict[str, int]]:
    """The same function with smaller outliers where a transformer has them, and in how many channels, by layer.

    A few channels of what feed-forward layers add to the residual stream are a hundred times as large as the others,
    which one range for all would round to zero (Bondarenko et al. 2021, https://arxiv.org/abs/2109.12948). Such
    columns of the kernel are divided by a power of two, and what comes out is multiplied again in float32.
    """

    def adds_to_stream(layer: keras.layers.Layer) -> bool:
        consumers = [node.layer for node in layer.outbound_nodes]
        return (
            layer.name in names
            and isinstance(layer, layers.Dense)
            and len(layer.output.shape) > 2
            and all(isinstance(consumer, layers.Add) for consumer in consumers)
        )

    peaks = _extremes(plain, [layer for layer in plain.layers if adds_to_stream(layer)], representative)
    scales = {}
    for name, peak in peaks.items():
        excess = peak / (OUTLIER * max(float(np.median(peak)), 1e-6))
        if excess.max() > 1:
            scales[name] = 2.0 ** np.ceil(np.log2(np.maximum(excess, 1)))
    if not scales:
        return plain, {}

    def call(layer: keras.layers.Layer, inputs: list[Any]) -> Any:
        output = _called(layer, inputs)
        if layer.name not in scales:
            return output
        scale = scales[layer.name]
        layer.set_weights([weight / scale for weight in layer.get_weights()])
        return layers.Rescaling(scale.tolist(), name=f"{layer.name}_scale")(output)

    inputs = dict(zip(input_names(plain), plain.inputs, strict=True))
    balanced = keras.Model(plain.inputs, _walked(plain, inputs, call), name=plain.name)
    return _plain(balanced), {name: int((scale > 1).sum()) for name, scale in scales.items()}


def _extremes(model: keras.Model, watched: list[keras.layers.Layer], representative: Features) -> dict[str, np.ndarray]:
    """The largest magnitude in each channel of what some layers give, by layer."""
    if not watched:
        return {}
    seen = keras.Model(model.inputs, [layer.output for layer in watched])

    @tf.function(reduce_retracing=True)
    def peaks(inputs: Any) -> Any:
        outputs = tf.nest.flatten(seen(inputs))
        return [tf.reduce_max(tf.abs(x), axis=list(range(len(x.shape) - 1))) for x in outputs]

    batches = [peaks(batch) for batch in _batches(model, representative)]
    return {
        layer.name: np.max([peak.numpy() for peak in parts], axis=0)
        for layer, parts in zip(watched, zip(*batches, strict=True), strict=True)
    }


def _batches(model: keras.Model, representative: Features) -> Iterator[dict[str, tf.Tensor]]:
    names = input_names(model)
    for start in range(0, len(representative[names[0]]), _BATCH):
        yield {name: tf.constant(representative[name][start : start + _BATCH]) for name in names}


def _walked(model: keras.Model, inputs: Mapping[str, Any], call: Callable[[keras.layers.Layer, list[Any]], Any]) -> Any:
    """What comes out of a model whose layers are called in another way.

    Args:
        model: a flat functional model with one output.
        inputs: what goes in, by name.
        call: a layer and what goes into it, as the calls before it gave it -> what comes out of it.
    """
    made = {id(tensor): inputs[name] for name, tensor in zip(input_names(model), model.inputs, strict=True)}
    for layer in model.layers:
        if isinstance(layer, layers.InputLayer):
            continue
        if len(layer.inbound_nodes) > 1:
            raise GateError(
                f"quantisation-aware training needs a model that calls each layer once; '{layer.name}' is called "
                f"{len(layer.inbound_nodes)} times. Quantise it after training."
            )
        output = layer.output  # of this call alone: the layer may be called again
        made[id(output)] = call(layer, [made[id(tensor)] for tensor in tf.nest.flatten(layer.input)])
    return made[id(model.output)]


def _called(layer: keras.layers.Layer, inputs: list[Any]) -> Any:
    return layer(inputs if len(inputs) > 1 else inputs[0])


def _is_relu(layer: keras.layers.Layer) -> bool:
    """Whether it is ReLU or ReLU6, which runtimes fuse into the layer before, or has such an activation itself."""
    if isinstance(layer, layers.ReLU):
        plain = float(layer.negative_slope) == 0.0 and float(layer.threshold) == 0.0
        return plain and layer.max_value in (None, 6.0)
    return getattr(layer, "activation", None) in (keras.activations.relu, tf.nn.relu6)


# ---- where it is rounded ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Value:
    """What a layer gives in the simulated model.

    Attributes:
        tensor: the tensor itself.
        source: the same in the plain model, whose extremes are its range.
        name: of the layer that made it.
        rounded: whether it holds numbers of int8 only.
        open: whether it is part of a fused kernel that is rounded further on.
    """

    tensor: Any
    source: Any
    name: str
    rounded: bool = False
    open: bool = False


class _Simulated:
    """The plain model with its kernels and activations rounded; shares all layers with it.

    Attributes:
        model: the result.
        kernels: its layers with a rounded kernel.
        folded: names of BatchNormalization layers that end up in the kernels before them.
        in_float: names of layers without weights that reckon in float32.
    """

    def __init__(self, plain: keras.Model, chosen: set[str]) -> None:
        self._plain, self._chosen = plain, chosen
        self._roundings: list[tuple[SimulatedInt8, Any]] = []
        self._rounded: dict[int, _Value] = {}  # by the tensor that was rounded
        self._folds: dict[int, Any] = {}
        self.kernels: list[QuantizedKernel] = []
        self.folded: set[str] = set()
        self.in_float: list[str] = []
        self.model = self._build()

    def read_ranges(self, representative: Features) -> None:
        """Sets the range of each rounding to the extremes of what passes there in the plain model, averaged over
        batches. Left to training, they would begin at ±6 and move a thousandth of the way with each step."""
        seen = keras.Model(self._plain.inputs, [source for _, source in self._roundings])

        @tf.function(reduce_retracing=True)
        def extremes(inputs: Any) -> Any:
            return tf.stack([(tf.reduce_min(x), tf.reduce_max(x)) for x in tf.nest.flatten(seen(inputs))])

        batches = [extremes(batch) for batch in _batches(self._plain, representative)]
        bounds = tf.reduce_mean(tf.stack(batches), axis=0).numpy()
        for (rounding, _), (low, high) in zip(self._roundings, bounds, strict=True):
            rounding.set_range(float(low), float(high))

    def _build(self) -> keras.Model:
        plain = self._plain
        self._consumers = {layer.name: [node.layer for node in layer.outbound_nodes] for layer in plain.layers}
        inputs = {
            name: _Value(tensor, tensor, name) for name, tensor in zip(input_names(plain), plain.inputs, strict=True)
        }
        return keras.Model(plain.inputs, _walked(plain, inputs, self._call).tensor, name=plain.name)

    def _call(self, layer: keras.layers.Layer, inputs: list[_Value]) -> _Value:
        source, first = layer.output, inputs[0]
        if layer.name in self._chosen:
            return self._kernel(layer, first, source)
        value = _Value(_called(layer, [value.tensor for value in inputs]), source, layer.name)
        if first.open:
            if isinstance(layer, layers.BatchNormalization):
                self.folded.add(layer.name)
            return self._closed(layer, value)
        if all(value.rounded for value in inputs):
            if isinstance(layer, _PASSING):
                return replace(value, rounded=True)
            if isinstance(layer, _RECKONING) or _is_relu(layer):
                return self._closed(layer, value)
        if not layer.weights:
            self.in_float.append(layer.name)
        return value

    def _kernel(self, layer: keras.layers.Layer, value: _Value, source: Any) -> _Value:
        quantized = QuantizedKernel(layer)
        self.kernels.append(quantized)
        if isinstance(layer, layers.Embedding):  # reads integers, and gives rows of what is rounded
            return _Value(quantized(value.tensor), source, layer.name, rounded=True)
        tensor = self._round(value).tensor
        if len(tensor.shape) == 2 or isinstance(layer, _CONVOLUTIONS):
            return self._closed(layer, _Value(quantized(tensor), source, layer.name))
        product = self._round(_Value(quantized(self._folded(tensor, value.name)), source, layer.name))
        return replace(product, tensor=Unfold(name=f"{layer.name}_unfold")([product.tensor, tensor]))

    def _folded(self, tensor: Any, name: str) -> Any:
        """Several layers may read the same tensor, as those of query, key and value do."""
        if id(tensor) not in self._folds:
            self._folds[id(tensor)] = Fold(name=f"{name}_fold")(tensor)
        return self._folds[id(tensor)]

    def _closed(self, layer: keras.layers.Layer, value: _Value) -> _Value:
        """Rounds the end of a fused kernel; leaves it open where the next layer belongs to it."""
        return replace(value, open=True) if self._goes_on(layer) else self._round(value)

    def _goes_on(self, layer: keras.layers.Layer) -> bool:
        consumers = self._consumers[layer.name]
        if len(consumers) != 1 or layer.name in self._plain.output_names:
            return False
        (consumer,) = consumers
        if isinstance(consumer, layers.BatchNormalization):
            return isinstance(layer, _CONVOLUTIONS) and not _is_relu(layer)  # the converter folds it into these alone
        return isinstance(consumer, layers.ReLU | layers.Activation) and _is_relu(consumer)

    def _round(self, value: _Value) -> _Value:
        if value.rounded:
            return value
        if id(value.tensor) not in self._rounded:
            rounding = SimulatedInt8(name=f"quant_{value.name}")
            self._roundings.append((rounding, value.source))
            self._rounded[id(value.tensor)] = replace(value, tensor=rounding(value.tensor), rounded=True, open=False)
        return self._rounded[id(value.tensor)]
