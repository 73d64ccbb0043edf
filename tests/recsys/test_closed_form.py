"""Closed-form members (D3m): random walks, spectral filter, PureSVD, user-kNN, and the neighbour lists below them.

Each is worked by hand on a table of four users and three items, and compared with its formula in dense NumPy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import recsys.collaborative.neighbours as neighbours
from fusion.compat import tf
from fusion.errors import MachineError
from recsys.collaborative import svd
from recsys.collaborative.base import LowRankScorer, Member, TrainingData
from recsys.collaborative.neighbours import power_diagonal, strongest_of_product, strongest_of_rows
from recsys.core import MemberScores
from recsys.datasets.long_tail import long_tail
from recsys.evaluation import Question, Ranker
from recsys.metrics import parse_metric
from worlds import fitted

TAKEN = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]], np.float32)
"""Item 0 has users {0, 1, 2}, item 1 {0, 1}, item 2 {1, 3}; users took 2, 3, 1 and 1 items."""


def fit(kind: str, taken: np.ndarray | sparse.csr_matrix, folder: Path, **settings: Any) -> Any:
    matrix = sparse.csr_matrix(taken)
    data = TrainingData(matrix, pd.DataFrame(index=range(matrix.shape[1])), folder)
    return fitted({"kind": kind, **settings}, data, folder)


def score(member: Member, *histories: list[int]) -> np.ndarray:
    length = max(len(history) for history in histories)
    rows = np.array([[*history, *[-1] * (length - len(history))] for history in histories], np.int32)
    return member.scorer()(tf.constant(rows)).numpy()


def some_taken(users: int = 40, items: int = 15, seed: int = 0) -> np.ndarray:
    """Who took what, an item and a user without anything among them."""
    taken = (np.random.default_rng(seed).random((users, items)) < 0.3).astype(np.float32)
    taken[:, -1], taken[-1] = 0, 0
    return taken


def dense(index: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Neighbour lists as the matrix `[I, I]` that they were cut from."""
    result = np.zeros((len(index), len(index)))
    np.put_along_axis(result, index.astype(int), weight, axis=1)
    return result


def power(degrees: np.ndarray, exponent: float) -> np.ndarray:
    return np.array([float(d) ** exponent if d else 0.0 for d in degrees])


def without_diagonal(matrix: np.ndarray) -> np.ndarray:
    return matrix - np.diag(np.diag(matrix))


class TestStrongest:
    def test_by_hand(self) -> None:
        """The diagonal is left out, ties go to the smaller number, short rows are filled with the item itself."""
        matrix = sparse.csr_matrix(np.array([[9, 2, 2, 1], [0, 0, 3, 0], [5, 6, 0, 7], [0, 0, 0, 4]], np.float32))
        index, weight, lost = strongest_of_rows(matrix, 2)
        assert index.tolist() == [[1, 2], [1, 2], [1, 3], [3, 3]]
        assert weight.tolist() == [[2, 2], [0, 3], [6, 7], [0, 0]]
        assert lost == pytest.approx(6 / 26)  # 1 of the first row and 5 of the third
        assert strongest_of_rows(matrix, 1)[0].tolist() == [[1], [2], [3], [3]]

    @pytest.mark.parametrize("keep", [1, 3, 15, 99])
    @pytest.mark.parametrize("work", [1, 60, 10**6], ids=["row by row", "some rows", "one block"])
    def test_as_a_dense_sort_whatever_the_blocks(self, keep: int, work: int, monkeypatch: pytest.MonkeyPatch) -> None:
        taken = some_taken()
        monkeypatch.setattr(neighbours, "BLOCK_WORK", work)
        monkeypatch.setattr(neighbours, "MOST_THREADS", 3)
        index, weight, lost = strongest_of_product(
            sparse.csr_matrix(taken.T), sparse.csr_matrix(taken), keep, lambda rows, columns, sums: sums / (1 + columns)
        )
        whole = without_diagonal((taken.T @ taken) / (1 + np.arange(15))).astype(np.float32)
        expected = np.zeros_like(whole)
        for row, into in zip(whole, expected, strict=True):
            best = np.argsort(-row, kind="stable")[:keep]
            into[best] = row[best]
        np.testing.assert_allclose(dense(index, weight), expected, rtol=1e-6)
        assert index.dtype == np.int32 and weight.dtype == np.float32 and index.shape == (15, min(keep, 15))
        assert (np.diff(index, axis=1) >= 0).all()
        assert lost == pytest.approx(1 - expected.sum() / whole.sum(), abs=1e-6)

    def test_nothing_taken(self) -> None:
        empty = sparse.csr_matrix((4, 3), dtype=np.float32)
        index, weight, lost = strongest_of_product(empty.T.tocsr(), empty, 2)
        assert index.tolist() == [[0, 0], [1, 1], [2, 2]] and not weight.any() and lost == 0.0

    def test_refuses_what_does_not_fit(self) -> None:
        with pytest.raises(MachineError, match=r"must fit into 1\.5 GB; 200000 items with 1000 each need 1\.6 GB"):
            strongest_of_rows(sparse.csr_matrix((200_000, 200_000), dtype=np.float32), 1000)

    def test_the_order_of_histories_is_left_alone(self, tmp_path: Path) -> None:
        """Members share one matrix, whose rows stand in the order of time."""
        matrix = sparse.csr_matrix(
            (np.ones(5, np.float32), np.array([2, 0, 1, 2, 1], np.int32), np.array([0, 3, 5], np.int32)), shape=(2, 3)
        )
        for kind in ("item_knn", "user_knn", "rp3beta", "pure_svd", "spectral_filter", "sequential_rules"):
            fit(kind, matrix, tmp_path)
            assert matrix.indices.tolist() == [2, 0, 1, 2, 1], kind


class TestSequentialRules:
    def test_silent_where_histories_have_no_order(self, tmp_path: Path) -> None:
        """Without times a history stands in the order of item numbers: what follows what says nothing then."""
        ascending = sparse.csr_matrix(np.array([[1, 1, 0], [1, 1, 1]], np.float32))
        member = fit("sequential_rules", ascending, tmp_path, neighbours=2)
        assert not member.speaks.any() and not member.weight.any()
        turned = ascending.copy()
        turned.indices[-3:] = [2, 0, 1]  # one history in another order is order enough
        turned.has_sorted_indices = False
        assert fit("sequential_rules", turned, tmp_path, neighbours=2).speaks.all()


class TestRP3Beta:
    def test_walks_worked_by_hand(self, tmp_path: Path) -> None:
        """P3alpha with alpha 1: from item 0 over its users 0, 1, 2 (a third each) to item 1, which is one of 2 items
        of user 0 and one of 3 of user 1. With beta it is divided by how often item 1 was taken, to that power."""
        walk = {"history_exponent": 1.0, "user_exponent": 1.0, "neighbours": 3}
        plain = dense_of(fit("rp3beta", TAKEN, tmp_path, **walk, popularity_exponent=0.0))
        assert plain[0, 1] == pytest.approx(1 / 3 * 1 / 2 + 1 / 3 * 1 / 3, rel=1e-6)
        assert plain[2, 0] == pytest.approx(1 / 2 * 1 / 3, rel=1e-6)
        assert plain[2, 2] == 0.0, "no way back to where it began"
        beta = dense_of(fit("rp3beta", TAKEN, tmp_path, **walk, popularity_exponent=0.6))
        np.testing.assert_allclose(beta, plain / np.array([3, 2, 2]) ** 0.6, rtol=1e-6)

    def test_all_exponents_in_dense_numpy(self, tmp_path: Path) -> None:
        taken = some_taken().astype(np.float64)
        users, items = taken.sum(axis=1), taken.sum(axis=0)
        member = fit(
            "rp3beta",
            taken,
            tmp_path,
            history_exponent=0.3,
            user_exponent=0.8,
            popularity_exponent=0.55,
            neighbours=15,
        )
        weights = power(items, -0.3)[:, None] * (taken.T * power(users, -0.8)) @ taken * power(items, -0.55)
        np.testing.assert_allclose(dense_of(member), without_diagonal(weights), rtol=1e-5)
        expected = without_diagonal(weights)[[2, 5]].sum(axis=0)
        np.testing.assert_allclose(score(member, [2, 5])[0], expected, rtol=1e-5)
        assert member.speaks.tolist() == [True] * 14 + [False]

    def test_power_of_nothing_is_nothing(self) -> None:
        assert power_diagonal(np.array([0, 1, 4]), -0.5).diagonal().tolist() == [0.0, 1.0, 0.5]


def dense_of(member: Any) -> np.ndarray:
    return dense(member.index, member.weight)


class TestPureSVD:
    @pytest.mark.parametrize("users", [40, 9], ids=["more users", "more items"])
    def test_as_numpy_has_it(self, users: int, tmp_path: Path) -> None:
        """B9: the best approximation of rank 4, and scores h V V', by numpy.linalg.svd."""
        taken = some_taken(users).astype(np.float64)
        vectors = np.linalg.svd(taken)[2][:4].T
        member = fit("pure_svd", taken, tmp_path, rank=4)
        np.testing.assert_allclose(member.vectors @ member.vectors.T, vectors @ vectors.T, atol=1e-5)
        history = np.isin(np.arange(15), [1, 4, 6]).astype(float)
        np.testing.assert_allclose(score(member, [1, 4, 6])[0], history @ vectors @ vectors.T, atol=1e-5)

    def test_a_history_within_the_space_comes_back(self, tmp_path: Path) -> None:
        """Two kinds of users: with both directions kept, who took items 0 and 1 is described by them alone."""
        taken = np.array([[1, 1, 0, 0]] * 3 + [[0, 0, 1, 1]] * 2, np.float32)
        both = score(fit("pure_svd", taken, tmp_path, rank=2), [0, 1], [0])
        np.testing.assert_allclose(both, [[1, 1, 0, 0], [0.5, 0.5, 0, 0]], atol=1e-6)
        larger = score(fit("pure_svd", taken, tmp_path, rank=1), [2, 3])[0]
        np.testing.assert_allclose(larger, 0.0, atol=1e-6)

    def test_popular_items_count_less(self, tmp_path: Path) -> None:
        taken = some_taken().astype(np.float64)
        scaled = taken * power(taken.sum(axis=0), -0.4)
        vectors = np.linalg.svd(scaled)[2][:3].T
        member = fit("pure_svd", taken, tmp_path, rank=3, popularity_exponent=0.4)
        np.testing.assert_allclose(member.vectors @ member.vectors.T, vectors @ vectors.T, atol=1e-5)

    def test_a_rank_beyond_the_data(self, tmp_path: Path) -> None:
        """It is cut to the shorter side, and directions in which nothing lies are silent: only rank 1 is there."""
        taken = np.ones((3, 5), np.float32)
        member = fit("pure_svd", taken, tmp_path, rank=50)
        assert member.vectors.shape == (5, 3)
        np.testing.assert_allclose(member.vectors @ member.vectors.T, np.full((5, 5), 1 / 5), atol=1e-6)

    def test_a_large_matrix_by_the_randomised_method(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a spectrum that decays it finds the same space as the exact one, and the same twice."""
        random = np.random.default_rng(0)
        left, right = random.normal(size=(300, 60)), random.normal(size=(60, 200))
        matrix = sparse.csr_matrix((left * 0.8 ** np.arange(60)) @ right)
        exact = svd.right_singular_vectors(matrix, 8, 0)
        monkeypatch.setattr(svd, "DENSE_SIDE", 0)
        found = svd.right_singular_vectors(matrix, 8, 0)
        assert found.shape == (200, 8) and found.dtype == np.float32
        assert np.linalg.norm(exact.T @ found) ** 2 / 8 > 0.999
        np.testing.assert_array_equal(svd.right_singular_vectors(matrix, 8, 0), found)


class TestSpectralFilter:
    def test_the_filter_in_dense_numpy(self, tmp_path: Path) -> None:
        """R~'R~ + 0.7 Di^-1/2 V V' Di^1/2, with the singular vectors of numpy.linalg.svd."""
        taken = some_taken().astype(np.float64)
        users, items = taken.sum(axis=1), taken.sum(axis=0)
        normalised = power(users, -0.5)[:, None] * taken * power(items, -0.5)
        vectors = np.linalg.svd(normalised)[2][:3].T
        low_pass = power(items, -0.5)[:, None] * (vectors @ vectors.T) * power(items, 0.5)
        whole = without_diagonal(normalised.T @ normalised) + 0.7 * low_pass
        member = fit("spectral_filter", taken, tmp_path, rank=3, low_pass=0.7, neighbours=15)
        assert member.truncation == pytest.approx(0.0, abs=1e-6)
        found = score(member, [2, 5, 6], [4])
        np.testing.assert_allclose(found[0], whole[[2, 5, 6]].sum(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found[1], whole[4], rtol=1e-4, atol=1e-6)

    def test_the_lowest_frequency_by_hand(self, tmp_path: Path) -> None:
        """The first singular vector of R~ is the root of the items' degrees: with rank 1, the low-pass gives each item
        its share of all interactions, times the number of items in the history."""
        member = fit("spectral_filter", TAKEN, tmp_path, rank=1, low_pass=1.0)
        linear = score(fit("rp3beta", TAKEN, tmp_path, user_exponent=1.0, popularity_exponent=0.5), [0, 2])[0]
        np.testing.assert_allclose(score(member, [0, 2])[0] - linear, 2 * np.array([3, 2, 2]) / 7, rtol=1e-5)

    def test_truncation_concerns_the_linear_part_only(self, tmp_path: Path) -> None:
        taken = some_taken()
        whole = fit("spectral_filter", taken, tmp_path, neighbours=15)
        cut = fit("spectral_filter", taken, tmp_path, neighbours=3)
        assert 0.2 < cut.truncation < 0.9
        for name in ("history_table", "item_table"):
            np.testing.assert_array_equal(cut.state()[name], whole.state()[name])


class TestUserKnn:
    def test_worked_by_hand(self, tmp_path: Path) -> None:
        """Who took item 1 is like user 0 (1 of 2 items) by 1 / sqrt 2, like user 1 (1 of 3) by 1 / sqrt 3."""
        settings = {"weighting": "cosine", "shrinkage": 0.0, "amplification": 1.0}
        member = fit("user_knn", TAKEN, tmp_path, **settings, neighbours=4)
        first, second = 1 / np.sqrt(2), 1 / np.sqrt(3)
        np.testing.assert_allclose(score(member, [1])[0], [first + second, first + second, second], rtol=1e-6)
        nearest = fit("user_knn", TAKEN, tmp_path, **settings, neighbours=1)
        np.testing.assert_allclose(score(nearest, [1])[0], [first, first, 0], rtol=1e-6)
        shrunk = fit("user_knn", TAKEN, tmp_path, weighting="cosine", shrinkage=2.0, amplification=3.0, neighbours=1)
        np.testing.assert_allclose(score(shrunk, [1])[0, 0], (1 / (np.sqrt(2) + 2)) ** 3, rtol=1e-6)

    @pytest.mark.parametrize("weighting", ["cosine", "tfidf", "bm25"])
    def test_in_dense_numpy(self, weighting: str, tmp_path: Path) -> None:
        taken = some_taken().astype(np.float64)
        counts = taken.sum(axis=0)
        weights = np.ones(15) if weighting == "cosine" else np.log(1 + 40 / np.maximum(counts, 1))
        if weighting == "bm25":
            weights = weights * 2.2 / (1 + 1.2 * (0.25 + 0.75 * counts / counts.mean()))
        member = fit("user_knn", taken, tmp_path, weighting=weighting, shrinkage=1.5, neighbours=6)
        assert member.truncation == 0.0
        for history in ([3], [0, 5, 9], [1, 2, 4, 6, 7]):
            wanted = np.isin(np.arange(15), history) * weights
            users = taken * weights
            similarity = users @ wanted / (np.linalg.norm(users, axis=1) * np.linalg.norm(wanted) + 1.5)
            np.testing.assert_allclose(member.scorer().similarities(tf.constant([history]))[0], similarity, rtol=1e-4)
            nearest = np.argsort(-similarity, kind="stable")[:6]
            np.testing.assert_allclose(score(member, history)[0], similarity[nearest] ** 2 @ taken[nearest], rtol=1e-4)

    def test_one_self_adds_to_seen_items_only(self, tmp_path: Path) -> None:
        """A user of the training data is their own nearest neighbour; what is new to them comes from the others."""
        member = fit("user_knn", some_taken(), tmp_path, weighting="cosine", shrinkage=0.0, neighbours=1)
        for user in (0, 7, 23):
            own = np.flatnonzero(some_taken()[user])
            assert member.scorer().similarities(tf.constant([own.astype(np.int32)])).numpy()[0].argmax() == user
            assert np.flatnonzero(score(member, list(own))[0]).tolist() == own.tolist()

    def test_what_the_tables_cut_is_reported(self, tmp_path: Path) -> None:
        """Item 0 keeps the user with the shortest history, and each user the latest item: 3 + 4 of 14 entries stay."""
        settings = {"weighting": "cosine", "shrinkage": 0.0, "users_per_item": 1, "items_per_user": 1}
        member = fit("user_knn", TAKEN, tmp_path, **settings)
        assert member.users_of_items.tolist() == [[2], [0], [3]]
        assert member.items_of_users.tolist() == [[1], [2], [0], [2]]
        assert member.truncation == pytest.approx(1 - 7 / 14)
        np.testing.assert_allclose(score(member, [0])[0], [1, 0, 0], atol=1e-6)

    def test_refuses_what_does_not_fit(self, tmp_path: Path) -> None:
        everything = np.arange(200)
        matrix = sparse.csr_matrix((np.ones(200), (np.zeros(200, int), everything)), shape=(2_000_000, 200))
        with pytest.raises(MachineError, match=r"must fit into 1\.5 GB.*Lower users_per_item"):
            fit("user_knn", matrix, tmp_path)


def test_a_low_rank_product_by_hand() -> None:
    """Nothing is divided by the length, and the item before the last counts half."""
    history, items = np.array([[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]), np.array([[1.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    scorer = LowRankScorer(history, items, decay=0.5)
    found = scorer(tf.constant([[0, 1, -1], [-1, -1, -1]])).numpy()
    np.testing.assert_allclose(found, [[0.5 + 2.0, 1.0, 6.0], [0, 0, 0]])


def test_item_knn_of_a_large_catalogue(tmp_path: Path) -> None:
    """Cosines of a long tail against dense products, row by row, with the numbers of neighbours it really has."""
    matrix = long_tail(600, 900, 20_000)
    member = fit("item_knn", matrix, tmp_path, weighting="cosine", neighbours=40, shrinkage=3.0)
    taken = matrix.toarray()
    norms = np.sqrt(taken.sum(axis=0))
    cosine = without_diagonal((taken.T @ taken) / (np.outer(norms, norms) + 3.0))
    kept = -np.sort(-cosine, axis=1)[:, :40]
    np.testing.assert_allclose(-np.sort(-member.weight, axis=1), kept, rtol=1e-5)
    assert member.truncation == pytest.approx(1 - kept.sum() / cosine.sum(), abs=1e-5)
    np.testing.assert_allclose(dense_of(member)[member.weight.any(axis=1)].max(axis=1), cosine.max(axis=1), rtol=1e-5)


@pytest.mark.data
def test_real_taste_is_found(data_dir: Path, tmp_path: Path) -> None:
    """D3m: on the split u1 of MovieLens 100K, all unseen films ranked, each is far above popularity, and none is below
    what it reached when it was tuned."""
    ratings = pd.read_csv(data_dir / "ml100k" / "ratings.csv").sort_values(["user", "ts"], kind="stable")
    shape = ratings.user.max(), ratings.item.max()
    known, asked = (
        sparse.csr_matrix((np.ones(len(rows), np.float32), (rows.user - 1, rows.item - 1)), shape=shape)
        for rows in (ratings[ratings.test_fold != 1], ratings[ratings.test_fold == 1])
    )
    reached = {"item_knn": 0.48, "user_knn": 0.51, "rp3beta": 0.49, "pure_svd": 0.54, "spectral_filter": 0.525}
    members = {kind: fit(kind, known, tmp_path) for kind in ("popularity", *reached)}
    ranked = Ranker(MemberScores(members), {}, 10)(Question(known, known, asked, np.ones(shape[1], bool)))
    ndcg = parse_metric("ndcg@10", "candidates")
    found = {kind: float(np.nanmean(ndcg.of_lists(ranked.lists[kind]))) for kind in members}
    assert all(found[kind] > max(reached[kind], 1.4 * found["popularity"]) for kind in reached), found


@pytest.mark.parametrize("kind", ["item_knn", "user_knn", "rp3beta", "pure_svd", "spectral_filter"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 4)], ids=["one pair", "one item", "one user"])
def test_next_to_no_data(kind: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """Everything was taken by everybody, or nothing by anybody: finite scores, and nothing said of unknown items."""
    for taken in (np.ones(shape, np.float32), np.zeros(shape, np.float32)):
        member = fit(kind, taken, tmp_path)
        scores = score(member, [0], [])
        assert scores.shape == (2, shape[1]) and np.isfinite(scores).all() and (scores[1] == 0).all()
        assert (member.speaks == taken.any()).all()
        assert taken.any() or (scores == 0).all()
