"""Training rows that hold several pairs of one user, so that a history is pooled once and not for each of its items.

In batches of pairs (`recsys.collaborative.pairs`) every target brings a history of its own: 1024 pairs with histories
of 128 items read 131,072 vectors. Here a row is some items of a user, cut into parts; each part is foretold from the
other ones, so that every item of the row is both history and target, and 1024 pairs read 2048 vectors. Scored are the
parts with the items of all rows, a fraction of all pairs with each other.
"""

from __future__ import annotations

import numpy as np
from scipy import sparse

from fusion.compat import keras, tf
from fusion.training.precision import wide
from fusion.training.strategy import all_replicas
from fusion.types import Features
from recsys.collaborative.base import PADDING
from recsys.collaborative.pairs import NEVER, Loss

PARTS = 4
"""Parts of a row: three quarters of it are the history of the last one."""

_STRIDES = np.array([100_003, 100_019, 100_043, 100_049, 100_057, 100_069, 100_103, 100_109], np.int64)
"""Primes, greater than any history: steps of this size through a list meet each of its items once."""


class UserRows:
    """Rows of `width` items of a user, which has as many rows as his items fill.

    `gather(positions)` -> `items` int32 `[r, width]`, padded with -1, and `probability` float32 `[r, width]`, how often
    the item is drawn as a negative. Which items make a row is drawn for each batch anew and decided by the seed and the
    rows of the batch, so that a run that was interrupted draws them again. Users with one item are left out.
    """

    def __init__(self, matrix: sparse.csr_matrix, width: int, seed: int) -> None:
        lengths = np.diff(matrix.indptr).astype(np.int64)
        rows = np.where(lengths >= 2, np.maximum(np.rint(lengths / width), 1), 0).astype(np.int64)
        self.users = np.repeat(np.arange(matrix.shape[0], dtype=np.int64), rows)
        self.starts, self.lengths = matrix.indptr[:-1].astype(np.int64), lengths
        self.items, self.width, self.seed = matrix.indices, width, seed
        counts = np.bincount(matrix.indices[np.repeat(lengths >= 2, lengths)], minlength=matrix.shape[1])
        self.probability = (counts / max(counts.sum(), 1)).astype(np.float32)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def pairs(self) -> int:
        """Items of all rows together, without padding."""
        return int(np.minimum(self.lengths[self.users], self.width).sum())

    def gather(self, positions: np.ndarray) -> Features:
        random = np.random.default_rng([self.seed, len(positions), *positions[:8].tolist()])
        users = self.users[positions]
        lengths = self.lengths[users, None]
        first, stride = random.integers(0, lengths), random.choice(_STRIDES, (len(users), 1))
        place = np.arange(self.width)
        items = self.items[self.starts[users, None] + (first + stride * place) % lengths].astype(np.int32)
        return {"items": np.where(place < lengths, items, PADDING), "probability": self.probability[items]}


def pool_others(rows: tf.Tensor, items: tf.Tensor) -> tf.Tensor:
    """Vectors of items `[r, L, D]` and their numbers `[r, L]` -> `[r, PARTS, D]`: for each part the sum over the other
    parts, over the root of their number (as `base.pool_history`)."""
    known = tf.cast(items >= 0, tf.float32)
    size = rows.shape[1] // PARTS
    sums = tf.reduce_sum(tf.reshape(rows * known[..., None], [-1, PARTS, size, rows.shape[2]]), axis=2)
    others = tf.reduce_sum(sums, axis=1, keepdims=True) - sums
    return others * tf.math.rsqrt(tf.maximum(_other_items(known), 1.0))[..., None]


def _other_items(known: tf.Tensor) -> tf.Tensor:
    """How many items the other parts have, `[r, PARTS]`, where known `[r, L]` is 1 for an item and 0 for padding."""
    counts = tf.reduce_sum(tf.reshape(known, [-1, PARTS, known.shape[1] // PARTS]), axis=2)
    return tf.reduce_sum(counts, axis=1, keepdims=True) - counts


def softmax_of_rows(model: keras.Model, temperature: float) -> Loss:
    """The loss `[r]` of rows: the mean over their items of `pairs.in_batch_softmax`.

    The negatives of an item are the items of all other rows of the batch, corrected for how often they are drawn, but
    for those that equal one of its own row: what the user took is no negative.

    `model` maps `items` `[r, L]` to `user` `[r, PARTS, D]`, of which part k is without the k-th part of the items, and
    `item` `[r, L, D]`.
    """

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        items = batch["items"]
        vectors = model({"items": items}, training=True)
        width, length = items.shape[1], vectors["item"].shape[2]
        numbers = tf.reshape(all_replicas(items), [-1])
        correction = tf.math.log(tf.clip_by_value(tf.reshape(all_replicas(batch["probability"]), [-1]), 1e-6, 1.0))
        candidates = tf.reshape(all_replicas(vectors["item"]), [-1, length])
        user = vectors["user"] / temperature
        logits = wide(tf.matmul(tf.reshape(user, [-1, length]), candidates, transpose_b=True))
        # What is added to the scores is put together by row: all parts of a row add the same, in one pass over them.
        added = tf.where(_in_row(items, numbers) | (numbers < 0), NEVER, -correction)  # [r, b]
        logits = tf.reshape(logits, [-1, PARTS, tf.size(numbers)]) + added[:, None]
        negatives = tf.reduce_logsumexp(logits, axis=2)[..., None]  # [r, PARTS, 1]

        parts = tf.reshape(wide(vectors["item"]), [-1, PARTS, width // PARTS, length])
        own = tf.reshape(correction[: tf.size(items)], [-1, PARTS, width // PARTS])
        positives = tf.reduce_sum(parts * wide(user)[:, :, None], axis=-1) - own
        known = tf.cast(items >= 0, tf.float32)
        counted = tf.reshape(known, tf.shape(positives)) * tf.sign(_other_items(known))[..., None]
        return tf.reduce_sum(tf.nn.softplus(negatives - positives) * counted, axis=[1, 2]) / width

    return loss


def _in_row(items: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Whether each of `numbers` `[b]`, which begin with `items` `[r, L]`, is among the items of each row: `[r, b]`.

    Looked up in a table of distinct numbers and rows; to compare every number with every item takes L times as much.
    """
    place = tf.unique(numbers).idx
    rows = tf.repeat(tf.range(tf.shape(items)[0]), items.shape[1])
    cells = tf.stack([place[: tf.size(items)], rows], axis=1)
    table = tf.scatter_nd(cells, tf.ones_like(rows, tf.bool), [tf.size(numbers), tf.shape(items)[0]])
    return tf.transpose(tf.gather(table, place))
