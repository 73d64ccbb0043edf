"""Finds the images that members cannot use, by decoding them once: their pixels then lie in the cache for training."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusion.images import MISSING, load_images
from fusion.progress import progress, reached

Decode = Callable[[Sequence[Any]], list[str]]
"""Paths or arrays -> for each why it cannot be used, in words that many images share, or ''."""


def decoder_of(experiment: Any, cache: Path, *, quiet: bool = False) -> Decode | None:
    """The check for an experiment's image members, at the size of the largest; None when there are none."""
    encoders = [part.config.encoder for part in experiment.members.values() if hasattr(part.config, "encoder")]
    sizes = [part.config.image_size for part in encoders if part.registry[part.kind].modality == "image"]
    if not sizes:
        return None

    def decode(images: Sequence[Any]) -> list[str]:
        with progress("decode", len(images), "images", quiet=quiet) as bar:
            _, _, reasons = load_images(images, max(sizes), cache / "images", reached(bar, len(images)))
        return [_without_figures(reason) for reason in reasons]

    return decode


def _without_figures(reason: str) -> str:
    """`9 x 9 pixels are more than 64` as `more than 64 pixels`, `cannot be decoded: OSError: ...` as its start."""
    common = reason.partition(":")[0]
    return (
        "" if reason == MISSING else re.sub(r"^[\d x]+ (pixels|bytes) are more than (\d+)$", r"more than \2 \1", common)
    )
