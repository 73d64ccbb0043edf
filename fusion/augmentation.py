"""Variants of training values that keep their label: other views of an image, other wordings of a text.

Values are changed before they become features, batch by batch while a member is trained, and never elsewhere:
validation, test and what is exported see values as they are. What is drawn follows from the seed, the epoch's order and
the rows of the batch, so that an interrupted run draws it again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field
from scipy.special import ndtri

from fusion.compat import tf
from fusion.config import Settings
from fusion.errors import ConfigError

QUANTILES = ndtri((np.arange(1 << 16) + 0.5) / (1 << 16))
"""Of the normal distribution, equally likely: to draw one of them is four times as fast as to draw a normal number,
and what they leave out lies beyond 4.3 deviations."""


class ImageAugmentation(Settings):
    """Random views of images; everything is off at 0."""

    flip_horizontal: bool = False
    """Half of the images are mirrored left to right."""
    flip_vertical: bool = False
    """Half of the images are mirrored top to bottom."""
    rotation: float = Field(0.0, ge=0, le=180)
    """Largest turn to either side, in degrees."""
    zoom: float = Field(0.0, ge=0, lt=1)
    """Largest change of scale: 0.2 shows images from 0.8 to 1.2 times their size."""
    crop: float = Field(0.0, ge=0, lt=1)
    """Largest share of a side that is cut off; the rest is enlarged to the whole."""
    noise: float = Field(0.0, ge=0, le=128)
    """Standard deviation of normal noise, in grey levels of 255."""

    def apply(self, images: Any, random: np.random.Generator) -> np.ndarray:
        """Images uint8 `[N, H, W, 3]` -> the same shape; what comes from beyond an edge is the nearest pixel."""
        result = images
        if self.flip_horizontal or self.flip_vertical or self.rotation or self.zoom or self.crop:
            result = _resampled(images, self.matrices(len(images), images.shape[1:3], random))
        if self.noise:
            drawn = random.integers(0, len(QUANTILES), images.shape, np.uint16)
            noisy = np.rint(self.noise * QUANTILES).astype(np.int16)[drawn]
            noisy += result
            result = np.clip(noisy, 0, 255, out=noisy).astype(np.uint8)
        return result

    def matrices(self, count: int, size: tuple[int, int], random: np.random.Generator) -> np.ndarray:
        """Affine maps float32 `[N, 3, 3]` from places (x, y, 1) of the new image to places of the old one."""
        height, width = size
        # Every number is drawn whatever is switched on, so that switching one on leaves the others as they were.
        mirror, turn, scale, cut, shift = (
            random.random((count, 2)) < 0.5,
            np.deg2rad(random.uniform(-self.rotation, self.rotation, count)),
            1.0 / random.uniform(1.0 - self.zoom, 1.0 + self.zoom, count),
            1.0 - random.uniform(0.0, self.crop, count),
            random.uniform(-1.0, 1.0, (count, 2)),
        )
        signs = np.where(mirror & [self.flip_horizontal, self.flip_vertical], -1.0, 1.0)
        maps = np.tile(np.eye(3), (count, 1, 1))
        cosine, sine = np.cos(turn) * scale * cut, np.sin(turn) * scale * cut
        maps[:, 0, 0], maps[:, 0, 1] = cosine * signs[:, 0], -sine * signs[:, 1]
        maps[:, 1, 0], maps[:, 1, 1] = sine * signs[:, 0], cosine * signs[:, 1]
        centre = np.array([(width - 1) / 2, (height - 1) / 2])
        moved = shift * (1.0 - cut)[:, None] * [width / 2, height / 2]  # a crop lies anywhere in the image
        maps[:, :2, 2] = centre + moved - np.einsum("nij,j->ni", maps[:, :2, :2], centre)
        return maps.astype(np.float32)


class TextAugmentation(Settings):
    """Random wordings of texts; everything is off at 0 (Wei & Zou 2019, "EDA", and the masks of Devlin et al. 2019)."""

    drop: float = Field(0.0, ge=0, lt=1)
    """Chance of every word to be left out; the last one stays."""
    swap: float = Field(0.0, ge=0, lt=1)
    """Chance of every word to change places with the next one."""
    mask: float = Field(0.0, ge=0, lt=1)
    """Chance of every word to be hidden: it becomes [MASK], which encoders without such a token do not know."""

    def apply(self, texts: Any, random: np.random.Generator) -> list[str]:
        """Texts -> as many texts; words are what stands between blanks."""
        return [self._reworded(text.split(), random) for text in texts]

    def _reworded(self, words: list[str], random: np.random.Generator) -> str:
        if not words:
            return ""
        for place in np.flatnonzero(random.random(len(words) - 1) < self.swap):
            words[place], words[place + 1] = words[place + 1], words[place]
        kept = random.random(len(words)) >= self.drop
        kept[random.integers(len(words))] |= not kept.any()
        hidden = random.random(len(words)) < self.mask
        return " ".join(MASK if h else word for word, k, h in zip(words, kept, hidden, strict=True) if k)


MASK = "[MASK]"


def _resampled(images: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Images seen through affine maps, between pixels by the mean of the four around."""
    flat = maps.reshape(-1, 9)
    seen = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32),
        transforms=tf.constant(flat[:, :8] / flat[:, 8:]),
        output_shape=tf.constant(images.shape[1:3], tf.int32),
        interpolation="BILINEAR",
        fill_mode="NEAREST",
        fill_value=0.0,
    )
    return np.rint(seen.numpy()).astype(np.uint8)


class Augmentation(Settings):
    """What training does to the values of a member."""

    image: ImageAugmentation = ImageAugmentation()
    """Of images."""
    text: TextAugmentation = TextAugmentation()
    """Of texts."""

    def of(self, modality: str) -> ImageAugmentation | TextAugmentation | None:
        """What is done to values of one modality; None where nothing is."""
        known: dict[str, ImageAugmentation | TextAugmentation] = {"image": self.image, "text": self.text}
        chosen = known.get(modality)
        return None if chosen is None or chosen == type(chosen)() else chosen

    def check(self, modality: str, *, trained: bool) -> None:
        """Raises ConfigError for a modality that the member does not read, and where no encoder sees the values anew.

        Args:
            trained: whether the whole encoder is trained; what is frozen of one runs once over the values.
        """
        asked = [name for name in type(self).model_fields if self.of(name)]
        wrong = [name for name in asked if name != modality]
        if wrong:
            raise ConfigError(f"augmentation.{wrong[0]} is for members that read it; this one's is {modality}.")
        if asked and not trained:
            raise ConfigError(
                "augmentation needs an encoder that is trained whole, because a frozen part sees each value once. "
                "Set fine_tune: all, or take the augmentation out."
            )
