"""Well-known image networks by name, with weights of a local file or none: images uint8 `[B, H, W, 3]` -> embedding.

Nothing is fetched from a network. Where there is one, weights are written into a file that this encoder reads, by

    model = tf_keras.applications.ResNet50(include_top=False, weights="imagenet")
    sha256 = write_weights("resnet50", model, "resnet50.npz")

and `weights: resnet50.npz` with `sha256` stands in the config. The `.npz` files that Big Transfer was published in
(github.com/google-research/big_transfer, such as BiT-M-R50x1.npz for `bit_r50x1`) are read as they are.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from fusion.compat import keras
from fusion.config import Settings, expand_path
from fusion.errors import DataError, GateError
from fusion.files import load_arrays, save_arrays, sha256_of
from fusion.registry import nearest
from fusion.submodels.backbone_families import FAMILIES, drawing, network, weight_name
from fusion.submodels.base import FineTune
from fusion.submodels.image_features import LayerNames, PretrainedImage, Views, chosen_maps, embedding, seen
from fusion.types import derive_seed

layers = keras.layers

NONE = "none"
_DRAWN = 96
"""The side of images, in pixels, for which every network can be drawn; shapes of weights do not depend on it."""


class Backbone(Settings):
    """One network and the layers of it that the embedding is made of."""

    name: str
    """Which network: resnet50, densenet121, mobilenet_v2, ..."""
    weights: str = NONE
    """Where training starts: an `.npz` file that `write_weights` wrote, or Big Transfer's as it was published; `none`
    for random weights."""
    sha256: str = pydantic.Field("", pattern="^([0-9a-f]{64})?$")
    """Of the file of weights; it is checked before the file is read."""
    layers: LayerNames = ()
    """Layers whose maps of features are averaged and laid side by side (Hariharan et al. 2015, arXiv:1411.5752); the
    last one where none is named."""

    @pydantic.field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        if name not in FAMILIES:
            raise ValueError(f"{nearest(name, FAMILIES)} There is no backbone '{name}'")
        return name

    @pydantic.model_validator(mode="after")
    def _file_and_its_hash(self) -> Backbone:
        if self.weights != NONE and not self.weights.endswith(".npz"):
            raise ValueError(
                f"weights must be none or an .npz file; received '{self.weights}'. "
                "Convert the model by fusion.submodels.image_backbone.write_weights"
            )
        if (self.weights == NONE) != (self.sha256 == ""):
            raise ValueError("sha256 belongs to a file of weights, and every such file needs it: see sha256sum")
        return self


class ImageBackbone(PretrainedImage):
    """One of `FAMILIES`, or several side by side over the same image, frozen or fine-tuned.

    BatchNormalization with weights of a file is never trained, also when its block is: with the few images of a
    fine-tuning run its statistics would be worse than those of the many images before.
    """

    not_in_fingerprint = PretrainedImage.not_in_fingerprint | {"weights", "sha256"}

    class Config(Backbone):
        """Settings of a backbone."""

        image_size: int = pydantic.Field(160, ge=32, le=640)
        """Side of the square images in pixels; most weights were trained with 224, less is faster."""
        fine_tune: FineTune = 0
        """What is trained: 0 nothing (features are computed once), n the last n blocks (of each network), all
        everything."""
        views: Views = Views()
        """Further views of an image, over which the embedding is averaged."""
        beside: tuple[Backbone, ...] = pydantic.Field((), max_length=4)
        """Further networks over the same image; their embeddings are laid side by side."""

        @property
        def backbones(self) -> tuple[Backbone, ...]:
            """All networks."""
            return (self, *self.beside)

        @pydantic.model_validator(mode="after")
        def _fits(self) -> ImageBackbone.Config:
            if self.fine_tune != "all" and any(backbone.weights == NONE for backbone in self.backbones):
                raise ValueError(
                    "weights: none must be trained, so it needs fine_tune: all; to keep them as they are, name a file"
                )
            for backbone in self.backbones:
                if self.image_size < FAMILIES[backbone.name].smallest:
                    raise ValueError(
                        f"{backbone.name} reads images of {FAMILIES[backbone.name].smallest} pixels or more"
                    )
            return self

    def _build(self) -> keras.Model:
        config = self.config
        image = layers.Input((config.image_size, config.image_size, 3), dtype="uint8", name="image")
        x, seed, chosen = seen(image, config.views), derive_seed(self.seed, "image_backbone"), []
        for number, backbone in enumerate(config.backbones):
            chosen += chosen_maps(network(backbone.name, x, _prefix(number), seed), backbone.layers)
        encoder = keras.Model(image, embedding(chosen, config.views), name="image_backbone")
        for number, backbone in enumerate(config.backbones):
            if backbone.weights != NONE:
                _load(_layers_of(encoder, number), backbone, _prefix(number))
        return encoder

    def blocks(self) -> list[list[keras.layers.Layer]]:
        """Of several networks the last blocks are one block, those before them one, and so on."""
        each = [
            _blocks(_layers_of(self.encoder(), number), backbone, _prefix(number))
            for number, backbone in enumerate(self.config.backbones)
        ]
        from_the_end = itertools.zip_longest(*(reversed(blocks) for blocks in each), fillvalue=[])
        return [[layer for block in level for layer in block] for level in from_the_end][::-1]


def _prefix(number: int) -> str:
    """What the names of the layers of one network begin with."""
    return f"beside{number}_" if number else ""


def _layers_of(encoder: keras.Model, number: int) -> list[keras.layers.Layer]:
    """The layers with weights, and those between them, of one of the networks."""
    ours = re.compile(_prefix(number) if number else r"(?!beside\d)")
    return [layer for layer in encoder.layers if ours.match(layer.name)]


def _blocks(of_one: list[keras.layers.Layer], backbone: Backbone, prefix: str) -> list[list[keras.layers.Layer]]:
    blocks: list[list[keras.layers.Layer]] = [[]]
    for layer in of_one:
        pretrained_norm = isinstance(layer, layers.BatchNormalization) and backbone.weights != NONE
        if layer.weights and not pretrained_norm:
            blocks[-1].append(layer)
        if re.fullmatch(FAMILIES[backbone.name].ends, layer.name.removeprefix(prefix)):
            blocks.append([])
    return [block for block in blocks if block]


# ---- files of weights ----------------------------------------------------------------------------------------


def write_weights(name: str, model: keras.Model, path: str | Path) -> str:
    """Writes the weights of a model of `tf_keras.applications` into an `.npz` file, as arrays `LAYER/WEIGHT`.

    Args:
        name: what this encoder calls the network, a key of `FAMILIES`.
        model: made with `include_top=False`, of any image size.
        path: of the file, which ends in `.npz`.

    Returns:
        The file's SHA-256 (hex), for the config.

    Raises:
        DataError: the model is another network.
        MachineError: the file cannot be written.
    """
    drawn = [d for d in drawing(name, _DRAWN) if d.weights and not issubclass(d.kind, layers.Normalization)]
    given = [layer for layer in model.layers if layer.weights and not isinstance(layer, layers.Normalization)]
    arrays: dict[str, np.ndarray] = {}
    for ours, theirs in itertools.zip_longest(drawn, given):
        wanted = [list(shape) for _, shape in ours.weights] if ours else "no layer"
        received = [list(weight.shape) for weight in theirs.weights] if theirs else "no layer"
        if wanted != received:
            raise DataError(
                f"the model must be {name} without its classes, which has {wanted} in place of "
                f"{(theirs or ours).name}; received {received}. Make it by keras.applications with include_top=False."
            )
        for (weight, _), array in zip(ours.weights, theirs.get_weights(), strict=True):
            arrays[FAMILIES[name].key(ours.name, weight)] = array
    save_arrays(path, arrays)
    return sha256_of(path)


def _load(of_one: list[keras.layers.Layer], backbone: Backbone, prefix: str) -> None:
    """Gives the layers of one network the arrays of its file, which may hold more."""
    path = expand_path(backbone.weights)
    if not path.is_file():
        raise DataError(f"the weights of {backbone.name} must be a file; {path} is not there. Set weights to its path.")
    if (found := sha256_of(path)) != backbone.sha256:
        raise GateError(
            f"{path} must have SHA-256 {backbone.sha256}; it has {found}. "
            "The file is damaged or another one: copy it again, or set sha256 if it is meant."
        )
    arrays = load_arrays(path)
    family = FAMILIES[backbone.name]
    turned = family.scaling == "caffe"
    for layer in of_one:
        if not layer.weights:
            continue
        read = [
            _array(arrays, family.key(layer.name.removeprefix(prefix), weight_name(weight)), weight, path)
            for weight in layer.weights
        ]
        if turned:  # the first kernel: from blue, green, red to red, green, blue
            read[0], turned = read[0][:, :, ::-1], False
        layer.set_weights(read)


def _array(arrays: dict[str, np.ndarray], key: str, weight: Any, path: Path) -> np.ndarray:
    array = arrays.get(key)
    if array is None or array.shape != weight.shape:
        raise DataError(
            f"{path} must hold {key} of shape {list(weight.shape)}; it has "
            f"{'no such array' if array is None else list(array.shape)}. Take the file of the network that is named."
        )
    return array
