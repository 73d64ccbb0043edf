"""Members trained one by one, and the folds that a stacker needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from fusion.compat import keras
from fusion.config import Settings
from fusion.errors import ConfigError, DataError
from fusion.submodels import SUBMODELS
from fusion.submodels.base import Pretrained, Submodel
from fusion.submodels.head import HeadSettings
from fusion.training.out_of_fold import out_of_fold, out_of_fold_logits
from fusion.training.separate import (
    ClassifierTraining,
    Examples,
    TrainedClassifier,
    classification_metrics,
    train_classifier,
)
from fusion.types import Features, RunOptions
from tiny_bert import write_tiny_bert

CLASSES = 3


class Brightness(Pretrained):
    """A tiny image encoder: two random projections of the mean colour."""

    class Config(Settings):
        fine_tune: Literal[0, "all"] = 0
        """Nothing or everything is trained."""

    modality: ClassVar[Literal["text", "image"]] = "image"

    def prepare(self, values: Sequence[Any], fixed_length: bool = False) -> Features:
        return {"image": np.asarray(values)}

    def _build(self) -> keras.Model:
        image = keras.Input((4, 4, 3), dtype="uint8", name="image")
        colour = keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(image))
        initializer = keras.initializers.GlorotUniform(seed=self.seed)
        embedding = keras.layers.Dense(8, "tanh", kernel_initializer=initializer, name="embedding")(colour)
        return keras.Model(image, embedding)

    def blocks(self) -> list[list[keras.layers.Layer]]:
        return [[self.encoder().get_layer("embedding")]]


def colours(n: int, seed: int) -> Examples:
    """Images in which the channel of the label's number is brighter."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, n)
    images = rng.integers(0, 100, (n, 4, 4, 3))
    images[np.arange(n), :, :, labels] += 100
    return Examples(images.astype(np.uint8), labels)


def train(fine_tune: Any, directory: Path, labels: np.ndarray | None = None) -> tuple[Submodel, TrainedClassifier]:
    submodel, examples = Brightness(Brightness.Config(fine_tune=fine_tune), seed=1), colours(90, 0)
    trained = train_classifier(
        submodel,
        Examples(examples.values, examples.labels if labels is None else labels),
        colours(60, 1),
        CLASSES,
        HeadSettings(),
        ClassifierTraining(epochs=12, batch_size=16, learning_rate=0.1, label_smoothing=0.1, target=0.95),
        RunOptions(seed=5, directory=directory / "member", quiet=True),
        directory / "cache",
    )
    return submodel, trained


@pytest.mark.parametrize("fine_tune", [0, "all"])
def test_a_member_learns_and_freezing_holds(fine_tune: Any, tmp_path: Path) -> None:
    """F4, F7: the same call trains the head on stored embeddings, or everything, by one key."""
    submodel, trained = train(fine_tune, tmp_path)
    unseen = colours(100, 2)
    outputs = trained.model.predict({"image": unseen.values}, verbose=0)
    assert outputs["logits"].shape == (100, CLASSES) and outputs["embedding"].shape == (100, 8)
    assert classification_metrics(outputs["logits"], unseen.labels)["accuracy"] > 0.9
    untouched = Brightness(submodel.config, seed=1).encoder().get_weights()
    same = all(np.array_equal(a, b) for a, b in zip(submodel.encoder().get_weights(), untouched, strict=True))
    assert same is (fine_tune == 0)
    assert bool(list((tmp_path).glob("cache/*"))) is (fine_tune == 0)


def test_shuffled_labels_leave_it_at_chance(tmp_path: Path) -> None:
    """Negative control: what was learned above was in the images."""
    shuffled = np.random.default_rng(3).permutation(colours(90, 0).labels)
    _, trained = train(0, tmp_path, labels=shuffled)
    unseen = colours(300, 2)
    logits = trained.model.predict({"image": unseen.values}, verbose=0)["logits"]
    assert classification_metrics(logits, unseen.labels)["accuracy"] < 0.75


@pytest.mark.parametrize(
    ("labels", "message"), [(np.full(90, 3), "from 0 to 2; .* holds 3 to 3"), (np.zeros(89, int), "90 values")]
)
def test_labels_that_do_not_fit_are_refused(labels: np.ndarray, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        train(0, tmp_path, labels=labels)


def test_metrics_by_hand() -> None:
    """Softmax of (0, ln 3) is (1/4, 3/4), whatever is added to both; large logits do not overflow."""
    logits = np.array([[0, np.log(3)], [5, 5 + np.log(3)], [1e4, 0]], np.float32)
    metrics = classification_metrics(logits, np.array([0, 1, 0]))
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    assert metrics["log_loss"] == pytest.approx((np.log(4) + np.log(4 / 3)) / 3, rel=1e-6)


def test_folds_are_even_and_stratified() -> None:
    strata = np.random.default_rng(0).choice(["a", "b", "c"], 101, p=[0.7, 0.2, 0.1])
    folds = out_of_fold(101, 4, seed=1, strata=strata)
    assert np.ptp(np.bincount(folds)) <= 1
    for value in "abc":
        assert np.ptp(np.bincount(folds[strata == value], minlength=4)) <= 1
    assert not np.array_equal(folds, out_of_fold(101, 4, seed=2, strata=strata))
    with pytest.raises(ConfigError, match="from 2 to the number of rows, 3; received 4"):
        out_of_fold(3, 4, seed=0)


def test_no_row_is_scored_by_a_model_that_saw_it() -> None:
    """A model that memorises: asked about a row it saw it answers 1, else 0."""
    folds = out_of_fold(20, 3, seed=0)
    scores = out_of_fold_logits(
        lambda fold, seen, asked: np.stack([np.isin(asked, seen), asked], axis=1), folds, quiet=True
    )
    assert scores.dtype == np.float32
    assert np.array_equal(scores, np.stack([np.zeros(20), np.arange(20)], axis=1))


def test_blocks_have_learning_rates_of_their_own(tmp_path: Path) -> None:
    """E3: the first SGD step of a block is its multiplier times that of one rate for all; the head keeps its own."""
    texts, labels = ["a red film", "the blue sea"] * 4, np.arange(8) % 2
    folder = write_tiny_bert(tmp_path)

    def steps(**rates: float) -> dict[str, np.ndarray]:
        kind = SUBMODELS["text_bert"]
        bert = kind(kind.Config(init_from=str(folder), max_tokens=8, fine_tune="all", dropout=0.0), 1)
        before = {weight.name: weight.numpy() for weight in bert.encoder().weights}
        settings = ClassifierTraining(epochs=1, batch_size=8, optimizer="sgd", learning_rate=0.1, **rates)
        options = RunOptions(seed=1, directory=tmp_path / str(rates), quiet=True)
        model = train_classifier(
            bert, Examples(texts, labels), None, 2, HeadSettings(), settings, options, tmp_path
        ).model
        moved = {name.partition("/")[0]: model.get_layer(name.partition("/")[0]) for name in before if "kernel" in name}
        kernels = {name: layer.get_weights()[0] for name, layer in moved.items()}
        start = {name.partition("/")[0]: value for name, value in before.items() if "kernel" in name}
        return {name: kernel - start[name] for name, kernel in kernels.items()} | {
            "logits": model.get_layer("logits").get_weights()[0]
        }

    whole, slower = steps(), steps(encoder_rate=0.5, layer_decay=0.1)
    for name, share in (("layer1_wide", 0.5), ("layer0_wide", 0.05)):
        assert np.abs(whole[name]).max() > 1e-4
        np.testing.assert_allclose(slower[name], share * whole[name], rtol=1e-3, atol=1e-7)
    np.testing.assert_array_equal(slower["logits"], whole["logits"])
