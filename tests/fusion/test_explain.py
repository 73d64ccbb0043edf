"""Explanations: words by integrated gradients, regions by Grad-CAM, on members that were taught what to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.config import parse
from fusion.explain import region_shares, word_shares
from fusion.submodels import SUBMODELS
from fusion.submodels.head import HeadSettings
from fusion.training.separate import ClassifierTraining, Examples, train_classifier
from fusion.types import RunOptions
from tiny_bert import write_tiny_bert

FILL = ["red", "blue", "night", "film", "the"]


def taught(kind: str, settings: dict[str, Any], values: Any, labels: np.ndarray, folder: Path, rate: float) -> Any:
    """The fitted submodel, and of embeddings how far class 1 is above class 0."""
    submodel = SUBMODELS[kind](parse(SUBMODELS[kind].Config, settings), 3)
    submodel.adapt(values)
    training = ClassifierTraining(epochs=12, batch_size=20, learning_rate=rate)
    trained = train_classifier(
        submodel, Examples(values, labels), None, 2, HeadSettings(), training,
        RunOptions(seed=1, directory=folder / "run", quiet=True), folder,
    )  # fmt: skip
    head = trained.model.get_layer("logits")
    return submodel, lambda vectors: head(vectors)[:, 1] - head(vectors)[:, 0]


@pytest.mark.parametrize("kind", ["text_convolution", "text_recurrent", "text_tfidf", "text_bert"])
def test_the_word_that_decides_stands_out(kind: str, tmp_path: Path) -> None:
    """A7: class 1 says "sea", class 0 "war"; shares add up to what the words change (completeness)."""
    random = np.random.default_rng(0)
    labels = np.arange(120) % 2
    texts = [
        " ".join(random.permutation([*random.choice(FILL, 3), "sea" if label else "war"]).tolist()) for label in labels
    ]
    words = {"max_words": 8, "min_count": 1, "word_dimensions": 8, "dropout": 0.0}
    settings: dict[str, Any] = {
        "text_convolution": {**words, "runs": [1], "filters": 6},
        "text_recurrent": {**words, "units": 6},
        "text_tfidf": {"max_features": 20, "dimensions": 8},
        "text_bert": {"init_from": str(write_tiny_bert(tmp_path)), "max_tokens": 16, "fine_tune": "all",
                      "dropout": 0.0},
    }[kind]  # fmt: skip
    submodel, difference = taught(kind, settings, texts, labels, tmp_path, 0.02)
    for text, decisive, sign in (("the red sea night", "sea", 1), ("war film blue", "war", -1)):
        shares = dict(word_shares(submodel, text, difference))
        assert set(shares) == set(text.split()), "no [CLS], no padding, no word that is not there"
        assert max(shares, key=lambda word: sign * shares[word]) == decisive and sign * shares[decisive] > 0
        if kind != "text_bert":  # there [CLS] and [SEP] take a share, which is no word's
            assert sum(shares.values()) == pytest.approx(change(submodel, text, difference), rel=0.03, abs=0.03)


def change(submodel: Any, text: str, difference: Any) -> float:
    """What the words of a text change: the answer, less that to as many words without a vector, or to no embedding."""
    if submodel.parts(text) is not None:
        vector = submodel.encode(submodel.prepare([text]))
        return float(difference(vector)[0] - difference(np.zeros_like(vector))[0])
    features = {name: array[:, : len(submodel.pieces(text))] for name, array in submodel.prepare([text]).items()}
    there = float(difference(submodel.encode(features))[0])
    table = submodel.encoder().get_layer("vectors")
    weights = table.get_weights()
    table.set_weights([np.zeros_like(weights[0])])
    without = float(difference(submodel.encode(features))[0])
    table.set_weights(weights)
    return there - without


def test_no_words_no_shares() -> None:
    encoder = SUBMODELS["text_convolution"](parse(SUBMODELS["text_convolution"].Config, {"min_count": 1}), 3)
    encoder.adapt(["red sea"])
    assert word_shares(encoder, "", lambda vectors: vectors[:, 0]) == []
    image = SUBMODELS["image_cnn"](SUBMODELS["image_cnn"].Config(), 3)
    with pytest.raises(ValueError, match="ImageCnn reads no text"):
        word_shares(image, "red", lambda vectors: vectors[:, 0])


def test_the_region_that_decides_is_found(tmp_path: Path) -> None:
    """A7: a bright square, somewhere in one half of the image, says class 1; the map is brightest there."""
    random = np.random.default_rng(1)
    labels = np.arange(80) % 2
    images = random.integers(0, 60, (80, 16, 16, 3)).astype(np.uint8)
    places = random.integers(0, 11, (80, 2))
    for image, label, (y, x) in zip(images, labels, places, strict=True):
        if label:
            image[y : y + 5, x : x + 5] = 250
    settings = {"image_size": 16, "widths": [8, 8], "dropout": 0.0}
    submodel, difference = taught("image_cnn", settings, images, labels, tmp_path, 0.01)
    inside, outside = [], []
    for image, (y, x) in zip(images[1::2][:10], places[1::2][:10], strict=True):
        heat = region_shares(submodel, image, difference)
        assert heat.shape == (16, 16) and heat.dtype == np.float32 and 0 <= heat.min() and heat.max() <= 1
        square = np.zeros((16, 16), bool)
        square[y : y + 5, x : x + 5] = True
        inside.append(heat[square].mean())
        outside.append(heat[~square].mean())
    assert np.mean(inside) > 2 * np.mean(outside)
