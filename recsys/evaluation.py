"""Ranks all unseen items for every user of a part, in blocks whose memory is bounded, for members and rules alike.

Nothing is sampled. What has been seen is never a candidate; what a member is silent about comes last and is
never recommended by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse

from fusion.compat import tf
from recsys.collaborative.base import PADDING
from recsys.core import HISTORY_SPEC, MemberScores
from recsys.metrics import RankedLists, parse_metric
from recsys.metrics.lists import ranks
from recsys.retrieval import top_k
from recsys.schema import HISTORY, TRAIN, VALIDATION, Interactions

BLOCK_USERS = 128
BLOCK_CELLS = 32_768
"""Users × history length of one block: neighbour members hold this many rows of their lists at a time."""
SCORE_CELLS = 4_000_000
"""Users × systems × items of one block: its scores, of which several copies are held at a time."""


@dataclass(frozen=True)
class Question:
    """What is asked of a ranking for one part of the split.

    Attributes:
        history: `[U, I]` positives that are known when answering, those of a user in the order of time.
        seen: `[U, I]` everything the user has met: never a candidate.
        relevant: `[U, I]` what the user took in this part.
        candidates: bool `[I]`: the items that may be recommended.
    """

    history: sparse.csr_matrix
    seen: sparse.csr_matrix
    relevant: sparse.csr_matrix
    candidates: np.ndarray

    @property
    def users(self) -> np.ndarray:
        """Numbers of the users who have something relevant among the candidates."""
        return np.flatnonzero(np.diff(self.relevant.indptr) > 0)

    def open_to(self, users: np.ndarray) -> np.ndarray:
        """bool `[B, I]`: which candidates the users have not met yet."""
        result = np.tile(self.candidates, (len(users), 1))
        seen = self.seen[users]
        result[np.repeat(np.arange(len(users)), np.diff(seen.indptr)), seen.indices] = False
        return result


def question(data: Interactions, parts: np.ndarray, part: int, *, held_out: bool = False) -> Question:
    """The question that a part asks: known is everything before it, that is training, given histories and,
    for the test, validation; relevant are the part's positives that were not seen before."""
    earlier = (TRAIN, HISTORY) if part == VALIDATION else (TRAIN, HISTORY, VALIDATION)
    known = np.isin(parts, earlier)
    seen = data.matrix(known)
    candidates = np.ones(data.shape[1], bool)
    if held_out:
        candidates = data.matrix(parts == part).getnnz(axis=0) > 0
        candidates &= data.matrix(parts == TRAIN).getnnz(axis=0) == 0
    relevant = data.matrix((parts == part) & data.positive)
    relevant = relevant - relevant.multiply(seen)
    relevant = (relevant @ sparse.diags(candidates.astype(np.float32))).tocsr()
    relevant.eliminate_zeros()
    relevant.sort_indices()
    return Question(data.matrix(known & data.positive), seen, relevant, candidates)


def blocks(matrix: sparse.csr_matrix, users: np.ndarray, scores: int = 1) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Users in blocks of similar history length: numbers `[B]` and histories int32 `[B, L]` padded with -1.

    `scores` says how many numbers are made for each user (systems × items), so that large catalogues get short blocks.
    """
    most = int(np.clip(SCORE_CELLS // scores, 1, BLOCK_USERS))
    lengths = np.diff(matrix.indptr)[users]
    order = users[np.argsort(lengths, kind="stable")]
    start = 0
    while start < len(order):
        stop = min(start + most, len(order))
        longest = max(int(matrix.indptr[order[stop - 1] + 1] - matrix.indptr[order[stop - 1]]), 1)
        stop = max(start + 1, min(stop, start + BLOCK_CELLS // longest))
        yield order[start:stop], history_rows(matrix, order[start:stop])
        start = stop


def history_rows(matrix: sparse.csr_matrix, users: np.ndarray) -> np.ndarray:
    """The columns of the given rows in their order, int32 `[B, L]`, padded with -1 to the longest (at least 1)."""
    part = matrix[users]
    lengths = np.diff(part.indptr)
    result = np.full((len(users), max(int(lengths.max(initial=0)), 1)), PADDING, np.int32)
    within = np.arange(part.nnz) - np.repeat(part.indptr[:-1], lengths)
    result[np.repeat(np.arange(len(users)), lengths), within] = part.indices
    return result


def sample(asked: Question, most: int, seed: int = 0) -> Question:
    """The same question to at most `most` of its users, drawn by `seed`; everything else stays as it is."""
    users = asked.users
    if len(users) <= most:
        return asked
    chosen = np.zeros(asked.relevant.shape[0], np.float32)
    chosen[np.random.default_rng(seed).permutation(users)[:most]] = 1.0
    relevant = (sparse.diags(chosen) @ asked.relevant).tocsr()
    relevant.eliminate_zeros()
    relevant.sort_indices()
    return replace(asked, relevant=relevant)


class Ranker:
    """Ranks the candidates of a question by every member and every rule in one pass over the users.

    Scores, fusion and the choice of the best k are one graph over a block of users; what of a block stays are
    its lists and ranks. Memory is bounded by the block, whatever the number of users.
    """

    def __init__(self, members: MemberScores, rules: Mapping[str, Callable[..., Any]], k: int) -> None:
        self.members = members
        self.rules = dict(rules)
        self.names = [*members.names, *self.rules]
        self.k = k
        self._rank = tf.function(
            self._ranked, input_signature=[HISTORY_SPEC, tf.TensorSpec([None, members.items], tf.bool)]
        )

    def _ranked(self, history: tf.Tensor, open_to: tf.Tensor) -> tuple[tf.Tensor, list[tf.Tensor]]:
        """The lists of all systems, int32 `[B, N, K]` padded with -1, and by system what they are sorted by:
        scores `[B, I]`, -inf where the system is silent and where an item is no candidate."""
        scores, mask = self.members(history)
        systems = list(zip(tf.unstack(scores, axis=1), tf.unstack(mask & open_to[:, None], axis=1), strict=True))
        context = self.members.context(history)
        systems += [(rule(scores, mask, context), open_to) for rule in self.rules.values()]
        keys = [tf.where(heard & tf.math.is_finite(said), said, -np.inf) for said, heard in systems]
        best = [top_k(key, self.k) for key in keys]
        lists = [tf.where(values > -np.inf, items, PADDING) for values, items in best]
        return tf.stack(lists, axis=1), keys

    def __call__(self, asked: Question, on_block: Callable[[int], None] | None = None) -> Ranked:
        """Lists of `k` items for every user who has something relevant."""
        lists: dict[str, list[RankedLists]] = {name: [] for name in self.names}
        order = []
        for users, history in blocks(asked.history, asked.users, len(self.names) * self.members.items):
            order.append(users)
            open_to = asked.open_to(users)
            top, keys = self._rank(history, open_to)
            relevant, counts = asked.relevant[users], open_to.sum(axis=1, dtype=np.int64)
            indptr, indices = relevant.indptr.astype(np.int64), relevant.indices.astype(np.int64)
            for position, name in enumerate(self.names):
                places = ranks(np.asarray(memoryview(keys[position])), open_to, indptr, indices)  # without a copy
                lists[name].append(RankedLists(top[:, position].numpy(), indptr, indices, places, counts))
            if on_block:
                on_block(len(users))
        return Ranked(np.concatenate(order), {name: RankedLists.merge(parts) for name, parts in lists.items()})


@dataclass(frozen=True)
class Ranked:
    """Ranked lists by system; `users[u]` is the number of the user in row u of every list."""

    users: np.ndarray
    lists: dict[str, RankedLists]


class SingleScorer(MemberScores):
    """One scorer in place of members: what an epoch of a member that is still being trained is measured with."""

    def __init__(self, scorer: tf.Module, items: int) -> None:
        tf.Module.__init__(self)
        self.names = ["member"]
        self.scorers = [scorer]
        self.speaks = tf.ones([1, items])
        self.personal = [True]
        self.popularity = None


def validator(asked: Question, metric: str, max_users: int = 1000) -> Callable[[tf.Module], dict[str, float]]:
    """Measures a scorer on validation users (at most `max_users`, the same in every epoch)."""
    narrowed = sample(asked, max_users)
    parsed = parse_metric(metric, "candidates")

    def measure(scorer: tf.Module) -> dict[str, float]:
        ranker = Ranker(SingleScorer(scorer, len(asked.candidates)), {}, parsed.k or 10)
        values = parsed.of_lists(ranker(narrowed).lists["member"])
        return {metric: float(np.nanmean(values))}

    return measure
