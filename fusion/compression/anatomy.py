"""How each type of layer treats channels, the last axis of what it reads and makes: what surgery has to know of it.

A table maps types of layers to kinds. Types that it does not name need all channels of what they read.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar, Literal

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fusion.compat import keras, tf
from fusion.submodels.image_features import MeanOfViews
from fusion.submodels.text_bert import AddPositions, FirstToken, MaskedMean, ScaledDotProductAttention
from fusion.submodels.text_words import WithoutPadding

layers = keras.layers

Channels = np.ndarray
"""A number for each channel of a tensor, int64 `[C]`; the same number at several places is the same channel."""

Constants = np.ndarray
"""The value that a channel has for every input and at every place, float64 `[C]`; NaN for one that varies."""

_OVER_CHANNELS = ("softmax", "log_softmax")
"""Activations whose value in a channel depends on the other channels."""


class Ledger:
    """Numbers channels, and remembers which live and die together and which have to stay."""

    def __init__(self) -> None:
        self._count = 0
        self._pairs: list[np.ndarray] = [np.empty((2, 0), np.int64)]
        self._held: list[tuple[Channels, str]] = []

    def fresh(self, count: int) -> Channels:
        """Numbers for channels that have none yet."""
        self._count += count
        return np.arange(self._count - count, self._count, dtype=np.int64)

    def unite(self, first: Channels, *others: Channels) -> None:
        """Channels at the same place of these arrays, which are equally long, are cut together or not at all."""
        self._pairs += [np.stack([first, other]) for other in others]

    def hold(self, channels: Channels, reason: str) -> None:
        """These channels stay."""
        self._held.append((channels, reason))

    def units(self) -> tuple[np.ndarray, dict[int, str]]:
        """The unit that each channel belongs to, int64 `[channels]`, and by unit the first reason why it stays."""
        pairs = np.concatenate(self._pairs, axis=1)
        graph = coo_array((np.ones(pairs.shape[1], bool), tuple(pairs)), shape=(self._count, self._count))
        unit = connected_components(graph, directed=False)[1].astype(np.int64)
        held: dict[int, str] = {}
        for channels, reason in self._held:
            for number in np.unique(unit[channels]).tolist():
                held.setdefault(number, reason)
        return unit, held


@dataclass(frozen=True)
class Response:
    """How a layer that mixes channels answers to each of them.

    Attributes:
        used: bool `[I, O]`, whether the output channel depends on the input channel at all.
        sums: float64 `[I, O]`, what a constant 1 in the input channel adds to the output channel.
        everywhere: whether these sums also hold at the borders, where there may be padding with zeros.
    """

    used: np.ndarray
    sums: np.ndarray
    everywhere: bool

    def foldable(self, read: Constants) -> np.ndarray:
        """Which input channels add the same to every place, bool `[I]`."""
        return ~np.isnan(read) & (self.everywhere | (read == 0.0))

    def added(self, read: Constants, which: np.ndarray) -> np.ndarray:
        """What the constant input channels of `which`, bool `[I]`, add together, float64 `[O]`."""
        added: np.ndarray = np.where(which, np.nan_to_num(read), 0.0) @ self.sums
        return added


class Kind(abc.ABC):
    """One way to treat channels; the default is that of a layer without weights that leaves every channel as it is."""

    def refusal(self, node: Any) -> str | None:
        """Why this layer with its settings, called as in `node`, cannot lose channels; None where it can."""
        return _channels_first(node.layer) or _over_channels(node.layer)

    def wire(self, node: Any, read: Sequence[Channels], ledger: Ledger) -> Channels:
        """The channels that the layer makes of those of each tensor that it reads."""
        return read[0]

    def settings(self, layer: keras.layers.Layer, before: int, after: int) -> dict[str, Any]:
        """What of the layer's settings changes when it makes `after` channels in place of `before`."""
        return {}

    def cut(self, weights: list[np.ndarray], read: Sequence[np.ndarray], made: np.ndarray) -> list[np.ndarray]:
        """The weights for the channels that stay: bool for each channel of each tensor read, and of what is made."""
        return weights

    @abc.abstractmethod
    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        """What of the layer's output is constant in inference mode, given what of its inputs is."""


# ---- layers that mix channels: their outputs are channels of their own ------------------------------------------


class Maker(Kind):
    """A layer whose channels are its own."""

    width: ClassVar[str]
    """The setting that says how many there are."""

    @abc.abstractmethod
    def kernel(self, layer: keras.layers.Layer) -> Any:
        """The variable that makes the channels, which are its last axis."""

    def wire(self, node: Any, read: Sequence[Channels], ledger: Ledger) -> Channels:
        made = ledger.fresh(node.outputs.shape[-1])
        if reason := _over_channels(node.layer):
            ledger.hold(made, reason)
        return made

    def settings(self, layer: keras.layers.Layer, before: int, after: int) -> dict[str, Any]:
        return {self.width: after}


class Mixer(Maker):
    """A layer that makes each of its channels out of all that it reads: a matrix product or a convolution."""

    def __init__(self, width: str) -> None:
        self.width = width  # type: ignore[misc]

    def refusal(self, node: Any) -> str | None:
        return _channels_first(node.layer) or ("has groups" if getattr(node.layer, "groups", 1) > 1 else None)

    def kernel(self, layer: keras.layers.Layer) -> Any:
        return layer.kernel

    def response(self, layer: keras.layers.Layer) -> Response:
        """See `Response`."""
        kernel = np.asarray(self.kernel(layer), np.float64)
        kernel = kernel.reshape(-1, *kernel.shape[-2:])
        return Response((kernel != 0.0).any(axis=0), kernel.sum(axis=0), _everywhere(layer))

    def cut(self, weights: list[np.ndarray], read: Sequence[np.ndarray], made: np.ndarray) -> list[np.ndarray]:
        kernel, *bias = weights
        return [kernel[..., read[0], :][..., made], *(each[made] for each in bias)]

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        response = self.response(layer)
        known = response.foldable(read[0])
        value = response.added(read[0], known) + _bias(layer)
        return _applied(layer.activation, np.where(response.used[~known].any(axis=0), np.nan, value))


class SeparableMixer(Mixer):
    """A depthwise convolution and a pointwise one, without anything between them."""

    def kernel(self, layer: keras.layers.Layer) -> Any:
        return layer.pointwise_kernel

    def response(self, layer: keras.layers.Layer) -> Response:
        deep = np.asarray(layer.depthwise_kernel, np.float64)
        deep = deep.reshape(-1, *deep.shape[-2:])  # [places, I, M]
        point = np.asarray(layer.pointwise_kernel, np.float64).reshape(*deep.shape[1:], -1)  # [I, M, O]
        used = np.einsum("im,imo->io", (deep != 0.0).any(axis=0), point != 0.0)
        return Response(used, np.einsum("im,imo->io", deep.sum(axis=0), point), _everywhere(layer))

    def cut(self, weights: list[np.ndarray], read: Sequence[np.ndarray], made: np.ndarray) -> list[np.ndarray]:
        deep, point, *bias = weights
        between = np.repeat(read[0], deep.shape[-1])
        return [deep[..., read[0], :], point[..., between, :][..., made], *(each[made] for each in bias)]


class Table(Maker):
    """A vector for each number; its channels are the places of the vectors."""

    width = "output_dim"

    def refusal(self, node: Any) -> str | None:
        # Such as unit vectors for categories: each place has a meaning.
        return None if node.layer.trainable else "is a table that is not trained"

    def kernel(self, layer: keras.layers.Layer) -> Any:
        return layer.embeddings

    def cut(self, weights: list[np.ndarray], read: Sequence[np.ndarray], made: np.ndarray) -> list[np.ndarray]:
        return [weights[0][:, made]]

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        table = np.asarray(layer.embeddings, np.float64)
        return np.where((table == table[0]).all(axis=0), table[0], np.nan)


# ---- layers that treat each channel alone -----------------------------------------------------------------------


class Depthwise(Kind):
    """A convolution within each channel, which makes `depth_multiplier` channels of it."""

    def wire(self, node: Any, read: Sequence[Channels], ledger: Ledger) -> Channels:
        return np.repeat(read[0], node.layer.depth_multiplier)

    def cut(self, weights: list[np.ndarray], read: Sequence[np.ndarray], made: np.ndarray) -> list[np.ndarray]:
        kernel, *bias = weights
        return [kernel[..., read[0], :], *(each[made] for each in bias)]

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        kernel = np.asarray(layer.depthwise_kernel, np.float64)
        kernel = kernel.reshape(math.prod(kernel.shape[:-2]), -1)  # [places, I * M]
        constant = np.repeat(read[0], layer.depth_multiplier)
        if not _everywhere(layer):
            constant = _zero_only(constant)
        constant = np.where((kernel == 0.0).all(axis=0), 0.0, constant)
        return _applied(layer.activation, constant * kernel.sum(axis=0) + _bias(layer))


class Normalised(Kind):
    """BatchNormalization over the last axis."""

    def refusal(self, node: Any) -> str | None:
        return None if list(node.layer.axis) == [len(node.outputs.shape) - 1] else "normalises another axis"

    def cut(self, weights: list[np.ndarray], read: Sequence[np.ndarray], made: np.ndarray) -> list[np.ndarray]:
        return [weight[made] for weight in weights]

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        mean, variance = (np.asarray(each, np.float64) for each in (layer.moving_mean, layer.moving_variance))
        scale = 1.0 if layer.gamma is None else np.asarray(layer.gamma, np.float64)
        offset = 0.0 if layer.beta is None else np.asarray(layer.beta, np.float64)
        centred = np.where(scale == 0.0, 0.0, read[0] - mean)
        return centred * scale / np.sqrt(variance + layer.epsilon) + offset


class Placed(Kind):
    """Adds a vector for each position."""

    def cut(self, weights: list[np.ndarray], read: Sequence[np.ndarray], made: np.ndarray) -> list[np.ndarray]:
        return [weights[0][:, made]]

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        table = np.asarray(layer.table, np.float64)
        return read[0] + np.where((table == table[0]).all(axis=0), table[0], np.nan)


class Same(Kind):
    """A layer that does the same to every channel: an activation, pooling, dropout, padding.

    Args:
        effect: what it does to a channel that is constant. apply: what it does to any number; keep: nothing; zero:
            nothing to zero, while another number does not stay the same everywhere.
    """

    def __init__(self, effect: Literal["apply", "keep", "zero"]) -> None:
        self._effect = effect

    def refusal(self, node: Any) -> str | None:
        layer = node.layer
        if np.ndim(getattr(layer, "scale", 0.0)) or np.ndim(getattr(layer, "offset", 0.0)):
            return "has a number for each channel"
        return super().refusal(node)

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        if self._effect == "apply":
            return _applied(layer, read[0])
        return read[0] if self._effect == "keep" else _zero_only(read[0])


# ---- layers in which branches meet, or channels change their places ---------------------------------------------


class Merged(Kind):
    """Channels at the same place of several tensors become one, so that they are cut together."""

    def __init__(self, function: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        self._function = function

    def wire(self, node: Any, read: Sequence[Channels], ledger: Ledger) -> Channels:
        widest = max(read, key=len)
        for each in read:
            if len(each) == len(widest):
                ledger.unite(widest, each)
            else:  # one channel that meets all
                ledger.hold(each, f"is the one channel that {node.layer.name} joins to many")
        return widest

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        return reduce(self._function, read)


class Joined(Kind):
    """Channels of several tensors side by side."""

    def refusal(self, node: Any) -> str | None:
        return None if node.layer.axis in (-1, len(node.outputs.shape) - 1) else "joins along another axis"

    def wire(self, node: Any, read: Sequence[Channels], ledger: Ledger) -> Channels:
        return np.concatenate(read)

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        return np.concatenate(read)


class Flattened(Kind):
    """Each channel becomes as many as the tensor has places."""

    def refusal(self, node: Any) -> str | None:
        return _channels_first(node.layer) or ("is of no fixed width" if node.outputs.shape[-1] is None else None)

    def wire(self, node: Any, read: Sequence[Channels], ledger: Ledger) -> Channels:
        return np.tile(read[0], node.outputs.shape[-1] // len(read[0]))

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        return np.tile(read[0], layer.output_shape[-1] // len(read[0]))


class Reshaped(Kind):
    """Places change their order; the channels stay the last axis."""

    def refusal(self, node: Any) -> str | None:
        return None if node.outputs.shape[-1] == node.input_shapes[-1] else "moves channels to another axis"

    def settings(self, layer: keras.layers.Layer, before: int, after: int) -> dict[str, Any]:
        shape = tuple(layer.target_shape)
        return {"target_shape": shape if shape[-1] == -1 else (*shape[:-1], after)}

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        return read[0]


class Heads(Kind):
    """Attention in heads: the channels of a head, in query, key and value, are cut together."""

    def wire(self, node: Any, read: Sequence[Channels], ledger: Ledger) -> Channels:
        query, key, value = read[:3]
        size = len(query) // node.layer.heads
        ledger.unite(np.repeat(query[::size], size), query, key, value)
        return value

    def settings(self, layer: keras.layers.Layer, before: int, after: int) -> dict[str, Any]:
        return {"heads": layer.heads * after // before}

    def constants(self, layer: keras.layers.Layer, read: Sequence[Constants]) -> Constants:
        return read[2]  # weights of attention sum to 1


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product, in which nothing becomes of zero, also where the other factor varies."""
    return np.where((a == 0.0) | (b == 0.0), 0.0, a * b)


def _zero_only(constants: Constants) -> Constants:
    return np.where(constants == 0.0, 0.0, np.nan)


def _applied(function: Callable[[Any], Any], constants: Constants) -> Constants:
    """What an elementwise function makes of the constants, in the numbers that the layer reckons in."""
    values = function(tf.constant(np.nan_to_num(constants)[np.newaxis], tf.float32))
    return np.where(np.isnan(constants), np.nan, np.asarray(values, np.float64)[0])


def _bias(layer: keras.layers.Layer) -> Any:
    return np.asarray(layer.bias, np.float64) if layer.use_bias else 0.0


def _everywhere(layer: keras.layers.Layer) -> bool:
    """Whether the layer pads nothing: every place then sees a whole window."""
    return getattr(layer, "padding", "valid") == "valid" or math.prod(layer.kernel_size) == 1


def _channels_first(layer: keras.layers.Layer) -> str | None:
    return "has its channels first" if getattr(layer, "data_format", None) == "channels_first" else None


def _over_channels(layer: keras.layers.Layer) -> str | None:
    name = getattr(getattr(layer, "activation", None), "__name__", "")
    return f"is a {name} over all channels" if name in _OVER_CHANNELS else None


_POINTWISE, _KEPT, _ZERO, _CONVOLUTION = Same("apply"), Same("keep"), Same("zero"), Mixer("filters")

KINDS: Mapping[type[keras.layers.Layer], Kind] = {
    layers.Dense: Mixer("units"),
    layers.Conv1D: _CONVOLUTION,
    layers.Conv2D: _CONVOLUTION,
    layers.SeparableConv2D: SeparableMixer("filters"),
    layers.DepthwiseConv2D: Depthwise(),
    layers.Embedding: Table(),
    layers.BatchNormalization: Normalised(),
    AddPositions: Placed(),
    layers.Activation: _POINTWISE,
    layers.ReLU: _POINTWISE,
    layers.LeakyReLU: _POINTWISE,
    layers.ELU: _POINTWISE,
    layers.Rescaling: _POINTWISE,
    layers.Dropout: _KEPT,
    layers.SpatialDropout1D: _KEPT,
    layers.SpatialDropout2D: _KEPT,
    layers.MaxPooling1D: _KEPT,
    layers.MaxPooling2D: _KEPT,
    layers.AveragePooling1D: _KEPT,
    layers.AveragePooling2D: _KEPT,
    layers.GlobalMaxPooling1D: _KEPT,
    layers.GlobalMaxPooling2D: _KEPT,
    layers.GlobalAveragePooling1D: _KEPT,
    layers.GlobalAveragePooling2D: _KEPT,
    layers.Cropping2D: _KEPT,
    layers.UpSampling2D: _KEPT,
    MeanOfViews: _KEPT,
    FirstToken: _KEPT,
    layers.ZeroPadding2D: _ZERO,
    MaskedMean: _ZERO,
    WithoutPadding: _ZERO,
    layers.Add: Merged(np.add),
    layers.Subtract: Merged(np.subtract),
    layers.Multiply: Merged(_product),
    layers.Maximum: Merged(np.maximum),
    layers.Minimum: Merged(np.minimum),
    layers.Concatenate: Joined(),
    layers.Flatten: Flattened(),
    layers.Reshape: Reshaped(),
    ScaledDotProductAttention: Heads(),
}
"""By type of layer (not of its subclasses, which may do more), how it treats channels."""


def kind_of(node: Any) -> tuple[Kind | None, str]:
    """How the layer of a node treats channels, or None and why it needs all that it reads and makes."""
    kind = KINDS.get(type(node.layer))
    refusal = kind.refusal(node) if kind else f"is of type {type(node.layer).__name__} and needs all of its channels"
    return (None, refusal) if refusal else (kind, "")
