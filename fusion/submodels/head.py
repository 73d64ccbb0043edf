"""The classifying head over an embedding, and the flat model that joins it to an encoder."""

from __future__ import annotations

from typing import Annotated

import pydantic

from fusion.compat import keras
from fusion.config import Settings
from fusion.initializers import Initializer, initializer
from fusion.types import derive_seed

layers = keras.layers


class HeadSettings(Settings):
    """Settings of a head: hidden layers of Dense and ReLU, dropout before each Dense, then one logit a class."""

    hidden: tuple[Annotated[int, pydantic.Field(ge=1, le=65536)], ...] = pydantic.Field((), max_length=8)
    """Widths of the hidden layers; none makes a linear classifier."""
    dropout: float = pydantic.Field(0.0, ge=0, lt=1)
    """Share of inputs that each Dense layer loses in training."""
    initializer: Initializer = "glorot_uniform"
    """How the weights of the hidden layers start."""
    logits_initializer: Initializer = "glorot_uniform"
    """How the weights of the last layer start."""


def head(dimensions: int, classes: int, config: HeadSettings, seed: int = 0) -> keras.Model:
    """A functional model, embedding float32 `[B, dimensions]` -> logits `[B, classes]`; weights follow from `seed`."""
    features = layers.Input((dimensions,), name="embedding")
    x = features
    for number, width in enumerate(config.hidden):
        x = _drop(x, f"head_dropout{number}", config.dropout, seed)
        x = _dense(x, f"head_dense{number}", width, config.initializer, seed)
        x = layers.ReLU(name=f"head_relu{number}")(x)
    x = _drop(x, "head_dropout", config.dropout, seed)
    # A softmax needs the range of float32, whatever precision the rest is built in.
    logits = _dense(x, "logits", classes, config.logits_initializer, seed, dtype="float32")
    return keras.Model(features, logits, name="head")


def classifier(encoder: keras.Model, head: keras.Model) -> keras.Model:
    """Encoder and head as one flat functional model with the outputs `logits` `[B, C]` and `embedding` `[B, D]`.

    The layers are shared with both, so that training one trains the other. It is flat because TFMOT refuses a
    model within a model.
    """
    x = encoder.output
    for layer in head.layers[1:]:  # a head is a chain; its first layer is the input that the encoder replaces
        x = layer(x)
    return keras.Model(encoder.inputs, {"logits": x, "embedding": encoder.output}, name=f"{encoder.name}_classifier")


def _dense(
    x: keras.KerasTensor, name: str, width: int, start: Initializer, seed: int, dtype: str | None = None
) -> keras.KerasTensor:
    weights = initializer(start, derive_seed(seed, "head", name))
    return layers.Dense(width, kernel_initializer=weights, dtype=dtype, name=name)(x)


def _drop(x: keras.KerasTensor, name: str, rate: float, seed: int) -> keras.KerasTensor:
    if rate == 0:
        return x
    # A stateful generator is a variable, which a checkpoint can hold.
    return layers.Dropout(
        rate, seed=derive_seed(seed, "head", name), rng_type="stateful", force_generator=True, name=name
    )(x)
