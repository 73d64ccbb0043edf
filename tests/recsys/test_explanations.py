"""Why a classifier erred: what the page shows of its members' reasons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fusion.config import parse_part
from fusion.training.member import CLASSIFIERS, ClassifierMember, LabelledData
from fusion.training.separate import Examples
from fusion.types import RunOptions
from recsys.explanations import explaining, reasons
from recsys.report_content import Mistake
from recsys.report_view import _mistakes


def fitted(encoder: dict[str, Any], values: Any, labels: np.ndarray, folder: Path) -> ClassifierMember:
    training = {"epochs": 12, "batch_size": 16, "learning_rate": 0.02}
    settings = {"kind": "neural", "encoder": encoder, "columns": ["text"], "training": training}
    member: ClassifierMember = parse_part(CLASSIFIERS, settings, "members.m").make(1)
    data = LabelledData(Examples(values, labels), None, 2, folder, "test")
    member.fit(data, RunOptions(seed=1, directory=folder / encoder["kind"], quiet=True))
    return member


def test_words_and_regions_that_led_to_an_answer(tmp_path: Path) -> None:
    """A7: "sea" speaks for class 1 and against class 0; a bright mark is where the picture glows."""
    labels = np.arange(64) % 2
    random = np.random.default_rng(0)
    fill = random.choice(["red", "blue", "the", "film", "night"], (64, 2)).tolist()
    texts = [f"{first} {'sea' if label else 'war'} {last}" for label, (first, last) in zip(labels, fill, strict=True)]
    words = {"kind": "text_convolution", "max_words": 8, "min_count": 1, "runs": [1], "filters": 8, "dropout": 0}
    text = fitted(words, texts, labels, tmp_path)
    shares = dict(reasons(text, "a red sea", answer=1, truth=0))
    assert max(shares, key=lambda word: shares[word]) == "sea" and shares["sea"] > 0
    turned = dict(reasons(text, "a red sea", answer=0, truth=1))
    assert turned["sea"] < 0

    images = random.integers(0, 50, (64, 16, 16, 3)).astype(np.uint8)
    images[labels == 1, 2:7, 2:7] = 240
    image = fitted({"kind": "image_cnn", "image_size": 16, "widths": [8, 8], "dropout": 0}, images, labels, tmp_path)
    seen = reasons(image, images[1], answer=1, truth=0)
    assert isinstance(seen, np.ndarray) and seen.dtype == np.uint8 and seen.shape == (16, 16, 3)
    glow = seen[..., 0].astype(int) - seen[..., 2]  # grey has none
    assert glow[2:7, 2:7].mean() > 2 * glow[9:, 9:].mean()

    members = {"text": text, "image": image}
    assert explaining(members, ["image", "text"], "text") == "text"
    assert explaining(members, ["text", "image"], "image") == "image"
    assert explaining({"other": object()}, ["other"], "text") is None
    text.submodel.explained = False  # type: ignore[misc]  # as of long documents, which are read in windows
    assert explaining(members, ["image", "text"], "text") is None

    shown = _mistakes([Mistake("a red sea", "war", "sea", 0.9, images[1], list(shares.items()), seen)])[0]
    strongest = max(shown["words"], key=lambda part: part["percent"])
    assert strongest == {"word": "sea", "percent": 100, "speaks": True}
    assert shown["heat"].address.startswith("data:image/jpeg") and shown["picture"] is not None
