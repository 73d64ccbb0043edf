"""A made-up world of the size and shape of real check-in data, for benchmarks of speed and memory.

Places lie in cities, and cities in neighbourhoods; people go mostly to a few neighbourhoods of their own city.
Popularity has a long tail on every level. Its quality figures say nothing about real data; its counts, the lengths
of its histories and the sparsity of its item × item matrix do.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pydantic
from scipy import sparse

from fusion.config import Settings
from fusion.errors import ConfigError
from recsys.datasets.tables import items_of
from recsys.schema import IMAGE, ITEM_ID, PART_NAMES, SPLIT, TEST, TRAIN, USER_ID, Tables

SIZES = {
    "gowalla": (29_858, 40_981, 1_027_370),
    "small": (600, 900, 20_000),
}
"""Users, items and interactions, by name. The first is the Gowalla split of LightGCN (He et al. 2020, table 2)."""
TEST_SHARE = 217_242 / 1_027_370
"""Share of a user's interactions that are held out: that of the same split."""
_CITY_ITEMS, _NEIGHBOURHOOD_ITEMS = 110, 22
_NEAR, _CITY = 0.45, 0.35
"""Chance that a visit is to a favourite neighbourhood, or elsewhere in the city; the rest is anywhere."""
_FAVOURITES = 3


def long_tail(users: int, items: int, interactions: int, seed: int = 0) -> sparse.csr_matrix:
    """Who went where: `[users, items]` of ones, float32, with about `interactions` entries in no order of time.

    >>> long_tail(100, 80, 1000).shape
    (100, 80)
    """
    if interactions > users * items // 4:
        raise ConfigError(f"a long tail must fill at most a quarter of {users} x {items}; received {interactions}.")
    random = np.random.default_rng(seed)
    weights = random.permutation(np.arange(1, items + 1) ** -0.75)
    lengths = _lengths(users, interactions, items // 2, random)
    home = random.choice(max(items // _CITY_ITEMS, 1), users, p=_share(_sums(weights, _CITY_ITEMS)))
    quarters = np.minimum(
        home[:, None] * (_CITY_ITEMS // _NEIGHBOURHOOD_ITEMS)
        + random.integers(0, _CITY_ITEMS // _NEIGHBOURHOOD_ITEMS, (users, _FAVOURITES)),
        max(items // _NEIGHBOURHOOD_ITEMS, 1) - 1,
    )
    seen = np.zeros(0, np.int64)
    for _ in range(8):  # pairs that were drawn twice are drawn again
        missing = lengths - np.bincount(seen // items, minlength=users)
        who = np.repeat(np.arange(users), np.maximum(missing, 0) * 3 // 2)
        if not len(who):
            break
        place = _visits(who, home, quarters, weights, random)
        seen = _first(np.concatenate([seen, who * items + place]), lengths, items)
    rows, columns = seen // items, seen % items
    return sparse.csr_matrix((np.ones(len(seen), np.float32), (rows, columns)), shape=(users, items))


def _lengths(users: int, total: int, most: int, random: np.random.Generator) -> np.ndarray:
    """Lengths of histories: a lognormal tail above a minimum of about a third of the mean."""
    least = max(total // users // 3, 1)
    tail = random.lognormal(0.0, 1.1, users)
    return np.minimum(least + np.round(tail * (total - least * users) / tail.sum()), most).astype(np.int64)


def _visits(
    who: np.ndarray, home: np.ndarray, quarters: np.ndarray, weights: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """One place for each entry of `who`: by popularity within a range of neighbouring item numbers."""
    items = len(weights)
    kind = random.random(len(who))
    favourite = quarters[who, random.integers(0, _FAVOURITES, len(who))]
    near, city = kind < _NEAR, kind < _NEAR + _CITY
    start = np.where(near, favourite * _NEIGHBOURHOOD_ITEMS, np.where(city, home[who] * _CITY_ITEMS, 0))
    width = np.where(near, _NEIGHBOURHOOD_ITEMS, np.where(city, _CITY_ITEMS, items))
    cumulated = np.concatenate([[0.0], np.cumsum(weights)])
    low, high = cumulated[start], cumulated[np.minimum(start + width, items)]
    drawn = np.searchsorted(cumulated, low + random.random(len(who)) * (high - low), side="right") - 1
    return np.clip(drawn, start, np.minimum(start + width, items) - 1)


def _first(pairs: np.ndarray, lengths: np.ndarray, items: int) -> np.ndarray:
    """Distinct pairs, of each user the first `lengths` that were drawn."""
    _, first = np.unique(pairs, return_index=True)
    pairs = pairs[np.sort(first)]
    pairs = pairs[np.argsort(pairs // items, kind="stable")]
    users = pairs // items
    starts = np.searchsorted(users, np.arange(len(lengths)))
    return pairs[np.arange(len(pairs)) - starts[users] < lengths[users]]


def _sums(weights: np.ndarray, width: int) -> np.ndarray:
    """Sums over ranges of `width` neighbours; what is left at the end belongs to none."""
    count = max(len(weights) // width, 1)
    return np.array([weights[n * width : (n + 1) * width].sum() for n in range(count)])


def _share(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


class LongTail:
    """The world as a data set with a given split, to run the whole chain at the size."""

    class Config(Settings):
        """Which world."""

        size: str = "gowalla"
        """A name in `SIZES`: gowalla or small."""
        seed: int = pydantic.Field(0, ge=0)
        """Seed of the world."""

        @pydantic.field_validator("size")
        @classmethod
        def _known(cls, size: str) -> str:
            if size not in SIZES:
                raise ValueError(f"size must be one of {', '.join(SIZES)}; received '{size}'")
            return size

    @staticmethod
    def read(config: LongTail.Config) -> Tables:
        """Draws the world; of each user's interactions a random fifth is the test part."""
        matrix = long_tail(*SIZES[config.size], seed=config.seed).tocoo()
        test = np.random.default_rng([config.seed, 1]).random(matrix.nnz) < TEST_SHARE
        interactions = pd.DataFrame(
            {
                USER_ID: np.char.add("u", matrix.row.astype(str)),
                ITEM_ID: np.char.add("i", matrix.col.astype(str)),
                SPLIT: np.where(test, PART_NAMES[TEST], PART_NAMES[TRAIN]),
            }
        )
        items = items_of(interactions).assign(**{IMAGE: ""})
        return Tables(items, f"long tail ({config.size})", interactions, ["Made up; see recsys/datasets/long_tail.py."])
