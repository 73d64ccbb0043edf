"""What image encoders share: several views of one image, and the layers that an embedding is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.errors import ConfigError
from fusion.registry import nearest
from fusion.submodels.base import Pretrained, check_images
from fusion.types import Features

layers = keras.layers

LayerNames = Annotated[tuple[Annotated[str, pydantic.Field(min_length=1)], ...], pydantic.Field(max_length=64)]
"""Layers of a network by name. The beginning of names up to an underscore stands for the last of these layers:
`conv4` of a ResNet for `conv4_block6_out`, `block3` of a VGG for `block3_pool`."""


class Views(Settings):
    """Views of an image whose embeddings are averaged, beside the one of the whole image; none by default.

    They are made inside the graph wherever the encoder is not being trained, so that what is served sees them too, and
    takes as many times longer as there are views. A training step sees the whole image once. Under a linear head the
    mean of the embeddings gives the mean of the logits.
    """

    flip: bool = False
    """Whether each view is also seen mirrored left to right."""
    zooms: tuple[Annotated[float, pydantic.Field(ge=0.1, lt=1)], ...] = pydantic.Field((), max_length=8)
    """Further views: of each, the share of the image's side that is kept around the centre and enlarged to the whole;
    0.5 shows things at twice their size."""

    @property
    def count(self) -> int:
        """V, how many views there are."""
        return (1 + len(self.zooms)) * (1 + self.flip)


class PretrainedImage(Pretrained):
    """A pretrained encoder of images; its `Config` has `image_size`, `fine_tune` and `views`."""

    modality: ClassVar[Literal["text", "image"]] = "image"

    def __init__(self, config: Any, seed: int) -> None:
        super().__init__(config, seed)
        self.by_row = config.views.count == 1

    def prepare(self, values: Sequence[Any], fixed_length: bool = False) -> Features:
        """Images uint8 `[N, image_size, image_size, 3]` -> `{"image": the same}`; scaling is in the encoder."""
        return {"image": check_images(values, self.config.image_size)}


@keras.utils.register_keras_serializable("fusion")
class SeeViews(keras.layers.Layer):
    """Images `[B, H, W, 3]` -> their views, float `[V * B, H, W, 3]`, the whole images first; in training those alone.

    Args:
        flip: see `Views`.
        zooms: see `Views`.
    """

    def __init__(self, flip: bool, zooms: Sequence[float], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.flip = flip
        self.zooms = tuple(zooms)

    def call(self, inputs: Any, training: Any = None) -> Any:
        images = tf.cast(inputs, self.compute_dtype)
        if training:
            return images
        views = [images, *(_zoomed(images, zoom) for zoom in self.zooms)]
        if self.flip:
            views += [tf.reverse(view, axis=[2]) for view in views]
        return tf.concat(views, axis=0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "flip": self.flip, "zooms": self.zooms}


def _zoomed(images: Any, zoom: float) -> Any:
    height, width = images.shape[1:3]
    kept_height, kept_width = max(1, round(zoom * height)), max(1, round(zoom * width))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    part = images[:, top : top + kept_height, left : left + kept_width]
    return tf.cast(tf.image.resize(part, (height, width)), images.dtype)  # bilinear


@keras.utils.register_keras_serializable("fusion")
class MeanOfViews(keras.layers.Layer):
    """Embeddings of views `[V * B, D]` -> their means `[B, D]`; in training there is one view, and nothing to do."""

    def __init__(self, count: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count = count

    def call(self, inputs: Any, training: Any = None) -> Any:
        if training:
            return inputs
        return tf.reduce_mean(tf.reshape(inputs, [self.count, -1, inputs.shape[-1]]), axis=0)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "count": self.count}


def seen(image: Any, views: Views) -> Any:
    """The input of an image encoder as its network reads it: itself, or its views."""
    return SeeViews(views.flip, views.zooms, name="views")(image) if views.count > 1 else image


def embedding(maps: Sequence[Any], views: Views) -> Any:
    """The tensor `embedding` float32 `[B, D]`: each map of features `[V * B, H, W, C]` averaged over its places, these
    means side by side, averaged over the views."""
    joined = "pooled" if views.count > 1 else "embedding"
    if len(maps) == 1:
        x = _mean(joined)(maps[0])
    else:
        x = layers.Concatenate(name=joined, dtype="float32")([_mean(f"{m.node.layer.name}_mean")(m) for m in maps])
    return MeanOfViews(views.count, name="embedding", dtype="float32")(x) if views.count > 1 else x


def _mean(name: str) -> keras.layers.Layer:
    return layers.GlobalAveragePooling2D(name=name, dtype="float32")


def maps_of(output: Any) -> dict[str, Any]:
    """All maps of features `[B, H, W, C]` that `output` is made of, by the name of their layer, `output` last."""
    made = keras.Model(keras.utils.get_source_inputs(output), output).layers
    return {layer.name: layer.output for layer in made if len(layer.output.shape) == 4 and layer.inbound_nodes}


def chosen_maps(maps: Mapping[str, Any], names: Sequence[str]) -> list[Any]:
    """The maps of features that `names` name (see `LayerNames`); the last one where there are no names.

    Args:
        maps: by name, in the order of the network.
        names: what the settings say.

    Raises ConfigError with the nearest name for one that no layer has, and for a layer that is named twice.
    """
    if not names:
        return [list(maps.values())[-1]]
    found = [_layer(name, list(maps)) for name in names]
    if len(set(found)) < len(found):
        raise ConfigError(
            f"layers must name each layer once; received {', '.join(names)}, which is {', '.join(found)}."
        )
    return [maps[name] for name in found]


def _layer(name: str, known: Sequence[str]) -> str:
    if name in known:
        return name
    begun = [layer for layer in known if layer.startswith(f"{name}_")]
    if not begun:
        words = {*known, *(layer.partition("_")[0] for layer in known)}
        raise ConfigError(f"layers: the network has no layer '{name}' with a map of features: {nearest(name, words)}")
    return begun[-1]
