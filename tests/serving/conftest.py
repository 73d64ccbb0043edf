"""A toy artifact with the signatures of a recommender, made of plain TensorFlow."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusion.compat import tf
from fusion.export import savedmodel
from fusion.export.manifest import Manifest, write_manifest

ITEMS = ["i0", "i1", "i2", "i3", "i4", "ä ö"]
USERS = ["u0", "u1", "u 2"]
K_MAX = 4


class ToyRecommender(tf.Module):
    """Two members: `place` likes low item numbers, `history` likes items near those of the history.

    User u<n> has seen item n. Not a model: just enough behaviour that every input changes the answer.
    """

    def __init__(self) -> None:
        self.items = tf.constant(ITEMS)
        self.item_table = self._table(ITEMS)
        self.user_table = self._table(USERS)

    @staticmethod
    def _table(ids):
        return tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(ids, tf.range(len(ids))), -1)

    def _members(self, numbers):
        """[B, L] -> [B, 2, I]"""
        place = -tf.range(len(ITEMS), dtype=tf.float32)[None] * tf.ones_like(numbers[:, :1], tf.float32)
        there = tf.cast(numbers >= 0, tf.float32)[..., None]
        near = tf.reduce_sum(tf.one_hot((numbers + 1) % len(ITEMS), len(ITEMS)) * there, 1)
        return tf.stack([place, 10.0 * near], axis=1)

    def _mask(self, numbers):
        return tf.reduce_max(tf.one_hot(numbers, len(ITEMS)), axis=1) > 0

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.string, n) for n in ("history", "candidates")])
    def score(self, history, candidates):
        scores = tf.reduce_sum(self._members(self.item_table.lookup(history)), axis=1)
        numbers = self.item_table.lookup(candidates)
        picked = tf.gather(scores, tf.maximum(numbers, 0), batch_dims=1)
        return {"scores": tf.where(numbers >= 0, picked, -float("inf"))}

    @tf.function(
        input_signature=[
            tf.TensorSpec([None], tf.string, "user_id"),
            tf.TensorSpec([None, None], tf.string, "history"),
            tf.TensorSpec([None], tf.int32, "k"),
            tf.TensorSpec([None, None], tf.string, "exclude"),
            tf.TensorSpec([None, None], tf.string, "include"),
        ]
    )
    def recommend(self, user_id, history, k, exclude, include):
        user = self.user_table.lookup(user_id)
        own = tf.where((user >= 0)[:, None], user[:, None], -1)
        numbers = tf.concat([own, self.item_table.lookup(history)], axis=1)
        members = self._members(numbers)
        allowed = ~self._mask(numbers) & ~self._mask(self.item_table.lookup(exclude))
        included = self._mask(self.item_table.lookup(include))
        allowed &= included | tf.reduce_all(include == "", axis=1)[:, None]
        scores = tf.where(allowed, tf.reduce_sum(members, axis=1), -float("inf"))
        values, best = tf.math.top_k(scores, K_MAX)
        there = (values > -float("inf")) & (tf.range(K_MAX)[None] < k[:, None])
        parts = tf.gather(members, tf.tile(best[:, None], [1, 2, 1]), batch_dims=2)
        return {
            "item_ids": tf.where(there, tf.gather(self.items, best), ""),
            "scores": tf.where(there, values, -float("inf")),
            "contributions": tf.where(there[:, None], parts, 0.0),
            "known_user": user >= 0,
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.int32, "x")])
    def fail(self, x):
        with tf.control_dependencies([tf.debugging.assert_positive(x)]):
            return {"x": tf.identity(x)}


@pytest.fixture(scope="session")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "1"
    module = ToyRecommender()
    savedmodel.save(
        module, folder, {"serving_default": module.score, "recommend": module.recommend, "fail": module.fail}
    )
    titles = ["Zero", "One [bold]", None, "Three", "Four", "Five"]
    pq.write_table(pa.table({"item_id": ITEMS, "title": titles}), folder / "items.parquet")
    pq.write_table(pa.table({"user_id": USERS}), folder / "users.parquet")
    manifest = Manifest(
        kind="recommender",
        members=("place", "history"),
        signatures=savedmodel.signatures_of(folder),
        limits={"k_max": K_MAX},
    )
    write_manifest(folder, manifest)
    return folder
