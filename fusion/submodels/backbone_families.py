"""Image networks by name: how each is built, scales its pixels and divides into blocks; no weights are fetched here.

All but AlexNet and Big Transfer are taken from `tf_keras.applications` as a drawing: it is read layer by layer, and
each layer is made anew with a seed of its own (`network`). So a network is flat over our input whatever the family, and
begins with our scaling instead of the several ways in which families do theirs.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from fusion.compat import keras, tf
from fusion.submodels.standardized import GroupNormalization, StandardizedConv2D
from fusion.types import derive_seed

layers = keras.layers


@dataclass(frozen=True)
class Family:
    """What one name stands for.

    Attributes:
        application: the function of `tf_keras.applications` that draws it; '' for ours.
        scaling: how its published weights want pixels: `tf` from -1 to 1; `torch` from 0 to 1, then standardised with
            ImageNet's mean and deviation; `caffe` with ImageNet's mean taken away, and the channels blue, green, red.
        ends: matches the names of the layers with which a block ends.
        smallest: the least side of an image in pixels.
        options: further arguments of the application.
        units: of a Big Transfer network, the units of each of its blocks.
        width: of such a network, what its channels are multiplied by.
    """

    application: str
    scaling: Literal["tf", "torch", "caffe"]
    ends: str
    smallest: int = 32
    options: dict[str, Any] = field(default_factory=dict)
    units: tuple[int, ...] = ()
    width: int = 1

    def key(self, layer: str, weight: str) -> str:
        """What a file calls a weight of a layer: Big Transfer's published files are read as they are."""
        if not self.units:
            return f"{layer}/{weight}"
        return f"resnet/{_SLASH.sub('/', layer)}/{weight}"


_SLASH = re.compile(r"_(?!block|norm|conv2d)")
"""Where names of Big Transfer's layers have a slash in its files: `resnet/block1/unit01/a/group_norm/gamma`."""
_RESNET = r"pool1_pool|conv\d_block\d+_out"
_EFFICIENT = r"stem_activation|block\d[a-z]_(project_bn|add)"
_BIG_TRANSFER = r"root_pool|(?!block4_unit03)block\d_unit\d+_add"
"""The last block ends with the network, whose last layers normalise what it made."""
_UNSCALED = {"include_preprocessing": False}

FAMILIES: dict[str, Family] = {
    "alexnet": Family("", "torch", r"block\d_relu", 64),
    **{f"vgg{depth}": Family(f"VGG{depth}", "caffe", r"block\d_pool") for depth in (16, 19)},
    **{f"resnet{depth}": Family(f"ResNet{depth}", "caffe", _RESNET) for depth in (50, 101, 152)},
    **{f"resnet{depth}_v2": Family(f"ResNet{depth}V2", "tf", _RESNET) for depth in (50, 101, 152)},
    "inception_v3": Family("InceptionV3", "tf", r"mixed\d+", 75),
    "xception": Family("Xception", "tf", r"block1_conv2_act|add(_\d+)?", 71),
    **{f"densenet{depth}": Family(f"DenseNet{depth}", "torch", r"pool1|pool\d_pool") for depth in (121, 169, 201)},
    "mobilenet": Family("MobileNet", "tf", r"conv1_relu|conv_pw_\d+_relu"),
    "mobilenet_v2": Family("MobileNetV2", "tf", r"Conv1_relu|(expanded_conv|block_\d+)_(project_BN|add)"),
    **{
        f"mobilenet_v3_{size.lower()}": Family(
            f"MobileNetV3{size}",
            "tf",
            r"multiply|expanded_conv(_\d+)?_(project_BatchNorm|Add)",
            options=_UNSCALED,
        )
        for size in ("Small", "Large")
    },
    **{f"efficientnet_b{size}": Family(f"EfficientNetB{size}", "torch", _EFFICIENT) for size in range(8)},
    **{
        f"efficientnet_v2_b{size}": Family(f"EfficientNetV2B{size}", "torch", _EFFICIENT, options=_UNSCALED)
        for size in range(4)
    },
    **{
        f"bit_r{depth}x{width}": Family("", "tf", _BIG_TRANSFER, units=units, width=width)
        for depth, width, units in (
            (50, 1, (3, 4, 6, 3)),
            (50, 3, (3, 4, 6, 3)),
            (101, 1, (3, 4, 23, 3)),
            (101, 3, (3, 4, 23, 3)),
            (152, 2, (3, 8, 36, 3)),
        )
    },
    "nasnet_mobile": Family("NASNetMobile", "tf", r"(normal|reduction)_concat_\w+"),
}

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels from 0 to 1, red, green, blue."""
CAFFE_MEAN = (123.68, 116.779, 103.939)
"""Of ImageNet's pixels from 0 to 255, red, green, blue, as the networks trained in Caffe take it away."""

_LEFT_OUT = (layers.Rescaling, layers.Normalization, layers.Dropout)
"""Layers of a drawing that are not copied: our scaling stands for the first two, and stochastic depth is not done."""


@dataclass(frozen=True)
class Drawn:
    """A layer of a drawing.

    Attributes:
        name: with _ for /, and where Keras numbered it (`conv2d_7`) counted from 0, whatever else was built before.
        kind: its class.
        config: its settings.
        reads: the name of the layer that it reads, or a list of them.
        weights: names and shapes.
    """

    name: str
    kind: type[keras.layers.Layer]
    config: dict[str, Any]
    reads: Any
    weights: tuple[tuple[str, tuple[int, ...]], ...]


def network(name: str, image: Any, prefix: str, seed: int) -> dict[str, Any]:
    """Builds the network `name` over images `[B, H, W, 3]` of pixels from 0 to 255, red, green, blue.

    A network that wants blue, green, red gets them as they are: its first kernel is turned when weights are read.

    Args:
        name: a key of `FAMILIES`.
        image: a Keras tensor.
        prefix: what its layers' names begin with here.
        seed: of the weights; each layer draws its own from it.

    Returns:
        By the names of a drawing, the maps of features `[B, H, W, C]` in their order, the output last.
    """
    first, *rest = drawing(name, image.shape[1])
    tensors = {first.name: _scaling(FAMILIES[name].scaling, f"{prefix}rescaling")(image)}
    maps: dict[str, Any] = {}
    for drawn in rest:
        read = tf.nest.map_structure(lambda layer: tensors[layer], drawn.reads)
        if not issubclass(drawn.kind, _LEFT_OUT):
            read = _copy(drawn, prefix + drawn.name, seed)(read)
            if len(read.shape) == 4:
                maps[drawn.name] = read
        tensors[drawn.name] = read
    return maps


@functools.lru_cache(maxsize=8)
def drawing(name: str, size: int) -> tuple[Drawn, ...]:
    """The layers of a network without its classes as their authors built it, each after those that it reads."""
    family = FAMILIES[name]
    if family.units:
        return _big_transfer(family.units, family.width)
    if family.application:
        build = getattr(keras.applications, family.application)
        model = build(include_top=False, weights=None, input_shape=(size, size, 3), **family.options)
    else:
        model = _alexnet(size)
    names = _names(model.layers)
    return tuple(
        Drawn(
            names[layer.name],
            type(layer),
            layer.get_config(),
            tf.nest.map_structure(lambda tensor: names[tensor.node.layer.name], layer.get_input_at(0)),
            tuple((weight_name(weight), tuple(weight.shape)) for weight in layer.weights),
        )
        for layer in model.layers
    )


def _is_operation(kind: type[keras.layers.Layer]) -> bool:
    """Whether it is what Keras makes of an operation that is written without a layer."""
    return kind.__name__ == "TFOpLambda"


def weight_name(weight: Any) -> str:
    """The name that a weight has in its layer: `kernel` of `conv1/kernel:0`."""
    return str(weight.name.rpartition("/")[2].partition(":")[0])


def _names(of_model: list[keras.layers.Layer]) -> dict[str, str]:
    """What each layer is called in a drawing."""
    numbered: dict[str, list[tuple[int, str]]] = {}
    names: dict[str, str] = {}
    for layer in of_model:
        word, _, number = layer.name.rpartition("_") if re.search(r"_\d+$", layer.name) else (layer.name, "", "0")
        if word.replace("_", "") == type(layer).__name__.lower() or _is_operation(type(layer)):
            numbered.setdefault(word, []).append((int(number), layer.name))
        else:
            names[layer.name] = layer.name.replace("/", "_")
    for word, found in numbered.items():
        for place, (_, name) in enumerate(sorted(found)):
            names[name] = word.replace(".", "_") + (f"_{place}" if place else "")
    return names


def _scaling(kind: str, name: str) -> keras.layers.Layer:
    if kind == "tf":
        return layers.Rescaling(1 / 127.5, offset=-1.0, name=name)
    if kind == "caffe":
        return layers.Rescaling(1.0, offset=[-mean for mean in CAFFE_MEAN], name=name)
    offset = [-mean / deviation for mean, deviation in zip(MEAN, DEVIATION, strict=True)]
    return layers.Rescaling([1 / (255 * deviation) for deviation in DEVIATION], offset=offset, name=name)


def _copy(drawn: Drawn, name: str, seed: int) -> keras.layers.Layer:
    """A new layer of the same settings with a seed of its own."""
    if _is_operation(drawn.kind):  # MobileNetV3 writes `x + 3.0` and `x * (1.0 / 6.0)` without a layer
        adds = drawn.config["function"] == "__operators__.add"
        return layers.Rescaling(*((1.0, 3.0) if adds else (1.0 / 6.0, 0.0)), name=name)
    config = copy.deepcopy(drawn.config) | {"name": name}
    del config["dtype"]  # a drawing is kept; the precision is that of now
    for key, start in config.items():
        if key.endswith("_initializer") and "seed" in start["config"]:
            start["config"]["seed"] = derive_seed(seed, name, key)
    if issubclass(drawn.kind, layers.BatchNormalization):
        # Copies on several devices share their statistics, so that these are of the whole batch.
        config["synchronized"] = tf.distribute.get_strategy().num_replicas_in_sync > 1
    if issubclass(drawn.kind, GroupNormalization):
        config["dtype"] = "float32"  # it would sum its squares in 16 bits
    return drawn.kind.from_config(config)


def _alexnet(size: int) -> keras.Model:
    """The convolutions of AlexNet (Krizhevsky et al. 2012) in one column (Krizhevsky 2014, arXiv:1404.5997)."""
    image = x = layers.Input((size, size, 3))
    x = layers.ZeroPadding2D(2, name="block1_pad")(x)
    for number, (filters, kernel, pooled) in enumerate(
        [(64, 11, True), (192, 5, True), (384, 3, False), (256, 3, False), (256, 3, True)], start=1
    ):
        first = number == 1
        x = layers.Conv2D(
            filters,
            kernel,
            strides=4 if first else 1,
            padding="valid" if first else "same",
            kernel_initializer="he_normal",
            name=f"block{number}_conv",
        )(x)
        x = layers.ReLU(name=f"block{number}_relu")(x)
        if pooled:
            x = layers.MaxPooling2D(3, 2, name=f"block{number}_pool")(x)
    return keras.Model(image, x)


def _big_transfer(units: Sequence[int], width: int) -> tuple[Drawn, ...]:
    """Big Transfer (Kolesnikov et al. 2020, arXiv:1912.11370): a ResNet with pre-activation (He et al. 2016,
    arXiv:1603.05027) whose strides are those of its 3x3 convolutions, with group normalisation and weight
    standardisation in the place of batch normalisation.

    It is drawn without being built: the larger ones hold gigabytes.

    Args:
        units: how many each block has.
        width: what channels are multiplied by.
    """
    found = [Drawn("image", layers.InputLayer, {}, [], ())]

    def add(layer: keras.layers.Layer, *reads: str, weights: tuple[tuple[str, tuple[int, ...]], ...] = ()) -> str:
        read = reads[0] if len(reads) == 1 else list(reads)
        found.append(Drawn(layer.name, type(layer), layer.get_config(), read, weights))
        return str(layer.name)

    def padded(read: str, name: str) -> str:
        return add(layers.ZeroPadding2D(1, name=f"{name}_pad"), read)

    def convolution(read: str, name: str, reads: int, filters: int, size: int = 1, stride: int = 1) -> str:
        even = "same" if stride == 1 else "valid"  # padding by strides is not what TensorFlow does: it is a layer
        name = f"{name}_standardized_conv2d"
        layer = StandardizedConv2D(filters, size, strides=stride, padding=even, use_bias=False, name=name)
        return add(layer, read, weights=(("kernel", (size, size, reads, filters)),))

    def active(read: str, name: str, channels: int) -> str:
        layer = GroupNormalization(32, epsilon=1e-5, name=f"{name}group_norm")
        normal = add(layer, read, weights=(("gamma", (channels,)), ("beta", (channels,))))
        return add(layers.ReLU(name=f"{name}relu"), normal)

    def unit(x: str, name: str, reads: int, middle: int, stride: int) -> str:
        made = 4 * middle
        start = active(x, f"{name}_a_", reads)
        y = active(convolution(start, f"{name}_a", reads, middle), f"{name}_b_", middle)
        y = padded(y, f"{name}_b") if stride > 1 else y
        y = active(convolution(y, f"{name}_b", middle, middle, 3, stride), f"{name}_c_", middle)
        if stride > 1 or reads != made:
            x = convolution(start, f"{name}_a_proj", reads, made, 1, stride)
        return add(layers.Add(name=f"{name}_add"), x, convolution(y, f"{name}_c", middle, made))

    channels = 64 * width
    x = add(layers.ZeroPadding2D(3, name="root_pad"), "image")
    x = padded(convolution(x, "root_block", 3, channels, 7, 2), "root_pool")
    x = add(layers.MaxPooling2D(3, 2, name="root_pool"), x)
    for block, count in enumerate(units):
        middle = 64 * width * 2**block
        for number in range(count):
            stride = 2 if block and not number else 1
            x = unit(x, f"block{block + 1}_unit{number + 1:02d}", channels, middle, stride)
            channels = 4 * middle
    active(x, "", channels)
    return tuple(found)
