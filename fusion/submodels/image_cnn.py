"""A small convolutional network trained from scratch: images uint8 `[B, H, W, 3]` -> one embedding each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from fusion.compat import keras, tf
from fusion.config import Settings
from fusion.initializers import Initializer, initializer
from fusion.submodels.base import Submodel, check_images
from fusion.submodels.image_features import Views, embedding, seen
from fusion.types import Features, derive_seed

layers = keras.layers


class ImageCnn(Submodel):
    """Blocks of convolution, BatchNormalization, ReLU and dropout; pooled by 2 between blocks, averaged at the end."""

    modality: ClassVar[Literal["text", "image"]] = "image"

    class Config(Settings):
        """Settings of the small network."""

        image_size: int = pydantic.Field(32, ge=8, le=384)
        """Side of the square images in pixels."""
        widths: tuple[Annotated[int, pydantic.Field(ge=1, le=2048)], ...] = pydantic.Field(
            (32, 64, 128), min_length=1, max_length=8
        )
        """Filters of each block; the last is the length of the embedding."""
        dropout: float = pydantic.Field(0.1, ge=0, lt=1)
        """Share of whole feature maps dropped after each block in training."""
        initializer: Initializer = "he_normal"
        """How the weights of the convolutions start."""
        views: Views = Views()
        """Further views of an image, over which the embedding is averaged."""

        @pydantic.model_validator(mode="after")
        def _pooling_leaves_pixels(self) -> ImageCnn.Config:
            if self.image_size >> (len(self.widths) - 1) < 2:
                raise ValueError(
                    f"each block after the first halves the image, and {len(self.widths)} blocks leave nothing "
                    f"of {self.image_size} pixels"
                )
            return self

    @property
    def frozen(self) -> bool:
        """False: there are no pretrained weights, so all are trained."""
        return False

    def prepare(self, values: Sequence[Any], fixed_length: bool = False) -> Features:
        """Images uint8 `[N, image_size, image_size, 3]` -> `{"image": the same}`; scaling is in the encoder."""
        return {"image": check_images(values, self.config.image_size)}

    def unfreeze(self) -> list[keras.layers.Layer]:
        """All layers with weights: there is nothing to keep."""
        return [layer for layer in self.encoder().layers if layer.weights]

    def _build(self) -> keras.Model:
        image = layers.Input((self.config.image_size, self.config.image_size, 3), dtype="uint8", name="image")
        x = layers.Rescaling(1 / 127.5, offset=-1.0, name="rescaling")(seen(image, self.config.views))
        for number, width in enumerate(self.config.widths):
            if number > 0:
                x = layers.MaxPooling2D(name=f"block{number}_pool")(x)
            x = self._block(x, f"block{number}", width)
        return keras.Model(image, embedding([x], self.config.views), name="image_cnn")

    def _block(self, x: Any, name: str, width: int) -> Any:
        # No bias, because BatchNormalization has one; the activation is a layer of its own, as TFMOT folds it.
        weights = initializer(self.config.initializer, derive_seed(self.seed, "image_cnn", name))
        x = layers.Conv2D(width, 3, padding="same", use_bias=False, kernel_initializer=weights, name=f"{name}_conv")(x)
        # Copies on several devices share their statistics, so that these are of the whole batch.
        shared = tf.distribute.get_strategy().num_replicas_in_sync > 1
        x = layers.BatchNormalization(momentum=0.9, synchronized=shared, name=f"{name}_bn")(x)
        x = layers.ReLU(name=f"{name}_relu")(x)
        if self.config.dropout == 0:
            return x
        # A stateful generator is a variable, which a checkpoint can hold.
        return layers.SpatialDropout2D(
            self.config.dropout,
            seed=derive_seed(self.seed, "image_cnn", name, "dropout"),
            rng_type="stateful",
            force_generator=True,
            name=f"{name}_dropout",
        )(x)
