"""Kernels in few levels: evenly spaced ones, or a codebook; and the file that holds a whole model in such codes.

The decoded numbers stand in the kernels, so that every runtime runs the result; what gets smaller is the file of codes
(`write_coded`), for storage and transport.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fusion.compat import keras
from fusion.compression.base import (
    Applied,
    Compressed,
    CompressionData,
    LayerPatterns,
    Method,
    chosen_layers,
    clone,
    kernel_of,
)
from fusion.compression.codes import (
    LIMITS,
    Coded,
    codebook,
    error_bound,
    fitted_scale,
    kmeans_levels,
    normal_levels,
    quantile_levels,
    restored,
    size_of,
    squared_error,
    stored,
    uniform,
)
from fusion.compression.huffman import entropy
from fusion.config import Settings
from fusion.errors import GateError
from fusion.files import load_arrays, save_arrays


class CodedSettings(Settings):
    """Settings of methods that write kernels in codes."""

    huffman: bool = False
    """Whether the bytes, also after later steps, are counted with codes of unequal length, frequent levels in fewer
    bits."""
    layers: LayerPatterns = ()
    """Layers whose kernels are coded, by name or pattern; all with at least 256 weights where none is named."""


class Coder(Method):
    """A method that puts each kernel into a code of its own; subclasses fill `code`."""

    @abc.abstractmethod
    def code(self, layer: keras.layers.Layer, kernel: np.ndarray) -> tuple[Coded, dict[str, Any]]:
        """The code of a kernel, and what there is to tell of it beside its squared error."""

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """Codes the kernels of the chosen layers, and counts the bytes of the whole model in codes."""
        chosen, alone = chosen_layers(subject.model, self.config.layers)
        if not chosen:
            raise GateError("a model must have a kernel with at least 256 weights to be coded; this one has none.")
        model = clone(subject.model)
        facts = {}
        for layer in chosen:
            kernel = kernel_of(layer).numpy()
            coded, told = self.code(layer, kernel)
            kernel_of(model.get_layer(layer.name)).assign(coded.decode())
            counts = np.bincount(coded.codes.reshape(-1))
            facts[layer.name] = {
                "squared_error": squared_error(kernel, coded),
                **told,
                "levels": int((counts > 0).sum()),
                "entropy": entropy(counts),
            }
        size = coded_bytes(model, self.config.huffman)
        changed = replace(subject, model=model, coded_bytes=size, huffman=self.config.huffman)
        return changed, Applied(alone, {"layers": facts, "coded_bytes": size})


class Uniform(Coder):
    """Evenly spaced levels around 0: n-bit quantisation with a bound on the error, for any number of bits."""

    class Config(CodedSettings):
        """Settings of uniform quantisation."""

        bits: int = Field(8, ge=2, le=8)
        """Bits of a weight; 2^bits - 1 levels are used, as many on either side of 0."""
        per_channel: bool = True
        """Whether each output channel, or row of a table of embeddings, has a range of its own."""
        clip: Literal["none", "mse", "kl"] = "none"
        """Where weights are cut: none at the largest; mse where the expected squared error is least (OCTAV); kl where
        their distribution changes least (TensorRT's entropy calibration)."""

    def code(self, layer: keras.layers.Layer, kernel: np.ndarray) -> tuple[Coded, dict[str, Any]]:
        """The code, `error_bound`, and where weights are cut `unclipped_squared_error` beside it."""
        bits, clip = self.config.bits, self.config.clip
        axis = channel_axis(layer) if self.config.per_channel else None
        limit = None if clip == "none" else LIMITS[clip](kernel, bits, axis)
        coded = uniform(kernel, bits, axis, limit=limit)
        told = {"error_bound": error_bound(kernel, coded)}
        if limit is not None:
            told["unclipped_squared_error"] = squared_error(kernel, uniform(kernel, bits, axis))
        return coded, told


class Codebook(Coder):
    """Levels where the weights are, one codebook a kernel: weights share 2^bits numbers."""

    class Config(CodedSettings):
        """Settings of codebooks."""

        bits: int = Field(4, ge=2, le=8)
        """Bits of an index; 2^bits levels. Depthwise convolutions need many: to what it said before, EfficientNet-Lite0
        keeps a cosine of .35 with 4 bits, .92 with 6, .997 with 8; evenly spaced levels .36 with 4, .993 with 8."""
        levels: Literal["kmeans", "quantile", "normal"] = "kmeans"
        """kmeans: with the least squared error; quantile: means of equal shares, as histogram equalisation; normal:
        quantiles of the normal distribution (NF4 of QLoRA), as wide as the squared error is least."""

    def code(self, layer: keras.layers.Layer, kernel: np.ndarray) -> tuple[Coded, dict[str, Any]]:
        """The code, and `uniform_squared_error`, that of as many bits in evenly spaced levels."""
        bits = self.config.bits
        if self.config.levels == "normal":
            levels = normal_levels(bits)
            levels = (levels * fitted_scale(kernel, levels)).astype(np.float32)
        else:
            levels = (kmeans_levels if self.config.levels == "kmeans" else quantile_levels)(kernel, bits)
        return codebook(kernel, levels), {"uniform_squared_error": squared_error(kernel, uniform(kernel, bits))}


def channel_axis(layer: keras.layers.Layer) -> int:
    """The axis of a kernel's output channels, or of the rows of a table."""
    if isinstance(layer, keras.layers.Embedding):
        return 0
    kernel = kernel_of(layer)
    return len(kernel.shape) - (2 if hasattr(layer, "depthwise_kernel") else 1)


def coded_bytes(model: keras.Model, huffman: bool) -> int:
    """Bytes of all weights of a model, each in the smallest code that gives it back exactly, or else as it is.

    The codes are read off the weights, whatever made their values few: a codebook, clustering, a grid of any step.

    Args:
        model: any.
        huffman: whether indices may have codes of unequal length.
    """
    return sum(size_of(stored(weight, huffman)) for weight in model.get_weights())


def write_coded(model: keras.Model, path: str | Path, huffman: bool = True) -> None:
    """Writes all weights of a model as an `.npz` of their codes, `coded_bytes` and some 250 for each array.

    The arrays are called `<position>/<part>`, by the weight's position in `model.get_weights()`; parts are those of
    `fusion.compression.codes.Coded`, or `values` for a weight as it is.
    """
    arrays: dict[str, np.ndarray] = {}
    for position, weight in enumerate(model.get_weights()):
        arrays |= {f"{position}/{part}": array for part, array in stored(weight, huffman).items()}
    save_arrays(path, arrays)


def read_coded(path: str | Path) -> list[np.ndarray]:
    """The weights that `write_coded` wrote, equal to the bit, as `model.set_weights` takes them.

    Raises GateError when the file is missing, damaged, or holds something else.
    """
    weights: dict[int, dict[str, np.ndarray]] = {}
    for name, array in load_arrays(path).items():
        position, _, part = name.partition("/")
        weights.setdefault(int(position) if position.isdecimal() else -1, {})[part] = array
    if sorted(weights) != list(range(len(weights))):
        raise GateError(f"{path} must hold the codes of a model's weights; it holds other arrays. Write it again.")
    return [_restored(weights[position], path) for position in range(len(weights))]


def _restored(arrays: Mapping[str, np.ndarray], path: str | Path) -> np.ndarray:
    try:
        return restored(arrays)
    except (KeyError, ValueError, IndexError) as error:
        raise GateError(
            f"{path} must hold codes that fit together; reading failed at {error}. Write it again."
        ) from error
