"""Losses and starts of the factorisation, LightGCN and node2vec: what they compute, and that they learn (D3m, D8m)."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fusion.compat import tf
from fusion.types import RunOptions
from recsys.collaborative.base import PADDING, TrainingData
from recsys.collaborative.light_gcn import Propagation
from recsys.collaborative.node2vec import WalkPairs, item_walks
from recsys.collaborative.pairs import NegativePairs, pairwise
from worlds import World, fitted, member_part, ndcg

TRAINING = {"epochs": 5, "batch_size": 128, "learning_rate": 0.02}


@functools.cache
def world() -> World:
    return World.planted()


def trained(kind: str, folder: Path, **settings: Any) -> tuple[Any, list[float]]:
    """A member, and the mean loss of each epoch."""
    made = member_part({"kind": kind, "factors": 8, "training": TRAINING, **settings}).make(3)
    history = made.fit(world().training(folder / "cache"), RunOptions(3, folder / "run", quiet=True))
    return made, [epoch["train_loss"] for epoch in history.epochs]


def popularity_beaten(member: Any, folder: Path) -> bool:
    """Whether the member ranks the test's items clearly better than popularity does."""
    popular = fitted({"kind": "popularity"}, world().training(folder / "cache"), folder / "popular")
    asked = world().asked(among=popular.speaks)
    return ndcg(member, asked) > 1.3 * ndcg(popular, asked)


class TestNegatives:
    @pytest.mark.parametrize("sampling", ["uniform", "popularity"])
    def test_they_are_what_the_user_did_not_take(self, sampling: Any) -> None:
        matrix = world().training(Path()).matrix
        pairs = NegativePairs(matrix, 6, seed=0, negatives=9, sampling=sampling)
        batch = pairs.gather(np.arange(len(pairs)))
        assert batch["negatives"].shape == (len(pairs), 9) and batch["negatives"].dtype == np.int32
        assert (batch["negatives"] >= 0).mean() > 0.99
        users, negatives = np.repeat(pairs.users, 9), batch["negatives"].ravel()
        known = negatives >= 0
        assert not (matrix.toarray()[users, negatives] > 0)[known].any()
        assert (world().counts[negatives[known]] > 0).all(), "cold items are not negatives: nothing is known of them"

    def test_drawn_alike_or_by_popularity(self) -> None:
        """Item 0 was taken by 90 users, nine others by one each; the last user took two of these."""
        taken = np.zeros((98, 10), np.float32)
        taken[:90, 0] = 1
        taken[np.arange(90, 97), np.arange(3, 10)] = 1
        taken[97, [1, 2]] = 1
        for sampling, share in (("uniform", 1 / 8), ("popularity", 90 / 97)):
            pairs = NegativePairs(sparse.csr_matrix(taken), 4, seed=0, negatives=1000, sampling=sampling)
            assert (pairs.gather(np.array([1]))["negatives"] == 0).mean() == pytest.approx(share, abs=0.04)

    def test_who_took_everything_has_none(self) -> None:
        matrix = sparse.csr_matrix(np.array([[1, 1, 1], [1, 1, 0]], np.float32))
        pairs = NegativePairs(matrix, 6, seed=0, negatives=4, sampling="uniform")
        batch = pairs.gather(np.arange(5))
        assert (batch["negatives"][:3] == PADDING).all()
        assert set(batch["negatives"][3:].ravel()) <= {PADDING, 2} and (batch["negatives"][3:] == 2).any()

    def test_the_batch_decides(self) -> None:
        """The same rows have the same negatives in a run that is resumed, and others in another epoch."""
        pairs = NegativePairs(world().training(Path()).matrix, 6, seed=0, negatives=5, sampling="uniform")
        one, same, other = (pairs.gather(np.array(rows))["negatives"] for rows in ([5, 9], [5, 9], [9, 5]))
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one[0], other[1])


class TestPairwise:
    """Scores: positive 2; negatives 1, 3 and one that was not found. The second pair has no negative at all."""

    USER = np.array([[1.0, 0.0], [1.0, 1.0]], np.float32)
    ITEM = np.array([[2.0, 5.0], [1.0, 1.0]], np.float32)
    VECTORS = np.array([[[1.0, 2.0], [3.0, 0.0], [99.0, 0.0]]] * 2, np.float32)
    NUMBERS = np.array([[4, 5, -1], [-1, -1, -1]], np.int32)

    def loss(self, kind: Any) -> list[float]:
        def model(batch: dict[str, tf.Tensor], training: bool) -> dict[str, tf.Tensor]:
            assert set(batch) == {"negatives"} and training
            return {"user": tf.constant(self.USER), "item": tf.constant(self.ITEM), "negatives": self.VECTORS}

        return list(pairwise(model, kind, items=100)({"negatives": tf.constant(self.NUMBERS)}).numpy())

    def test_bpr_worked_by_hand(self) -> None:
        assert self.loss("bpr") == pytest.approx([(np.log1p(np.exp(-1.0)) + np.log1p(np.exp(1.0))) / 2, 0.0])

    def test_warp_worked_by_hand(self) -> None:
        """Of two negatives the one with 3 is within the margin (2 - 1 is not): half of 100 items, and a gap of 2."""
        assert self.loss("warp") == pytest.approx([np.log1p(50.0) * 2.0, 0.0])


@pytest.mark.parametrize(
    "settings",
    [{"loss": "bpr"}, {"loss": "bpr", "sampling": "popularity"}, {"loss": "warp"}],
    ids=lambda settings: "-".join(settings.values()),
)
def test_each_way_to_train_learns(settings: dict[str, Any], tmp_path: Path) -> None:
    """D3m: the loss falls, and taste is found."""
    member, losses = trained("matrix_factorization", tmp_path, negatives=8, **settings)
    assert losses[-1] < 0.9 * losses[0]
    assert popularity_beaten(member, tmp_path)


def test_the_svd_is_a_head_start(tmp_path: Path) -> None:
    """B14: vectors learned without supervision rank well before the first step; drawn ones are chance."""
    untrained = {"epochs": 1, "batch_size": 1024, "learning_rate": 1e-9}
    asked = world().asked(among=world().counts > 0)
    drawn, svd = (
        ndcg(trained("matrix_factorization", tmp_path / init, init=init, training=untrained)[0], asked)
        for init in ("random", "svd")
    )
    assert svd > 2 * drawn


class TestLightGCN:
    def test_no_layers_are_plain_factorisation(self, tmp_path: Path) -> None:
        """D8m: equal to the last bit, for both kinds of loss."""
        for loss in ("softmax", "bpr"):
            settings: dict[str, Any] = {"loss": loss, "dropout": 0.2, "training": {**TRAINING, "epochs": 1}}
            plain, plain_losses = trained("matrix_factorization", tmp_path / loss, **settings)
            graph, graph_losses = trained("light_gcn", tmp_path / f"{loss}-graph", layers=0, **settings)
            assert graph_losses == plain_losses
            for name, table in plain.state().items():
                np.testing.assert_array_equal(graph.state()[name], table)

    @pytest.mark.parametrize("layers", [1, 2, 3])
    def test_propagation_against_dense_numpy(self, layers: int) -> None:
        """D8m: eq. 3, 4 and 7 of He et al. 2020, user by user; folding in a training user is propagating it."""
        random = np.random.default_rng(0)
        taken = random.random((7, 5)) < 0.5
        taken[0], taken[:, 4], taken[0, 1] = False, False, True  # a user with one item, an item that nobody took
        history, item = random.normal(size=(2, 5, 3))
        lengths, counts = np.maximum(taken.sum(1), 1), np.maximum(taken.sum(0), 1)
        users = [np.array([history[taken[u]].sum(0) / np.sqrt(lengths[u]) for u in range(7)])]
        items = [item]
        for _ in range(layers):
            next_users, next_items = np.zeros((7, 3)), np.zeros((5, 3))
            for u, i in np.argwhere(taken):
                next_users[u] += items[-1][i] / np.sqrt(lengths[u] * counts[i])
                next_items[i] += users[-1][u] / np.sqrt(lengths[u] * counts[i])
            users.append(next_users)
            items.append(next_items)

        matrix = sparse.csr_matrix(taken.astype(np.float32))
        tables = Propagation(matrix, layers)(tf.constant(history, tf.float32), tf.constant(item, tf.float32))
        table, vectors = (tensor.numpy() for tensor in tables)
        np.testing.assert_allclose(vectors, np.mean(items, axis=0), rtol=1e-5, atol=1e-6)
        folded = np.array([table[taken[u]].sum(0) / np.sqrt(lengths[u]) for u in range(7)])
        np.testing.assert_allclose(folded, np.mean(users, axis=0), rtol=1e-5, atol=1e-6)

    def test_the_gradient_reaches_both_tables(self) -> None:
        """Against finite differences of a plain function of the propagated tables."""
        matrix = sparse.csr_matrix((np.random.default_rng(1).random((6, 4)) < 0.6).astype(np.float32))
        propagate, random = Propagation(matrix, 2), np.random.default_rng(2)
        start = [tf.constant(random.normal(size=(4, 2)), tf.float32) for _ in range(2)]

        def value(history: tf.Tensor, item: tf.Tensor) -> tf.Tensor:
            table, vectors = propagate(history, item)
            return tf.reduce_sum(tf.sin(table)) + tf.reduce_sum(vectors**2)

        expected, found = tf.test.compute_gradient(value, start, delta=1e-2)
        for one, other in zip(expected, found, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3)

    def test_it_learns(self, tmp_path: Path) -> None:
        """D8m"""
        member, losses = trained("light_gcn", tmp_path, layers=2, loss="bpr", negatives=8)
        assert losses[-1] < 0.9 * losses[0]
        assert popularity_beaten(member, tmp_path)


class TestNode2Vec:
    # Users 0 and 1; items 0, 1, 2. User 0 took 0 and 1, user 1 took 0, 1 and 2.
    MATRIX = sparse.csr_matrix(np.array([[1, 1, 0], [1, 1, 1]], np.float32))

    def test_walks_follow_the_edges(self) -> None:
        walks = item_walks(self.MATRIX, walks=50, length=6, p=1.0, q=1.0, seed=0)
        assert walks.shape == (150, 6) and walks.dtype == np.int32
        assert np.bincount(walks[:, 0]).tolist() == [50, 50, 50]
        together = (self.MATRIX.T @ self.MATRIX).toarray() > 0
        assert together[walks[:, :-1], walks[:, 1:]].all()

    @pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (4.0, 1.0), (0.5, 2.0)])
    def test_steps_have_the_chances_of_the_paper(self, p: float, q: float) -> None:
        """Grover & Leskovec 2016, eq. 2: 1/p for the way back and 1/q for each other way, from items and from users."""
        walks = item_walks(self.MATRIX, walks=60_000, length=3, p=p, q=q, seed=1)[-60_000:]
        # All begin at item 2, which only user 1 took: the first step has one way, the second goes back or to 0 or 1.
        back = (1 / p) / (1 / p + 2 / q)
        np.testing.assert_allclose(np.bincount(walks[:, 1]) / 60_000, [(1 - back) / 2] * 2 + [back], atol=0.01)
        # From item 0, reached from user 1: back to user 1, or on to user 0, from whom item 1 is the only other one.
        to_other_user = (1 / q) / (1 / p + 1 / q)
        from_other = to_other_user * (1 / q) / (1 / p + 1 / q)
        from_same = (1 - to_other_user) * (1 / q) / (1 / p + 2 / q)
        found = np.bincount(walks[walks[:, 1] == 0, 2], minlength=3) / (walks[:, 1] == 0).sum()
        assert found[1] == pytest.approx(from_other + from_same, abs=0.015)
        assert found[2] == pytest.approx(from_same, abs=0.015)

    def test_pairs_worked_by_hand(self) -> None:
        pairs = WalkPairs(np.array([[3, 1, 3, 2]]), window=2, items=5)
        batch = pairs.gather(np.arange(len(pairs)))
        found = sorted(zip(batch["source"].tolist(), batch["target"].tolist(), strict=True))
        assert found == sorted([(3, 1), (1, 3), (3, 2), (1, 3), (3, 1), (2, 3), (1, 2), (2, 1)])
        np.testing.assert_allclose(pairs.probability, [0, 3 / 8, 2 / 8, 3 / 8, 0])

    def test_items_of_a_group_lie_closer(self, tmp_path: Path) -> None:
        """B15: two groups of items, each taken by its own users but for a tenth; the vectors find the groups again."""
        random = np.random.default_rng(0)
        group, side = np.arange(40) % 2, np.arange(120) % 2
        chance = np.where(side[:, None] == group, 0.36, 0.04)
        matrix = sparse.csr_matrix((random.random((120, 40)) < chance).astype(np.float32))
        part = member_part({"kind": "node2vec", "factors": 8, "walks": 5, "training": TRAINING})
        member: Any = part.make(0)
        data = TrainingData(matrix, pd.DataFrame(index=range(40)), tmp_path)
        history = member.fit(data, RunOptions(0, tmp_path / "run", quiet=True))
        assert history.epochs[-1]["train_loss"] < 0.9 * history.epochs[0]["train_loss"]
        np.testing.assert_allclose(np.linalg.norm(member.vectors, axis=1), 1.0, rtol=1e-5)
        cosines = member.vectors @ member.vectors.T
        same = (group[:, None] == group) & ~np.eye(40, dtype=bool)
        assert cosines[same].mean() > 0.15 + cosines[group[:, None] != group].mean()
        nearest = np.where(np.eye(40, dtype=bool), -2.0, cosines).argmax(axis=1)
        assert (group[nearest] == group).mean() > 0.9
