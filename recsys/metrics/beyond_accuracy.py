"""What lists are like beside being right: how much of the catalogue they use, how known and how alike the
items are.

None of these looks at relevance. `coverage` and `gini` are one number of all users' lists; the others are one
float64 value per user, NaN for an empty list.
"""

from __future__ import annotations

import numpy as np

from recsys.metrics.definition import metric
from recsys.metrics.lists import RankedLists, blocks, ratio


def _exposure(lists: RankedLists, k: int, items: int) -> np.ndarray:
    """int64 `[I]`, in how many users' first k places each item stands."""
    top, _ = lists.cut(k)
    return np.bincount(top[top >= 0], minlength=items)


def _mean_of_listed(lists: RankedLists, k: int, values: np.ndarray) -> np.ndarray:
    """The mean of `values` `[I]` over each user's first k items, float64 `[U]`; NaN for an empty list."""
    top, _ = lists.cut(k)
    listed = top >= 0
    counts = listed.sum(axis=1)
    totals = np.where(listed, values[top], 0.0).sum(axis=1)
    return ratio(totals, counts)


@metric("list", at_k=True, needs="items")
def coverage(lists: RankedLists, k: int, items: int) -> float:
    """Coverage@k: the share of the catalogue that is recommended to anybody.

    Formula: |union of all users' first k items| / I. Range 0 to 1, more is better. Ties: as in the lists.
    Empty lists add nothing; all empty, or no users: 0. Relevance plays no part.
    Source: Ge, Delgado-Battenfeld, Jannach, Beyond accuracy, RecSys 2010 (catalogue coverage).
    """
    return float(np.count_nonzero(_exposure(lists, k, items)) / items)


@metric("list", at_k=True, higher_is_better=False, needs="items")
def gini(lists: RankedLists, k: int, items: int) -> float:
    """Gini@k: how unequally the places in all lists are spread over the catalogue.

    Formula: sum_i (2 i - I - 1) x_i / (I sum_i x_i), x ascending: in how many lists each of the I items
    stands, items in none included. Range 0 (all alike) to 1 - 1/I (one item has all), less is better. Ties:
    as in the lists. Empty lists add nothing; all empty, or no users: NaN. Relevance plays no part.
    Source: Shani and Gunawardana, Evaluating recommendation systems, Recommender Systems Handbook, 2011.
    """
    exposure = np.sort(_exposure(lists, k, items)).astype(np.float64)
    if not exposure.any():
        return float("nan")
    return float((2 * np.arange(1, items + 1) - items - 1) @ exposure / (items * exposure.sum()))


@metric("ranking", at_k=True, needs="popularity")
def novelty(lists: RankedLists, k: int, popularity: np.ndarray) -> np.ndarray:
    """Novelty@k: the mean self-information, in bits, of the listed items.

    Formula: mean over the list of -log2 p(i), p(i) = (n_i + 1) / (sum n + I), n_i the item's training
    interactions (one is added so that an item nobody took yet has a finite value). Range 0 to log2(sum n +
    I), more is more novel. Ties: as in the lists. Empty list: NaN. Relevance plays no part.
    Source: Zhou et al., Solving the apparent diversity-accuracy dilemma, PNAS 107(10), 2010.
    """
    share = (popularity + 1.0) / (popularity.sum() + len(popularity))
    return _mean_of_listed(lists, k, -np.log2(share))


@metric("ranking", at_k=True, higher_is_better=False, needs="popularity")
def average_popularity(lists: RankedLists, k: int, popularity: np.ndarray) -> np.ndarray:
    """Average popularity@k: the mean number of training interactions of the listed items (popularity bias).

    Formula: mean over the list of n_i. Range 0 to max n; less is less bound to the well known. Ties: as in
    the lists. Empty list: NaN. Relevance plays no part.
    Source: Yin et al., Challenging the long tail recommendation, VLDB 2012.
    """
    return _mean_of_listed(lists, k, np.asarray(popularity, np.float64))


@metric("ranking", at_k=True, needs="vectors")
def diversity(lists: RankedLists, k: int, vectors: np.ndarray) -> np.ndarray:
    """Diversity@k: one minus the mean similarity of content between any two items of the list.

    Formula: 1 - mean over pairs i < j of cos(v_i, v_j). Range 0 to 2, and 0 to 1 for vectors without negative
    entries (categories); more is more diverse. Ties: as in the lists. Items without content (a zero vector)
    are left out. Empty list: NaN, as with fewer than two items with content. Relevance
    plays no part.
    Source: Ziegler et al., Improving recommendation lists through topic diversification, WWW 2005.
    """
    top, _ = lists.cut(k)
    norms = np.linalg.norm(vectors, axis=1)
    units = np.divide(vectors, norms[:, None], out=np.zeros(vectors.shape, np.float64), where=norms[:, None] > 0)
    described = (top >= 0) & (norms > 0)[top]
    counts = described.sum(axis=1)
    squared_sums = np.empty(lists.users)
    for part in blocks(lists.users, bytes_per_row=8 * k * units.shape[1]):
        listed = np.where(described[part, :, None], units[top[part]], 0.0)
        squared_sums[part] = (listed.sum(axis=1) ** 2).sum(axis=1)
    # |sum of n unit vectors|^2 = n + twice the sum of the cosines of all pairs
    return 1.0 - ratio(squared_sums - counts, counts * (counts - 1))
