"""Weight sharing: the weights of a kernel become one of a few values, which are then trained together.

Each weight holds the index of its cluster, so that K values need log2(K) bits a weight in a file that stores indices
(Han et al. 2016, https://arxiv.org/abs/1510.00149, section 3). The wrapper is TFMOT's.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fusion.compat import keras, tfmot
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
from fusion.compression.masks import zeros_in
from fusion.errors import GateError

layers = keras.layers

_CLUSTERABLE = (layers.Conv1D, layers.Conv2D, layers.Dense, layers.Embedding)

MOST_DISTANCES = 2**26
"""TFMOT holds the distance of every weight to every centroid in each step: a quarter of a gigabyte."""


class Cluster(Method):
    """Clusters the kernels and trains their centroids; a kernel then has at most `clusters` distinct values.

    Kernels with zeros of an earlier step keep them: zero is one of their values.
    """

    class Config(FineTuned):
        """Settings of clustering."""

        clusters: int = Field(16, ge=3, le=256)
        """Distinct values of a kernel, zero among them where it has zeros."""
        initialisation: Literal["kmeans++", "linear", "density"] = "kmeans++"
        """Where centroids begin: k-means++; evenly between the extremes; or where weights are dense."""
        per_channel: bool = False
        """Whether each output channel of a Conv2D has `clusters` values of its own, as int8 has a scale for each."""
        huffman: bool = False
        """Whether `coded_bytes`, also after later steps, counts indices in codes of unequal length, frequent values in
        fewer bits."""
        layers: LayerPatterns = ()
        """Layers to cluster, by name or pattern; all that can be where none is named."""

    config: Config

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        chosen, alone = chosen_layers(subject.model, self.config.layers, self._unable)
        if not chosen:
            reasons = told(alone)
            raise GateError(
                f"a model to be clustered must have a layer that fits; none of {len(alone)} with weights does "
                f"({reasons or 'there are none'}). Choose other layers, or fewer clusters."
            )
        names = [layer.name for layer in chosen]
        wrapped = self._wrapped(subject.model, names)
        fine_tune(wrapped, data, self.config.training)
        # The layers that were not wrapped are called for a second time there; those of a clone once.
        model = clone(tfmot().clustering.keras.strip_clustering(wrapped))
        size = coded_bytes(model, self.config.huffman)
        values = {name: len(np.unique(kernel_of(model.get_layer(name)))) for name in names}
        changed = replace(subject, model=model, coded_bytes=size, huffman=self.config.huffman)
        return changed, Applied(alone, {"values": values, "coded_bytes": size})

    def _unable(self, layer: keras.layers.Layer) -> str | None:
        kernel, clusters = kernel_of(layer).numpy(), self.config.clusters
        if type(layer) not in _CLUSTERABLE:
            return f"is a {type(layer).__name__}, which TFMOT does not cluster"
        if kernel.size * clusters > MOST_DISTANCES:
            return f"has {kernel.size} weights, whose distances to {clusters} centroids do not fit into memory"
        parts = _channels(kernel) if self._by_channel(layer) else [kernel]
        if min(np.count_nonzero(part) for part in parts) <= clusters:
            return f"has no more than {clusters} weights that are not zero{' in a channel' if len(parts) > 1 else ''}"
        return None

    def _by_channel(self, layer: keras.layers.Layer) -> bool:
        return self.config.per_channel and isinstance(layer, layers.Conv2D)

    def _wrapped(self, model: keras.Model, names: Collection[str]) -> keras.Model:
        """A copy in which the named layers are wrapped; they are trained, frozen or not."""
        toolkit = tfmot().clustering.keras
        start = toolkit.CentroidInitialization
        kinds = {"kmeans++": start.KMEANS_PLUS_PLUS, "linear": start.LINEAR, "density": start.DENSITY_BASED}
        # `cluster_weights` refuses, with a warning, to cluster the channels of a Conv2D without bias: it takes the size
        # of the last variable for the number of channels.
        with toolkit.cluster_scope():
            wrapper = keras.utils.get_registered_object("ClusterWeights")

        def replaced(layer: keras.layers.Layer) -> keras.layers.Layer:
            new = type(layer).from_config(layer.get_config())
            if layer.name not in names:
                return new
            new.trainable = True
            new.build(layer.input_shape)
            new.set_weights(layer.get_weights())  # centroids are chosen when the wrapper is built
            sparse = zeros_in(kernel_of(layer)) > 0
            return wrapper(
                new, self.config.clusters, kinds[self.config.initialisation], sparse, self._by_channel(layer)
            )

        copy = keras.models.clone_model(model, clone_function=replaced)
        for layer in model.layers:
            if layer.name not in names:
                copy.get_layer(layer.name).set_weights(layer.get_weights())
        return copy


def _channels(kernel: np.ndarray) -> Any:
    return np.moveaxis(kernel, -1, 0)
