"""Names of columns, once, and the tables that travel through the house.

External ids are strings and are called `id`; their row numbers are integers and are called `number`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import sparse

USER_ID = "user_id"
ITEM_ID = "item_id"
RATING = "rating"
TIMESTAMP = "timestamp"
SPLIT = "split"
LABEL = "label"
IMAGE = "image"
TEXT = "text"
TITLE = "title"

TRAIN, VALIDATION, TEST, HISTORY = 0, 1, 2, 3
"""Parts of a split. HISTORY rows are known when answering, but nothing is ever fitted on them
(the earlier interactions of a held-out user)."""

PART_NAMES = ("train", "validation", "test", "history")


@dataclass
class Tables:
    """What a reader returns: plain tables with the columns above, ids as strings, nothing cleaned yet.

    Attributes:
        interactions: `user_id`, `item_id`, and where the source has them `rating` (float),
            `timestamp` (integer seconds), `split` (train, validation, test); None for classification.
        items: `item_id`, any text columns, and `image`: a path, an array `[H, W]` or `[H, W, 3]`, or ''.
            For classification the table of examples: `label`, text columns, `image`, `split`.
        name: of the data set, for reports.
        notes: sentences for the report: origin, licence.
    """

    items: pd.DataFrame
    name: str
    interactions: pd.DataFrame | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Dropped:
    """What one cleaning rule removed: how many rows, and the first few as examples."""

    rule: str
    rows: int
    examples: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Interactions:
    """A cleaned recommendation data set with ids turned into numbers.

    Attributes:
        name: of the data set.
        user_ids, item_ids: external ids by number, `[U]` and `[I]` arrays of str.
        users, items: int32 `[N]`, the numbers of each interaction's user and item.
        positive: bool `[N]`; the others are seen (never recommended again) but teach nothing.
        timestamps: int64 `[N]` seconds, or None.
        ratings: float32 `[N]`, or None.
        catalogue: one row per item in the order of numbers: text columns and `image`.
        given_split: int8 `[N]` with the parts above where the data gives a split, else None.
        positive_rule: the rule in words, stated in every table.
    """

    name: str
    user_ids: np.ndarray
    item_ids: np.ndarray
    users: np.ndarray
    items: np.ndarray
    positive: np.ndarray
    timestamps: np.ndarray | None
    ratings: np.ndarray | None
    catalogue: pd.DataFrame
    given_split: np.ndarray | None = None
    positive_rule: str = "any"
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int]:
        """Users and items, `(U, I)`."""
        return len(self.user_ids), len(self.item_ids)

    def matrix(self, rows: np.ndarray) -> sparse.csr_matrix:
        """The chosen rows (bool mask or row ids) as a `[U, I]` matrix of ones, float32.

        The items of a user stand in the order in which they were taken (cleaning sorts rows by time): what is a
        history to members that read sequences. A pair that stands twice counts once, where it stands last.
        """
        users, items = self.users[rows].astype(np.int64), self.items[rows]
        _, last = np.unique((users * self.shape[1] + items)[::-1], return_index=True)
        kept = np.sort(len(users) - 1 - last)
        kept = kept[np.argsort(users[kept], kind="stable")]
        starts = np.concatenate([[0], np.cumsum(np.bincount(users[kept], minlength=self.shape[0]))])
        ones = np.ones(len(kept), np.float32)
        return sparse.csr_matrix((ones, items[kept].astype(np.int32), starts.astype(np.int32)), shape=self.shape)
