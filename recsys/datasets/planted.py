"""The planted world: made-up data whose answer is known, so that tests can demand that something is learned.

Taste has three independent parts: a *group* that shows only in who took what, a *colour* that shows only in
the item's image, and a *word* that shows only in its text. Some items are cold: they appear only at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pydantic
from PIL import Image

from fusion.config import Settings
from recsys.schema import IMAGE, ITEM_ID, LABEL, TEXT, TIMESTAMP, TITLE, USER_ID, Tables

COLOURS = np.array([(220, 40, 40), (40, 170, 60), (50, 80, 220), (235, 200, 40)], np.uint8)
"""Red, green, blue, yellow: one for each kind of taste in images."""
WORDS = ("dragon", "detective", "robot", "wedding")
"""One for each kind of taste in texts; far apart in meaning, so that a language model separates them too."""
NOTES = ("winter", "music", "football", "kitchen")
"""The second text column of the classification world has these instead."""
FILLERS = ("story", "evening", "small", "people", "place", "again", "quiet", "about", "little", "day", "with")
"""Words that say nothing."""

KINDS = 4
"""Groups, colours and words: as many of each."""
MATCH = 2.5
"""What one matching part adds to a score."""
NOVELTY = 0.5
"""What is added to a cold item's score once it has appeared: new things are looked at."""
LATE_ONE_IN = 5
"""One in so many interactions of a user is late; just these may be with cold items."""
_EARLY_SECONDS, _LATE_SECONDS = 8_000_000, 2_000_000
_START = 1_600_000_000
_ORIGIN = "Made up; see recsys/datasets/planted.py."


@dataclass(frozen=True)
class PlantedTruth:
    """What the made-up interactions were drawn from.

    Attributes:
        user_tastes, item_traits: int `[U, 3]`, `[I, 3]`: group, colour and word of each.
        scores: float32 `[U, I]`, matches plus noise, without the bonus of new items;
            with `shuffle_labels` the same for every user.
        cold: bool `[I]`, the items that appear only among the late interactions.
    """

    user_tastes: np.ndarray
    item_traits: np.ndarray
    scores: np.ndarray
    cold: np.ndarray


class Planted:
    """The recommendation world."""

    class Config(Settings):
        """Size and difficulty of the world."""

        users: int = pydantic.Field(200, ge=4, le=50_000)
        """Number of users."""
        items: int = pydantic.Field(160, ge=10, le=10_000)
        """Number of items."""
        interactions_per_user: int = pydantic.Field(20, ge=5)
        """Interactions of each user; a fifth of them are late."""
        image_size: int = pydantic.Field(16, ge=8, le=256)
        """Height and width of the images in pixels."""
        cold_share: float = pydantic.Field(0.2, ge=0, le=0.5)
        """Share of the items that appear only among the late interactions."""
        noise: float = pydantic.Field(0.5, ge=0)
        """Standard deviation of what is added to each score; a matching part adds 2.5."""
        shuffle_labels: bool = False
        """Draws every user's items alike, so that nothing can be learned but popularity."""
        seed: int = pydantic.Field(0, ge=0)
        """Seed of the world."""

        @pydantic.model_validator(mode="after")
        def _enough_items(self) -> Planted.Config:
            warm = self.items - round(self.items * self.cold_share)
            if self.interactions_per_user > warm:
                raise ValueError(
                    f"interactions_per_user must not exceed the {warm} items that are not cold; "
                    f"received {self.interactions_per_user}"
                )
            return self

    @staticmethod
    def read(config: Planted.Config) -> Tables:
        """Draws the world: interactions with timestamps, items with images `[H, W, 3]` and texts."""
        truth = planted_truth(config)
        rng = np.random.default_rng([config.seed, 1])
        items = pd.DataFrame({ITEM_ID: _ids("i", config.items), TITLE: _ids("Item ", config.items)})
        items[TEXT] = _texts(truth.item_traits[:, 2], WORDS, rng)
        items[IMAGE] = _images(truth.item_traits[:, 1], config.image_size, rng)
        return Tables(items, "planted", _interactions(truth, config, rng), [_ORIGIN])


def planted_truth(config: Planted.Config) -> PlantedTruth:
    """The truth behind `Planted.read(config)`."""
    rng = np.random.default_rng([config.seed, 0])
    user_tastes = _balanced(config.users, rng)
    item_traits = _balanced(config.items, rng)
    matches = (user_tastes[:, None, :] == item_traits[None, :, :]).sum(axis=2)
    scores = MATCH * matches + rng.normal(0, config.noise, (config.users, config.items))
    if config.shuffle_labels:
        scores[:] = scores.mean(axis=0)
    cold = np.zeros(config.items, bool)
    cold[rng.permutation(config.items)[: round(config.items * config.cold_share)]] = True
    return PlantedTruth(user_tastes, item_traits, scores.astype(np.float32), cold)


def _balanced(count: int, rng: np.random.Generator) -> np.ndarray:
    """Three independent kinds for each of `count` rows, int `[count, 3]`, each kind equally often."""
    return np.stack([rng.permutation(np.arange(count) % KINDS) for _ in range(3)], axis=1)


def _interactions(truth: PlantedTruth, config: Planted.Config, rng: np.random.Generator) -> pd.DataFrame:
    """Draws without replacement in proportion to exp(score): the largest after adding Gumbel noise."""
    late = config.interactions_per_user // LATE_ONE_IN
    early = config.interactions_per_user - late
    perturbed = truth.scores + rng.gumbel(size=truth.scores.shape)
    first = _largest(np.where(truth.cold, -np.inf, perturbed), early)
    perturbed = truth.scores + NOVELTY * truth.cold + rng.gumbel(size=truth.scores.shape)
    np.put_along_axis(perturbed, first, -np.inf, axis=1)
    items = np.concatenate([rng.permuted(first, axis=1), rng.permuted(_largest(perturbed, late), axis=1)], axis=1)
    times = np.concatenate([
        np.sort(rng.integers(0, _EARLY_SECONDS, (config.users, early)), axis=1),
        _EARLY_SECONDS + np.sort(rng.integers(0, _LATE_SECONDS, (config.users, late)), axis=1),
    ], axis=1)  # fmt: skip
    users = np.broadcast_to(np.arange(config.users)[:, None], items.shape)
    table = pd.DataFrame({
        USER_ID: _ids("u", config.users).to_numpy(object)[users.ravel()],
        ITEM_ID: _ids("i", config.items).to_numpy(object)[items.ravel()],
        TIMESTAMP: pd.array(_START + times.ravel(), dtype="Int64"),
    })  # fmt: skip
    return table.astype({USER_ID: "str", ITEM_ID: "str"})


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    return np.argpartition(-values, count - 1, axis=1)[:, :count]


class PlantedClasses:
    """The classification world: three independent hints at the class, each wrong for a share of the examples.

    One is a colour in the image, one a word in `text`, one a word in `note`. A model of one hint is right for
    `1 - noise` of the examples; a majority of the three is right more often.
    """

    class Config(Settings):
        """Size and difficulty of the world."""

        examples: int = pydantic.Field(600, ge=40, le=1_000_000)
        """Number of labelled examples."""
        image_size: int = pydantic.Field(16, ge=8, le=256)
        """Height and width of the images in pixels."""
        noise: float = pydantic.Field(0.3, ge=0, le=0.75)
        """Share of the examples for which a hint points to another class; drawn for each hint by itself."""
        shuffle_labels: bool = False
        """Permutes the labels, so that nothing can be learned."""
        seed: int = pydantic.Field(0, ge=0)
        """Seed of the world."""

    @staticmethod
    def read(config: PlantedClasses.Config) -> Tables:
        """Draws the examples: `label`, `text`, `note` and images `[H, W, 3]`."""
        rng = np.random.default_rng([config.seed, 2])
        classes = rng.permutation(np.arange(config.examples) % KINDS)
        colours, words, notes = (_misled(classes, config.noise, rng) for _ in range(3))
        labels = rng.permutation(classes) if config.shuffle_labels else classes
        table = pd.DataFrame({LABEL: pd.Series([f"class {label}" for label in labels], dtype="str")})
        table[TEXT] = _texts(words, WORDS, rng)
        table["note"] = _texts(notes, NOTES, rng)
        table[IMAGE] = _images(colours, config.image_size, rng)
        return Tables(table, "planted_classes", notes=[_ORIGIN])


def _misled(classes: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """The classes, a share of them replaced by another one."""
    shift = rng.integers(1, KINDS, len(classes)) * (rng.random(len(classes)) < share)
    return (classes + shift) % KINDS


def _ids(prefix: str, count: int) -> pd.Series:
    width = len(str(count - 1))
    return pd.Series([f"{prefix}{number:0{width}d}" for number in range(count)], dtype="str")


def _texts(kinds: np.ndarray, words: tuple[str, ...], rng: np.random.Generator) -> pd.Series:
    """Seven words each, of which the one in a random place tells the kind."""
    texts = []
    for kind in kinds:
        text = [str(word) for word in rng.choice(FILLERS, 6, replace=False)]
        text.insert(int(rng.integers(0, 7)), words[kind])
        texts.append(" ".join(text))
    return pd.Series(texts, dtype="str")


def _images(kinds: np.ndarray, size: int, rng: np.random.Generator) -> pd.Series:
    """Grey noise with a square of the kind's colour in a random place, uint8 `[size, size, 3]` each."""
    images, side = [], size // 2
    for kind in kinds:
        image = np.repeat(rng.integers(90, 166, (size, size, 1), dtype=np.uint8), 3, axis=2)
        top, left = rng.integers(0, size - side + 1, 2)
        image[top : top + side, left : left + side] = COLOURS[kind]
        images.append(image)
    return pd.Series(images, dtype=object)


def write_folder(tables: Tables, path: Path) -> None:
    """Writes tables in the folder format of this project, arrays of pixels as PNG files below `images/`.

    The `folder` reader gives the same tables back without any mapping. Rows whose image is '' get no file.
    Raises ValueError when an image is a path: files are not copied.
    """
    path.mkdir(parents=True, exist_ok=True)
    names = [_write_image(image, path, row) for row, image in enumerate(tables.items[IMAGE])]
    kind = "examples" if tables.interactions is None else "items"
    tables.items.assign(**{IMAGE: names}).to_csv(path / f"{kind}.csv", index=False)
    if tables.interactions is not None:
        tables.interactions.to_csv(path / "interactions.csv", index=False)


def _write_image(image: np.ndarray | str, folder: Path, row: int) -> str:
    """Named by row, because an id need not be a file name."""
    if isinstance(image, str):
        if image:
            raise ValueError(f"write_folder takes images as arrays; row {row} has the path '{image}'.")
        return ""
    (folder / "images").mkdir(exist_ok=True)
    name = f"images/{row:06d}.png"
    Image.fromarray(image).save(folder / name)
    return name
