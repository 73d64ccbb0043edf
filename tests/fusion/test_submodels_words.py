"""Text encoders from scratch: a vocabulary out of training texts, convolutions, recurrent networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import tf
from fusion.config import parse
from fusion.errors import DataError
from fusion.export.litert import run
from fusion.export.tflite import convert
from fusion.submodels import SUBMODELS
from fusion.submodels.head import HeadSettings
from fusion.submodels.text_words import FIRST, UNKNOWN, words_of
from fusion.training.separate import ClassifierTraining, Examples, in_batches, train_classifier
from fusion.types import RunOptions

SMALL = {"max_words": 12, "min_count": 1, "word_dimensions": 8, "dropout": 0.0}
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("text_convolution", {"runs": [2], "filters": 8}),
    ("text_recurrent", {"cell": "lstm", "units": 8}),
    ("text_recurrent", {"cell": "gru", "units": 8, "bidirectional": False}),
]


def adapted(kind: str, texts: list[str], **settings: Any) -> Any:
    submodel = SUBMODELS[kind](parse(SUBMODELS[kind].Config, SMALL | settings), 3)
    submodel.adapt(texts)
    return submodel


def test_words_are_counted_in_training_texts_alone() -> None:
    """The most frequent first, ties by the alphabet; what training did not have is one unknown word."""
    encoder = adapted("text_convolution", ["b a a", "c, b"], min_count=1, vocabulary=3)
    assert encoder.state()["vocabulary"].tolist() == ["a", "b", ","]
    prepared = encoder.prepare(["a c", "", "B never, A"])["words"]
    assert prepared.tolist() == [[FIRST, UNKNOWN, 0, 0], [0, 0, 0, 0], [FIRST + 1, UNKNOWN, FIRST + 2, FIRST]]
    assert encoder.prepare(["a " * 30])["words"].shape == (1, 12), "no more than max_words"
    assert adapted("text_convolution", ["b a a", "c, b"], min_count=2).state()["vocabulary"].tolist() == ["a", "b"]


def test_words_of_scripts_and_marks() -> None:
    assert words_of("Él no_va a 3 km!") == ["él", "no", "va", "a", "3", "km", "!"]
    assert words_of("x" * 100) == ["x" * 40, "x" * 40, "x" * 20]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_padding_changes_nothing(kind: str, settings: dict[str, Any]) -> None:
    """D4m: the state after the last word is not moved by padding, and texts in a batch do not meet."""
    encoder = adapted(kind, ["red sea", "blue night"], **settings)
    alone = encoder.encode(encoder.prepare(["red sea"]))
    padded = encoder.encode(encoder.prepare(["red sea", "blue night " * 5], fixed_length=True))
    np.testing.assert_allclose(padded[:1], alone, atol=1e-6)
    assert np.isfinite(encoder.encode(encoder.prepare([""]))).all()


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_learns_the_order_of_words(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """D4m: "yes no" and "no yes" hold the same words, which a bag of words cannot tell apart."""
    random = np.random.default_rng(0)
    labels = np.arange(160) % 2
    fill = random.choice(["red", "blue", "sea"], 160)
    texts = [f"{f} yes no {f}" if label else f"{f} no yes {f}" for f, label in zip(fill, labels, strict=True)]
    encoder = adapted(kind, texts[:120], **settings)
    training = ClassifierTraining(epochs=12, batch_size=24, learning_rate=0.03)
    trained = train_classifier(
        encoder, Examples(texts[:120], labels[:120]), None, 2, HeadSettings(), training,
        RunOptions(seed=1, directory=tmp_path / "run", quiet=True), tmp_path,
    )  # fmt: skip
    logits = in_batches(lambda x: trained.model(x)["logits"], encoder.prepare(texts[120:]), 40)
    assert (logits.argmax(axis=1) == labels[120:]).all()


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_runs_on_a_device(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """O5: TFLite's own operations, the same numbers."""
    encoder = adapted(kind, ["red sea", "blue night"], **settings)
    words = encoder.prepare(["red night"], fixed_length=True)["words"]
    model, owner = encoder.encoder(), tf.Module()
    owner.kept = model.variables
    function = tf.function(lambda words: {"embedding": model(words, training=False)}).get_concrete_function(
        words=tf.TensorSpec(words.shape, tf.int32, name="words")
    )
    (tmp_path / "words.tflite").write_bytes(convert({"serving_default": function}, owner))
    found = run(tmp_path / "words.tflite", {"words": words})["embedding"]
    np.testing.assert_allclose(found, encoder.encode({"words": words}), atol=1e-5)


def test_refuses_what_is_no_vocabulary() -> None:
    encoder = SUBMODELS["text_recurrent"](parse(SUBMODELS["text_recurrent"].Config, SMALL), 3)
    with pytest.raises(DataError, match="has no vocabulary"):
        encoder.prepare(["red"])
    with pytest.raises(DataError, match="is its vocabulary; received idf"):
        encoder.load_state({"idf": np.zeros(3)})
