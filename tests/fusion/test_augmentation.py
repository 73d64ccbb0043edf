"""Variants of training values: each operation on an image and a text that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.augmentation import Augmentation, ImageAugmentation, TextAugmentation
from fusion.config import parse_part
from fusion.errors import ConfigError
from fusion.submodels import SUBMODELS
from fusion.submodels.head import HeadSettings
from fusion.training.member import CLASSIFIERS, ClassifierMember
from fusion.training.separate import ClassifierTraining, Examples, train_classifier, trained_rows
from fusion.types import RunOptions

DROPPED: dict[str, Any] = {"columns": ["text"], "augmentation": {"text": {"drop": 0.1}}}


def gradient() -> np.ndarray:
    """One image `[1, 8, 8, 3]`: red grows to the right, green downwards."""
    image = np.zeros((1, 8, 8, 3), np.uint8)
    image[0, :, :, 0] = np.arange(8) * 30
    image[0, :, :, 1] = np.arange(8)[:, None] * 30
    return image


def variants(count: int = 40, **settings: float | bool) -> np.ndarray:
    images = np.repeat(gradient(), count, axis=0)
    return ImageAugmentation(**settings).apply(images, np.random.default_rng(0))


class TestImages:
    def test_off_is_the_image_itself(self) -> None:
        np.testing.assert_array_equal(variants(), np.repeat(gradient(), 40, axis=0))

    @pytest.mark.parametrize(("key", "axis"), [("flip_horizontal", 1), ("flip_vertical", 0)])
    def test_flips(self, key: str, axis: int) -> None:
        """C4: about half of the images, exactly mirrored; the others as they are."""
        mirrored = np.flip(gradient()[0], axis)
        found = [np.array_equal(image, mirrored) for image in variants(**{key: True})]
        same = [np.array_equal(image, gradient()[0]) for image in variants(**{key: True})]
        assert 10 < sum(found) < 30 and sum(found) + sum(same) == 40

    def test_a_quarter_turn(self) -> None:
        """C4: turned by the angle that was drawn, about the centre; a turn of 90 degrees is numpy's."""
        settings = ImageAugmentation(rotation=90)
        maps = settings.matrices(400, (8, 8), np.random.default_rng(0))
        angles = np.rad2deg(np.arctan2(maps[:, 1, 0], maps[:, 0, 0]))
        assert angles.min() < -80 and angles.max() > 80 and np.abs(angles).max() <= 90
        np.testing.assert_allclose(maps @ [3.5, 3.5, 1.0], np.tile([3.5, 3.5, 1.0], (400, 1)), atol=1e-5)

        class Quarter(np.random.Generator):
            def uniform(self, low: float = 0, high: float = 1, size: object = None) -> np.ndarray:
                return np.full(size, high, float)  # type: ignore[call-overload, no-any-return]

        turned = settings.apply(gradient(), Quarter(np.random.PCG64(0)))[0]
        np.testing.assert_array_equal(turned, np.rot90(gradient()[0]))

    def test_zoom_and_crop(self) -> None:
        """C4: a zoom keeps the centre; a crop shows a part from within the image, anywhere."""
        maps = ImageAugmentation(zoom=0.5).matrices(300, (8, 8), np.random.default_rng(0))
        assert maps[:, 0, 0].min() == pytest.approx(1 / 1.5, abs=0.02) and 1.8 < maps[:, 0, 0].max() <= 2
        np.testing.assert_allclose(maps @ [3.5, 3.5, 1.0], np.tile([3.5, 3.5, 1.0], (300, 1)), atol=1e-5)
        maps = ImageAugmentation(crop=0.5).matrices(300, (8, 8), np.random.default_rng(0))
        corners = np.stack([maps @ [x, y, 1.0] for x in (0, 7) for y in (0, 7)])[..., :2]
        assert corners.min() >= -0.51 and corners.max() <= 7.51, "within half a pixel of the image"
        centres = (maps @ [3.5, 3.5, 1.0])[:, :2]
        assert centres.std(axis=0).min() > 0.5
        reds = variants(crop=0.5)[:, :, :, 0].astype(int)
        spans = reds[:, 0, -1] - reds[:, 0, 0]
        assert spans.min() < 140 and spans.max() <= 210, "a part is enlarged: colours change more slowly"

    def test_noise(self) -> None:
        """C4: as strong as said, and no pixel leaves 0 to 255."""
        images = np.full((20, 16, 16, 3), 128, np.uint8)
        noisy = ImageAugmentation(noise=10).apply(images, np.random.default_rng(0))
        assert noisy.dtype == np.uint8 and noisy.std() == pytest.approx(10, rel=0.05)
        assert noisy.mean() == pytest.approx(128, abs=0.5)
        bright = ImageAugmentation(noise=50).apply(np.full((1, 8, 8, 3), 250, np.uint8), np.random.default_rng(0))
        assert bright.max() == 255 and bright.min() > 50

    def test_what_is_drawn_follows_from_the_seed(self) -> None:
        settings = ImageAugmentation(rotation=20, zoom=0.1, crop=0.2, noise=5, flip_horizontal=True)
        first, again, other = (
            settings.apply(np.repeat(gradient(), 4, axis=0), np.random.default_rng(seed)) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other) and first.shape == (4, 8, 8, 3)


class TestTexts:
    TEXT = " ".join(f"w{number}" for number in range(20))

    def reworded(self, **settings: float) -> list[list[str]]:
        texts = TextAugmentation(**settings).apply([self.TEXT] * 100, np.random.default_rng(0))
        return [text.split() for text in texts]

    def test_off_is_the_text_itself(self) -> None:
        assert self.reworded() == [self.TEXT.split()] * 100

    def test_drop(self) -> None:
        """C5: so many words are left out, the others keep their order; a text never gets empty."""
        found = self.reworded(drop=0.3)
        assert np.mean([len(words) for words in found]) == pytest.approx(14, abs=0.7)
        assert all(words == sorted(words, key=lambda word: int(word[1:])) for words in found)
        few = TextAugmentation(drop=0.95).apply(["red sea"] * 50, np.random.default_rng(0))
        assert all(few) and TextAugmentation(drop=0.5).apply([""], np.random.default_rng(0)) == [""]

    def test_swap(self) -> None:
        """C5: the same words, some of them one place further."""
        found = self.reworded(swap=0.2)
        assert all(sorted(words) == sorted(self.TEXT.split()) for words in found)
        moved = np.mean([np.mean(np.array(words) != np.array(self.TEXT.split())) for words in found])
        assert 0.25 < moved < 0.45

    def test_mask(self) -> None:
        """C5: so many words are hidden, each in its place."""
        found = self.reworded(mask=0.25)
        assert all(len(words) == 20 for words in found)
        assert np.mean([words.count("[MASK]") for words in found]) == pytest.approx(5, abs=0.5)
        assert all(word in ("[MASK]", f"w{place}") for words in found for place, word in enumerate(words))


class TestTraining:
    def test_values_are_varied_in_training_alone(self, tmp_path: Path) -> None:
        """C4: each epoch sees other views, decided by the seed; validation sees the images as they are."""
        submodel = SUBMODELS["image_cnn"](SUBMODELS["image_cnn"].Config(image_size=8, widths=(4,)), 1)
        images = np.repeat(gradient(), 12, axis=0)
        options = RunOptions(seed=1, directory=tmp_path / "run", quiet=True)
        settings = Augmentation(image=ImageAugmentation(rotation=30))
        rows, same = (trained_rows(submodel, images, tmp_path, options, a) for a in (settings, Augmentation()))
        first, second = (rows.gather(np.array(numbers))["image"] for numbers in ([0, 1, 2], [3, 4, 5]))
        assert not np.array_equal(first, images[:3]) and not np.array_equal(first, second)
        np.testing.assert_array_equal(rows.gather(np.array([0, 1, 2]))["image"], first)
        np.testing.assert_array_equal(same.gather(np.array([0, 1, 2]))["image"], images[:3])

    def test_learns_views_that_it_was_not_shown(self, tmp_path: Path) -> None:
        """C4: taught images of one direction, it knows mirrored ones only where mirroring was part of the training."""
        random = np.random.default_rng(0)
        labels = np.arange(96) % 2
        images = random.integers(0, 40, (96, 8, 8, 3)).astype(np.uint8)
        images[labels == 1, 1:3, 0:3] += 200  # a bright mark, top left
        images[labels == 0, 5:7, 5:8] += 200  # bottom right
        mirrored = images[:, :, ::-1]
        found = {}
        for flip in (False, True):
            submodel = SUBMODELS["image_cnn"](SUBMODELS["image_cnn"].Config(image_size=8, widths=(8, 8), dropout=0), 1)
            trained = train_classifier(
                submodel, Examples(images, labels), Examples(mirrored, labels), 2, HeadSettings(),
                ClassifierTraining(epochs=6, batch_size=16, learning_rate=0.01),
                RunOptions(seed=1, directory=tmp_path / str(flip), quiet=True), tmp_path,
                Augmentation(image=ImageAugmentation(flip_horizontal=flip)),
            )  # fmt: skip
            found[flip] = trained.history.epochs[-1]["log_loss"]
        assert found[True] < found[False]

    def test_texts_are_varied_before_they_are_cut_into_tokens(self, tmp_path: Path) -> None:
        """C5: what the encoder reads in training are the words that are left."""
        kind = SUBMODELS["text_convolution"]
        submodel = kind(kind.Config(min_count=1, max_words=8), 1)
        submodel.adapt(["a b c d e f"])
        options = RunOptions(seed=1, directory=tmp_path / "run", quiet=True)
        rows = trained_rows(
            submodel, ["a b c d e f"] * 8, tmp_path, options, Augmentation(text=TextAugmentation(drop=0.5))
        )
        counts = (rows.gather(np.arange(8))["words"] > 0).sum(axis=1)
        assert counts.min() >= 1 and counts.max() < 6

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"encoder": {"kind": "image_cnn"}, "augmentation": {"text": {"drop": 0.1}}}, "this one's is image"),
            ({"encoder": {"kind": "text_bert", "fine_tune": 2}, **DROPPED}, "needs an encoder that is trained whole"),
            ({"encoder": {"kind": "text_tfidf"}, **DROPPED}, "needs an encoder that is trained whole"),
        ],
    )  # fmt: skip
    def test_refuses_what_would_never_be_seen(self, settings: dict[str, Any], message: str) -> None:
        part = parse_part(CLASSIFIERS, {"kind": "neural", **settings}, "members.m")
        with pytest.raises(ConfigError, match=message):
            ClassifierMember.check(part.config)
