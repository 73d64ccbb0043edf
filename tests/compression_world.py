"""A small real problem for compression: scikit-learn's handwritten digits, and networks that were trained on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from fusion.compat import keras
from fusion.compression.base import Answer, CompressionData, clone, fine_tune
from fusion.config import parse
from fusion.submodels.head import HeadSettings, classifier, head
from fusion.submodels.image_cnn import ImageCnn
from fusion.training.batches import as_rows
from fusion.training.separate import cross_entropy
from fusion.training.trainer import TrainingSettings
from fusion.types import RunOptions

TRAIN, REPRESENTATIVE = 1200, 100
CLASSES = 10


def digits() -> tuple[np.ndarray, np.ndarray]:
    """1,797 images uint8 `[N, 8, 8, 3]` and their digits."""
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return np.repeat(pixels, 3, axis=3), labels.astype(np.int32)


def digits_data(folder: Path, seed: int = 5) -> CompressionData:
    """Training rows to compress with; the rest of the images judges by accuracy."""
    images, labels = digits()

    def judge(answer: Answer) -> np.ndarray:
        return (answer({"image": images[TRAIN:]}).argmax(axis=1) == labels[TRAIN:]).astype(np.float64)

    return CompressionData(
        rows=as_rows({"image": images[:TRAIN], "label": labels[:TRAIN]}),
        loss=lambda logits, batch: cross_entropy(batch["label"], logits),
        representative={"image": images[:REPRESENTATIVE]},
        judge=judge,
        metric="accuracy",
        higher_is_better=True,
        options=RunOptions(seed, folder, quiet=True),
    )


def digits_model(seed: int = 3, widths: tuple[int, ...] = (16, 32)) -> keras.Model:
    """An untrained network: image uint8 `[B, 8, 8, 3]` -> logits `[B, 10]`."""
    submodel = ImageCnn(parse(ImageCnn.Config, {"image_size": 8, "widths": list(widths)}), seed)
    joined = classifier(submodel.encoder(), head(submodel.dimensions, CLASSES, parse(HeadSettings, {}), seed))
    return keras.Model(joined.inputs, joined.output["logits"], name="digits")


def trained_digits_model(folder: Path) -> keras.Model:
    """The same, trained for some seconds to an accuracy of about .97."""
    model = digits_model()
    fine_tune(model, digits_data(folder), TrainingSettings(epochs=12, batch_size=32, learning_rate=0.005))
    return model


def with_dead_units(model: keras.Model) -> keras.Model:
    """A copy of the digits' network in which some filters of the last convolution are zeros, as pruning leaves them."""
    copy = clone(model)
    kernel = copy.get_layer("block1_conv").kernel
    kernel.assign(np.where(np.arange(kernel.shape[-1]) < 3, 0.0, kernel))
    return copy


def with_swish(model: keras.Model) -> keras.Model:
    """The digits' network with swish in place of ReLU, of numbers 8 times as large, so that it answers nearly alike."""

    def smooth(layer: keras.layers.Layer) -> keras.layers.Layer:
        if isinstance(layer, keras.layers.ReLU):
            return keras.layers.Activation("swish", name=layer.name)
        return type(layer).from_config(layer.get_config())

    copy = clone(model, smooth)
    for block, following in (("block0", "block1_conv"), ("block1", "logits")):
        norm, kernel = copy.get_layer(f"{block}_bn"), copy.get_layer(following).kernel
        norm.gamma.assign(8 * norm.gamma)
        norm.beta.assign(8 * norm.beta)
        kernel.assign(kernel / 8)
    return copy


def tensors(tflite: bytes) -> dict[str, np.ndarray]:
    """The constant tensors of a `.tflite` by name, in the numbers that it holds."""
    from ai_edge_litert.interpreter import Interpreter  # not TensorFlow's, which warns of its end

    interpreter = Interpreter(model_content=tflite)
    interpreter.allocate_tensors()
    found = {}
    for detail in interpreter.get_tensor_details():
        try:
            found[detail["name"]] = interpreter.get_tensor(detail["index"])
        except ValueError:  # what is reckoned has no value before the first run
            continue
    return found
