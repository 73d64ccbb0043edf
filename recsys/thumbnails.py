"""Small pictures for a page: any image of the catalogue as a JPEG in a `data:` address, or None if it is unusable."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from fusion.images import FORMATS, MAX_FILE_BYTES, MAX_PIXELS, load_images

Picture = str | os.PathLike[str] | np.ndarray | None
"""The path of an image file, an array `[H, W]` or `[H, W, 3]`, or nothing ('' or None)."""

SIDE = 168
"""Pixels; twice what the page shows, for dense screens."""
GLOW = (194, 81, 47)
"""The colour (red, green, blue) laid over the regions of a picture that decided."""


class Thumbnail(NamedTuple):
    """A small picture: its `data:` address and its size in pixels."""

    address: str
    width: int
    height: int


def thumbnails(pictures: Sequence[Picture]) -> list[Thumbnail | None]:
    """A JPEG of at most 168 × 168 pixels for each picture, its proportions kept (arrays become squares).

    A picture that is missing, damaged or dangerously large gives None: a report does not fail over a picture.
    """
    # Arrays are read together, because what counts as white depends on all of them.
    arrays = [index for index, picture in enumerate(pictures) if isinstance(picture, np.ndarray)]
    images, usable, _ = load_images([pictures[index] for index in arrays], SIDE)
    result: list[Thumbnail | None] = [None] * len(pictures)
    for index, image, ok in zip(arrays, images, usable, strict=True):
        result[index] = _as_data(Image.fromarray(image)) if ok else None
    for index, picture in enumerate(pictures):
        if isinstance(picture, str | os.PathLike) and os.fspath(picture):
            result[index] = _of_file(Path(picture))
    return result


def aglow(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image uint8 `[H, W, 3]` in grey, coloured where `heat` `[H, W]`, from 0 to 1, is high; of the same form."""
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    return np.rint(grey + 0.8 * heat[:, :, None] * (np.array(GLOW) - grey)).astype(np.uint8)


def _of_file(path: Path) -> Thumbnail | None:
    try:
        if not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
            return None
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (2 * SIDE, 2 * SIDE))
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception:  # a decoder can raise anything at all on a damaged or hostile file
        return None
    upright.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", upright.size, "white")
    return _as_data(Image.alpha_composite(white, upright).convert("RGB"))


def _as_data(image: Image.Image) -> Thumbnail:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=78, optimize=True)
    address = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Thumbnail(address, *image.size)
