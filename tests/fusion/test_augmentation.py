"""Variants of training values: each operation on an image and a text that are known."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.augmentation import ImageAugmentation, TextAugmentation


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
