"""Small pictures for pages: any image of the catalogue as a JPEG, or None if it is unusable."""

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

Picture = str | os.PathLike[str] | bytes | np.ndarray | None
"""The path of an image file or its content, an array `[H, W]` or `[H, W, 3]`, or nothing ('' or None)."""

SIDE = 168
"""Pixels; twice what the page shows, for dense screens."""
GLOW = (194, 81, 47)
"""The colour (red, green, blue) laid over the regions of a picture that decided."""


class Jpeg(NamedTuple):
    """A small picture as the bytes of a file, and its size in pixels."""

    content: bytes
    width: int
    height: int


class Thumbnail(NamedTuple):
    """A small picture: its `data:` address and its size in pixels."""

    address: str
    width: int
    height: int


def thumbnails(pictures: Sequence[Picture]) -> list[Thumbnail | None]:
    """As `small_jpegs` of 168 pixels, in the addresses that a page of one file needs."""
    return [None if jpeg is None else _as_data(jpeg) for jpeg in small_jpegs(pictures, SIDE)]


def small_jpegs(pictures: Sequence[Picture], side: int) -> list[Jpeg | None]:
    """A JPEG of at most `side` × `side` pixels for each picture, its proportions kept (arrays become squares).

    A picture that is missing, damaged or dangerously large gives None: a page does not fail over a picture.
    """
    # Arrays are read together, because what counts as white depends on all of them.
    arrays = [index for index, picture in enumerate(pictures) if isinstance(picture, np.ndarray)]
    images, usable, _ = load_images([pictures[index] for index in arrays], side)
    result: list[Jpeg | None] = [None] * len(pictures)
    for index, image, ok in zip(arrays, images, usable, strict=True):
        result[index] = _encoded(Image.fromarray(image)) if ok else None
    for index, picture in enumerate(pictures):
        if isinstance(picture, str | os.PathLike) and os.fspath(picture):
            result[index] = _small(Path(picture), side)
        elif isinstance(picture, bytes):
            result[index] = _small(picture, side)
    return result


def aglow(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """An image uint8 `[H, W, 3]` in grey, coloured where `heat` `[H, W]`, from 0 to 1, is high; of the same form."""
    grey = np.repeat(image.mean(axis=2, keepdims=True), 3, axis=2)
    return np.rint(grey + 0.8 * heat[:, :, None] * (np.array(GLOW) - grey)).astype(np.uint8)


def _small(picture: Path | bytes, side: int) -> Jpeg | None:
    try:
        if isinstance(picture, Path) and not picture.is_file():
            return None
        if (len(picture) if isinstance(picture, bytes) else picture.stat().st_size) > MAX_FILE_BYTES:
            return None
        file = io.BytesIO(picture) if isinstance(picture, bytes) else picture
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                return None
            image.draft("RGB", (2 * side, 2 * side))
            upright = ImageOps.exif_transpose(image).convert("RGBA")
    except Exception:  # a decoder can raise anything at all on a damaged or hostile file
        return None
    upright.thumbnail((side, side), Image.Resampling.BICUBIC)
    white = Image.new("RGBA", upright.size, "white")
    return _encoded(Image.alpha_composite(white, upright).convert("RGB"))


def _encoded(image: Image.Image) -> Jpeg:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=78, optimize=True)
    return Jpeg(buffer.getvalue(), *image.size)


def _as_data(jpeg: Jpeg) -> Thumbnail:
    address = "data:image/jpeg;base64," + base64.b64encode(jpeg.content).decode("ascii")
    return Thumbnail(address, jpeg.width, jpeg.height)
