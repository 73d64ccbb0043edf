"""What ranking metrics look at: every user's list, the relevant items and their ranks among all candidates.

Nothing is scored here. Axes: U users, I items, K list length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fusion.errors import ConfigError, DataError

_BLOCK_BYTES = 1 << 26
"""Temporary arrays over the catalogue are kept below this many bytes."""


def blocks(rows: int, bytes_per_row: int) -> Iterator[slice]:
    """Cuts `rows` into slices whose temporaries stay below a fixed number of bytes, at least one row each."""
    step = max(1, _BLOCK_BYTES // max(1, bytes_per_row))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def ratio(totals: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """totals / counts as float64, NaN where there is nothing to divide by."""
    result = np.full(np.shape(counts), np.nan)
    np.divide(totals, counts, out=result, where=counts > 0)
    return result


@dataclass(frozen=True)
class Catalogue:
    """Facts about items that the metrics beyond accuracy need.

    Attributes:
        items: how many items could have been recommended, I.
        popularity: int64 `[I]`, in how many training interactions each item stands; None when unknown.
        vectors: float `[I, D]`, what an item is like: content embeddings or `multi_hot` categories. A row of
            zeros means that nothing is known about the item. None when there are none.
    """

    items: int
    popularity: np.ndarray | None = None
    vectors: np.ndarray | None = None

    def __post_init__(self) -> None:
        for name in ("popularity", "vectors"):
            value = getattr(self, name)
            if value is not None and len(value) != self.items:
                raise DataError(f"{name} must have one row per item ({self.items}); received {len(value)} rows.")


def multi_hot(categories: Sequence[Iterable[str]]) -> np.ndarray:
    """Sets of categories as vectors `[I, G]` float32 of zeros and ones, columns in alphabetical order.

    The cosine of two such vectors is the Ochiai coefficient of the two sets.

    >>> multi_hot([{"drama"}, {"comedy", "drama"}, set()]).tolist()
    [[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
    """
    sets = [frozenset(names) for names in categories]
    column = {name: index for index, name in enumerate(sorted(frozenset().union(*sets)))}
    vectors = np.zeros((len(sets), len(column)), np.float32)
    for row, names in enumerate(sets):
        vectors[row, [column[name] for name in names]] = 1.0
    return vectors


@dataclass(frozen=True)
class RankedLists:
    """What was recommended to U users, beside what they really took.

    Attributes:
        top: int32 `[U, K]`, item numbers, best first, padded with -1 at the end.
        relevant_indptr: int64 `[U + 1]`; user u's relevant items are
            `relevant_indices[relevant_indptr[u]:relevant_indptr[u + 1]]`.
        relevant_indices: int `[nnz]`, item numbers, distinct within a user, in any order.
        ranks: int64 `[nnz]`, the 1-based rank of each relevant item among the user's candidates;
            0 or less where the item was no candidate.
        candidates: int64 `[U]`, how many items were ranked for the user.
    """

    top: np.ndarray
    relevant_indptr: np.ndarray
    relevant_indices: np.ndarray
    ranks: np.ndarray
    candidates: np.ndarray

    def __post_init__(self) -> None:
        if self.top.ndim != 2:
            raise DataError(f"top must be of shape [U, K]; received {self.top.shape}.")
        pointers, found = self.relevant_indptr, len(self.relevant_indices)
        if len(pointers) != self.users + 1 or pointers[0] != 0 or pointers[-1] != found:
            raise DataError(
                f"relevant_indptr must hold {self.users + 1} offsets from 0 to {found}; received "
                f"{len(pointers)} from {pointers[:1]} to {pointers[-1:]}."
            )
        if len(self.ranks) != found or len(self.candidates) != self.users:
            raise DataError(
                f"ranks must be aligned with relevant_indices ({found}), candidates with users "
                f"({self.users}); received {len(self.ranks)} and {len(self.candidates)}."
            )
        if np.any(self.ranks > self.candidates[self.rows]):
            raise DataError("a rank must not exceed the user's number of candidates; received one that does.")
        if len(np.unique(self._relevant_keys)) != found:
            raise DataError("a user's relevant items must be distinct; received one that stands twice.")

    @property
    def users(self) -> int:
        """U."""
        return len(self.top)

    @cached_property
    def relevant(self) -> np.ndarray:
        """int64 `[U]`, how many items are relevant to each user, candidates or not."""
        counts: np.ndarray = np.diff(self.relevant_indptr)
        return counts

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 `[nnz]`, the user of each relevant item."""
        return np.repeat(np.arange(self.users), self.relevant)

    @cached_property
    def hits(self) -> np.ndarray:
        """bool `[U, K]`, which listed items are relevant. Taken from the list itself, not from the ranks: a
        list that was re-ordered after scoring (filters, diversity) is judged as it was shown."""
        if not len(self.relevant_indices):
            return np.zeros(self.top.shape, bool)
        listed = np.arange(self.users)[:, None] * self._stride + self.top
        known = np.sort(self._relevant_keys)
        place = np.minimum(np.searchsorted(known, listed), len(known) - 1)
        hits: np.ndarray = (known[place] == listed) & (self.top >= 0)
        return hits

    @property
    def _stride(self) -> int:
        return 1 + max(int(self.top.max(initial=0)), int(self.relevant_indices.max(initial=0)))

    @property
    def _relevant_keys(self) -> np.ndarray:
        """One integer for each pair of user and relevant item."""
        keys: np.ndarray = self.rows * self._stride + self.relevant_indices
        return keys

    def cut(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The first k places: `(top [U, k], hits [U, k])`. ConfigError when the lists are shorter than k."""
        if k > self.top.shape[1]:
            raise ConfigError(
                f"a metric at {k} needs lists of {k} items; received lists of {self.top.shape[1]}. "
                "Ask for longer lists or for a smaller k."
            )
        return self.top[:, :k], self.hits[:, :k]

    @classmethod
    def merge(cls, parts: Sequence[RankedLists]) -> RankedLists:
        """Stacks blocks of users in the order given. All parts must have the same list length K."""
        widths = sorted({part.top.shape[1] for part in parts})
        if len(widths) != 1:
            raise DataError(f"lists must have one common length to be merged; received {widths or 'no parts'}.")
        return cls(
            top=np.concatenate([part.top for part in parts]),
            relevant_indptr=np.concatenate([[0], np.cumsum(np.concatenate([part.relevant for part in parts]))]),
            relevant_indices=np.concatenate([part.relevant_indices for part in parts]),
            ranks=np.concatenate([part.ranks for part in parts]),
            candidates=np.concatenate([part.candidates for part in parts]),
        )

    @classmethod
    def from_scores(
        cls,
        scores: np.ndarray,
        candidates: np.ndarray,
        relevant_indptr: np.ndarray,
        relevant_indices: np.ndarray,
        k: int,
    ) -> RankedLists:
        """Ranks a block of users: scores float `[U, I]`, candidates bool `[U, I]` (the unseen items).

        Equal scores are ordered by item number, the lower one first, as `tf.math.top_k` does. A candidate
        without a finite score (nothing spoke about it) is not listed, and ranks after all others.
        """
        keys = np.where(np.isfinite(scores) & candidates, scores, -np.inf)
        relevant_indptr = np.asarray(relevant_indptr, np.int64)
        relevant_indices = np.asarray(relevant_indices, np.int64)
        return cls(
            top=_top(keys, k),
            relevant_indptr=relevant_indptr,
            relevant_indices=relevant_indices,
            ranks=ranks(keys, candidates, relevant_indptr, relevant_indices),
            candidates=candidates.sum(axis=1, dtype=np.int64),
        )


def ranks(keys: np.ndarray, candidates: np.ndarray, indptr: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """1-based rank of each (row, item) among the candidates of its row, int64 `[nnz]`; 0 where it is none.

    Counting what stands above a few items is cheaper than sorting the whole catalogue, and comparing one row at
    a time is cheaper than gathering rows.

    Args:
        keys: float `[U, I]`, -inf where an item is no candidate or nothing was said about it.
        candidates: bool `[U, I]`.
        indptr, indices: the items asked for, as in `RankedLists`.
    """
    result = np.zeros(len(indices), np.int64)
    rows = np.repeat(np.arange(len(keys)), np.diff(indptr))
    for place, (row, item) in enumerate(zip(rows.tolist(), np.asarray(indices).tolist(), strict=True)):
        if candidates[row, item]:
            result[place] = 1 + _before(keys[row], candidates[row], item)
    return result


def _before(keys: np.ndarray, candidates: np.ndarray, item: int) -> int:
    """How many candidates stand before `item`: larger keys, lower numbers of equal ones, the silent ones last."""
    own = keys[item]
    if own == -np.inf:
        spoken = int(np.count_nonzero(keys > own))
        return spoken + int(np.count_nonzero(candidates[:item] & (keys[:item] == own)))
    return int(np.count_nonzero(keys[:item] >= own) + np.count_nonzero(keys[item + 1 :] > own))


def _top(keys: np.ndarray, k: int) -> np.ndarray:
    """The k best columns of each row in order, int32 `[U, k]`, padded with -1; lower columns win ties."""
    users, items = keys.shape
    top = np.full((users, k), -1, np.int32)
    width = min(k, items)
    for part in blocks(users, bytes_per_row=8 * items):
        block = keys[part]
        threshold = np.partition(block, items - width, axis=1)[:, items - width, None]
        above, equal = block > threshold, block == threshold
        room = width - above.sum(axis=1, keepdims=True)
        chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
        columns = np.nonzero(chosen)[1].reshape(len(block), width)
        values = np.take_along_axis(block, columns, axis=1)
        order = np.argsort(-values, axis=1, kind="stable")
        silent = np.take_along_axis(values, order, axis=1) == -np.inf
        top[part, :width] = np.where(silent, -1, np.take_along_axis(columns, order, axis=1))
    return top
