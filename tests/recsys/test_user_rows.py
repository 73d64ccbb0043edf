"""Rows of several items of a user: what they hold, the loss against pairs one by one, and that the member learns."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from fusion.compat import tf
from fusion.errors import ConfigError
from fusion.types import RunOptions
from recsys.collaborative.matrix_factorization import MatrixFactorization
from recsys.collaborative.user_rows import PARTS, UserRows, pool_others, softmax_of_rows
from worlds import World, fitted, member_part, ndcg

WIDTH = 2 * PARTS


@functools.cache
def world() -> World:
    return World.planted()


class TestUserRows:
    MATRIX = sparse.csr_matrix((np.random.default_rng(0).random((40, 60)) < 0.25).astype(np.float32))

    def test_distinct_items_of_one_user(self) -> None:
        rows = UserRows(self.MATRIX, WIDTH, seed=0)
        batch = rows.gather(np.arange(len(rows)))
        assert batch["items"].shape == (len(rows), WIDTH) and batch["items"].dtype == np.int32
        for user, items in zip(rows.users, batch["items"], strict=True):
            taken = items[items >= 0]
            assert set(taken) <= set(self.MATRIX[user].indices) and len(set(taken)) == len(taken)
            assert len(taken) == min(WIDTH, self.MATRIX[user].nnz)
        assert rows.pairs == (batch["items"] >= 0).sum()

    def test_every_item_comes_as_often(self) -> None:
        """A user of 12 items has 2 rows of 8: in many epochs each item stands in two thirds of them."""
        rows = UserRows(sparse.csr_matrix(np.ones((100, 12), np.float32)), WIDTH, seed=0)
        assert len(rows) == 200
        drawn = np.concatenate(
            [rows.gather(np.random.default_rng(n).permutation(200))["items"].ravel() for n in range(20)]
        )
        np.testing.assert_allclose(np.bincount(drawn, minlength=12) / 4000, 2 / 3, atol=0.04)

    def test_who_took_little(self) -> None:
        """One item cannot be foretold; two are padded. The probabilities are shares of the interactions used."""
        rows = UserRows(sparse.csr_matrix(np.array([[1, 0, 0], [1, 1, 0], [0, 1, 1]], np.float32)), WIDTH, seed=0)
        assert rows.users.tolist() == [1, 2] and rows.pairs == 4
        items = rows.gather(np.array([0]))["items"]
        assert sorted(items[0, :2]) == [0, 1] and (items[0, 2:] == -1).all()
        np.testing.assert_allclose(rows.probability, [1 / 4, 2 / 4, 1 / 4])

    def test_the_batch_decides(self) -> None:
        """A run that is resumed draws the same rows, and another epoch others."""
        rows = UserRows(self.MATRIX, WIDTH, seed=0)
        one, same, other = (rows.gather(np.array(numbers))["items"] for numbers in ([5, 9], [5, 9], [9, 5]))
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other[::-1])


def test_the_loss_is_that_of_the_pairs_one_by_one() -> None:
    """Against a loop over the items of all rows: each from the other parts of its row, without what the user took."""
    random = np.random.default_rng(1)
    items = np.stack([random.permutation(20)[:WIDTH] for _ in range(3)]).astype(np.int32)
    items[1, 5:] = -1  # parts of two items: the third has one, the last none
    items[2, 1:] = -1  # nothing is left to foretell its item from
    history, item = random.normal(size=(2, 20, 3)).astype(np.float32)
    share = random.random(20).astype(np.float32)

    def model(batch: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
        numbers = tf.maximum(batch["items"], 0)
        return {"user": pool_others(tf.gather(history, numbers), batch["items"]), "item": tf.gather(item, numbers)}

    batch = {"items": tf.constant(items), "probability": tf.constant(share[items])}
    # Of unknown length, as a batch is that several processes have gathered.
    shapes = {name: tf.TensorSpec([None, WIDTH], rows.dtype) for name, rows in batch.items()}
    found = tf.function(softmax_of_rows(model, 0.5), input_signature=[shapes])(batch).numpy()

    part = np.arange(WIDTH) // (WIDTH // PARTS)
    candidates = items[items >= 0]
    expected = np.zeros(3)
    for row, numbers in enumerate(items):
        for place in np.flatnonzero(numbers >= 0):
            others = numbers[(part != part[place]) & (numbers >= 0)]
            if len(others):
                user = history[others].sum(axis=0) / np.sqrt(len(others))
                negatives = candidates[~np.isin(candidates, numbers)]
                scores = item[[numbers[place], *negatives]] @ user / 0.5 - np.log(share[[numbers[place], *negatives]])
                expected[row] += (np.log(np.exp(scores).sum()) - scores[0]) / WIDTH
    assert expected[2] == 0
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"together": 6}, {"together": 8, "loss": "bpr"}])
def test_what_cannot_be_trained_together_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="together must be 1"):
        MatrixFactorization.check(MatrixFactorization.Config(**settings))


def test_it_learns_and_the_seed_decides(tmp_path: Path) -> None:
    """D3m: the loss falls, taste is found, and a second run ends with the same bits."""
    training = {"epochs": 8, "batch_size": 128, "learning_rate": 0.1}
    part = member_part({"kind": "matrix_factorization", "factors": 8, "together": 4, "training": training})
    data = world().training(tmp_path / "cache")
    member, again = part.make(3), part.make(3)
    losses = [epoch["train_loss"] for epoch in member.fit(data, RunOptions(3, tmp_path / "run", quiet=True)).epochs]
    again.fit(data, RunOptions(3, tmp_path / "again", quiet=True))
    assert losses[-1] < 0.97 * losses[0]
    for name, table in member.state().items():
        np.testing.assert_array_equal(again.state()[name], table)
    popular = fitted({"kind": "popularity"}, data, tmp_path / "popular")
    asked = world().asked(among=popular.speaks)
    assert ndcg(member, asked) > 1.3 * ndcg(popular, asked)
