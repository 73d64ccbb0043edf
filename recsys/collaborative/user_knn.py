"""User-based nearest neighbours: what people take whose histories are like this one."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fusion.compat import tf
from fusion.config import Settings
from fusion.errors import MachineError
from fusion.types import RunOptions
from recsys.collaborative.base import Decay, Member, TrainingData, constant, padded_numbers, recency, with_padding_row
from recsys.collaborative.item_knn import Weighting, rarity
from recsys.collaborative.tables import Numbers

LIMIT_BYTES = 1_500_000_000


class UserKNN(Member):
    """Cosine similarity with shrinkage between a history and the users of the training data (Resnick et al. 1994;
    Herlocker et al. 1999); score of an item = sum over the nearest users who took it of similarity^amplification.

    similarity(h, u) = <w_h, w_u> / (|w_h| |w_u| + shrinkage), where w weighs items by 1 (cosine), by their inverse
    document frequency (tfidf), or by BM25 over their counts. Any history is compared with all users in the graph, over
    tables of the users of each item and of the items of each user. A table holds at most so many of each as its key
    says: of an item the users with the shortest histories, to whom a shared item says most, of a user the latest
    items. The share of entries that both tables cut is the truncation loss.

    A user of the training data is the nearest neighbour of their own history. That takes one of the `neighbours` and
    adds to their own items only, which they have seen. The artifact holds the histories of the training users.
    """

    class Config(Settings):
        """Settings of user-kNN."""

        neighbours: int = Field(100, ge=1, le=10_000)
        """How many of the most similar users are asked."""
        shrinkage: float = Field(50.0, ge=0)
        """Added to the denominator: pulls similarities that rest on few items toward zero."""
        amplification: float = Field(2.0, gt=0, le=10)
        """Exponent of a similarity where it is summed up: above 1, the nearest count for more (Breese et al. 1998)."""
        weighting: Weighting = "tfidf"
        """How much each item counts in a similarity."""
        users_per_item: int = Field(500, ge=1, le=100_000)
        """How many users of an item a history is compared with at most."""
        items_per_user: int = Field(500, ge=1, le=100_000)
        """How many items of a similar user are counted at most, the latest."""
        decay: Decay = 1.0
        """What an item of a history counts in a similarity, relative to the one taken after it."""

    def fit(self, data: TrainingData, options: RunOptions) -> None:
        matrix, config = data.matrix, self.config
        users, items = matrix.shape
        lengths = np.diff(matrix.indptr)
        widths = _width(data.counts, config.users_per_item), _width(lengths, config.items_per_user)
        _refuse_beyond_limit(users, items, widths)
        self.item_weights = rarity(data.counts, users, config.weighting) ** 2
        self.norms = np.sqrt(matrix.astype(np.float32) @ self.item_weights)

        who, what = np.repeat(np.arange(users), lengths), matrix.indices
        age = np.repeat(matrix.indptr[1:], lengths) - np.arange(matrix.nnz)  # 1 is the latest
        self.users_of_items, cut_users = _table(
            what, who, np.lexsort((who, lengths[who], what)), items, widths[0], users
        )
        self.items_of_users, cut_items = _table(who, what, np.lexsort((age, who)), users, widths[1], items)
        self.truncation = (cut_users + cut_items) / max(2 * matrix.nnz, 1)
        self.speaks = data.counts > 0

    def state(self) -> dict[str, np.ndarray]:
        return {
            "users_of_items": self.users_of_items,
            "items_of_users": self.items_of_users,
            "item_weights": self.item_weights,
            "norms": self.norms,
            "speaks": self.speaks,
            "truncation": np.asarray(self.truncation, np.float32),
        }

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.users_of_items, self.items_of_users = state["users_of_items"], state["items_of_users"]
        self.item_weights, self.norms, self.speaks = state["item_weights"], state["norms"], state["speaks"]
        self.truncation = float(state["truncation"])

    def scorer(self) -> tf.Module:
        return _FoldIn(self)


def _width(degrees: np.ndarray, most: int) -> int:
    return max(int(min(degrees.max(initial=0), most)), 1)


def _refuse_beyond_limit(users: int, items: int, widths: tuple[int, int]) -> None:
    needed = 4 * (items * widths[0] + users * widths[1])
    if needed > LIMIT_BYTES:
        raise MachineError(
            f"user-kNN must fit into {LIMIT_BYTES / 1e9} GB; {users} users and {items} items with {widths[0]} users "
            f"per item and {widths[1]} items per user need {needed / 1e9:.1f} GB. "
            "Lower users_per_item or items_per_user."
        )


def _table(
    rows: np.ndarray, values: np.ndarray, order: np.ndarray, count: int, width: int, padding: int
) -> tuple[np.ndarray, int]:
    """The first `width` values of each row in the given order, which goes row by row: int32 `[count, width]`, filled up
    with `padding`; and how many values were cut."""
    rows, values = rows[order], values[order]
    starts = np.searchsorted(rows, np.arange(count))
    within = np.arange(len(rows)) - starts[rows]
    kept = within < width
    table = np.full((count, width), padding, np.int32)
    table[rows[kept], within[kept]] = values[kept]
    return table, int((~kept).sum())


class _FoldIn(tf.Module):
    def __init__(self, member: UserKNN) -> None:
        super().__init__()
        self.users, self.items = len(member.items_of_users), len(member.users_of_items)
        self.neighbours = min(member.config.neighbours, self.users)
        self.shrinkage, self.decay = member.config.shrinkage, member.config.decay
        self.amplification = member.config.amplification
        # Item and user numbers of padding are one past the last, in the tables and in what is summed up from them.
        self.users_of_items = Numbers(with_padding_row(member.users_of_items, self.users), "users_of_items")
        self.items_of_users = Numbers(member.items_of_users, "items_of_users")
        self.item_weights = constant(with_padding_row(member.item_weights), tf.float32, "item_weights")
        self.norms = constant(member.norms, tf.float32, "user_norms")

    def similarities(self, history: tf.Tensor) -> tf.Tensor:
        """Of each history with all users of the training data, `[B, U]`."""
        numbers, recent = padded_numbers(history, self.items), recency(history, self.decay)
        weights = tf.gather(self.item_weights, numbers) * recent  # [B, L]
        shared = _sum_by_number(self.users_of_items.rows(numbers), weights, self.users)
        norm = tf.sqrt(tf.reduce_sum(weights * recent, axis=1, keepdims=True))
        return shared / (norm * self.norms + self.shrinkage + 1e-12)

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        similarity, nearest = tf.math.top_k(self.similarities(history), self.neighbours)  # [B, N]
        weights = tf.pow(similarity, self.amplification)
        return _sum_by_number(self.items_of_users.rows(nearest), weights, self.items)


def _sum_by_number(numbers: tf.Tensor, weights: tf.Tensor, count: int) -> tf.Tensor:
    """Lists of numbers `[B, N, C]`, where `count` is padding, and the weight of each list `[B, N]` -> sums of the
    weights by number, `[B, count]`."""
    batch = tf.shape(numbers)[0]
    cells = numbers + tf.range(batch)[:, None, None] * (count + 1)
    each = weights[..., None] * tf.cast(numbers < count, tf.float32)
    summed = tf.math.unsorted_segment_sum(tf.reshape(each, [-1]), tf.reshape(cells, [-1]), batch * (count + 1))
    return tf.reshape(summed, [batch, count + 1])[:, :count]
