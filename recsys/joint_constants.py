"""Members without a gradient in the fused scores of joint training: what they say is added, and not learned.

A member knows the rows that it was fitted on by heart, and trained members would learn to leave those to it. So the
users are dealt into folds, and what is said of a user is said by members that were fitted without that user: out of
fold, which they can do because every member scores from histories.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from scipy import sparse

from fusion.compat import tf
from fusion.types import derive_seed
from recsys.collaborative.base import Member, TrainingData
from recsys.core import MemberScores


class Constants:
    """What fitted members say of the targets of a batch.

    Args:
        whole: by name, fitted on all training users; what is measured after an epoch.
        folds: the same, each time without the users of one fold.
        fold_of: int32 `[U]`, the fold of each user.
    """

    def __init__(self, whole: Mapping[str, Member], folds: Sequence[Mapping[str, Member]], fold_of: np.ndarray) -> None:
        self.whole, self.fold_of = dict(whole), fold_of
        self._folds = [MemberScores(members) for members in folds]

    def said(self, history: tf.Tensor, fold: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Scores, and 1 where a member speaks: float32 `[b, S, C]` each.

        Each history is scored once, by the members of its fold; of scorers that have it, at the targets alone.

        Args:
            history: int32 `[b, L]`, padded at the end with -1.
            fold: int32 `[b]`.
            targets: int32 `[C]`, item numbers.
        """
        places, scores, masks = [], [], []
        for number, members in enumerate(self._folds):
            rows = tf.cast(tf.where(fold == number)[:, 0], tf.int32)
            items = tf.tile(targets[None], [tf.size(rows), 1])
            found, heard = members.at(tf.gather(history, rows), items)
            places.append(rows)
            scores.append(tf.where(heard, found, 0.0))
            masks.append(tf.cast(heard, tf.float32))
        return tf.stop_gradient(tf.dynamic_stitch(places, scores)), tf.dynamic_stitch(places, masks)


def deal_users(users: int, folds: int, seed: int) -> np.ndarray:
    """The fold of each user, int32 `[U]`; sizes differ by at most one."""
    shuffled = np.random.default_rng(derive_seed(seed, "folds of users")).permutation(users)
    result = np.empty(users, np.int32)
    result[shuffled] = np.arange(users) % folds
    return result


def without_users(data: TrainingData, users: np.ndarray) -> TrainingData:
    """The same rows without those of some users, bool `[U]`; nothing may be validated on them."""
    matrix, lengths = data.matrix, np.diff(data.matrix.indptr)
    kept = np.repeat(~users, lengths)
    indptr = np.concatenate([[0], np.cumsum(np.where(users, 0, lengths))])
    rest = sparse.csr_matrix((matrix.data[kept], matrix.indices[kept], indptr), matrix.shape)
    return replace(data, matrix=rest, validate=None, validation_hash="")
