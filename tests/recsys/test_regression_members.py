"""Members that regress items on items: the sparse solution of EASE, and SLIM (D3m)."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.linear_model import ElasticNet

from fusion.errors import MachineError
from recsys.collaborative import ease, local_regression
from recsys.collaborative.base import TrainingData
from recsys.collaborative.slim import coordinate_descent
from recsys.datasets.long_tail import SIZES, TEST_SHARE, long_tail
from recsys.evaluation import Question
from worlds import fitted, ndcg


def of_matrix(matrix: sparse.csr_matrix, folder: Path, settings: dict[str, Any]) -> Any:
    return fitted(settings, TrainingData(matrix, pd.DataFrame(index=range(matrix.shape[1])), folder), folder)


def random_matrix(users: int, items: int, seed: int = 0) -> sparse.csr_matrix:
    dense = np.random.default_rng(seed).random((users, items)) < 0.3
    dense[:, -1] = False  # an item that nobody took
    return sparse.csr_matrix(dense.astype(np.float32))


def towns(users: int = 120, items: int = 14) -> sparse.csr_matrix:
    """Users and items of four places that have nobody in common."""
    return sparse.block_diag([random_matrix(users, items, seed) for seed in range(4)], format="csr")


def weights_of(member: Any) -> np.ndarray:
    """Neighbour lists as the matrix `[I, I]` that they were cut from."""
    result = np.zeros((len(member.index), len(member.index)))
    rows = np.repeat(np.arange(len(member.index)), member.index.shape[1])
    np.add.at(result, (rows, member.index.ravel()), member.weight.ravel())
    return result


def closed_form(matrix: sparse.csr_matrix, l2: float) -> np.ndarray:
    """B of Steck 2019, eq. 8, in float64."""
    dense = matrix.toarray().astype(np.float64)
    inverse = np.linalg.inv(dense.T @ dense + l2 * np.eye(dense.shape[1]))
    result = -inverse / np.diag(inverse)
    np.fill_diagonal(result, 0.0)
    return result


def nearest_by_cosine(matrix: sparse.csr_matrix, item: int, count: int) -> np.ndarray:
    dense = matrix.toarray().astype(np.float64)
    norms = np.maximum(np.linalg.norm(dense, axis=0), 1e-9)
    cosine = dense.T @ dense[:, item] / norms / norms[item]
    cosine[item] = 0.0
    order = np.argsort(-cosine, kind="stable")[:count]
    return order[cosine[order] > 0]


class TestSparseEase:
    SPARSE = {"kind": "ease", "solver": "sparse", "l2": 3.0, "neighbours": 100}  # noqa: RUF012

    @pytest.mark.parametrize(("users", "items"), [(60, 25), (20, 50)])
    @pytest.mark.parametrize("shared", [1, 4, 100])
    def test_with_all_items_as_candidates_it_is_the_dense_solution(
        self, users: int, items: int, shared: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """D3m: however the catalogue falls into groups."""
        monkeypatch.setattr(ease, "SHARED", shared)
        matrix = random_matrix(users, items)
        member = of_matrix(matrix, tmp_path, {**self.SPARSE, "candidates": items})
        np.testing.assert_allclose(weights_of(member), closed_form(matrix, 3.0), atol=1e-5)
        assert member.truncation == 0.0
        assert member.speaks.tolist() == [True] * (items - 1) + [False]

    def test_candidates_that_hold_all_relations_suffice(self, tmp_path: Path) -> None:
        """Places that have nobody in common are regressions of their own: a quarter of the items is enough."""
        matrix = towns()
        member = of_matrix(matrix, tmp_path, {**self.SPARSE, "candidates": 14})
        np.testing.assert_allclose(weights_of(member), closed_form(matrix, 3.0), atol=1e-5)

    def test_each_item_alone_is_regressed_on_its_nearest(self, tmp_path: Path) -> None:
        """Groups of one: b = (G_SS + l2 I)^-1 G_Si over the most correlated items, solved here one after another."""
        random = np.random.default_rng(7)  # of a world in which no two correlations are equal where lists end
        matrix = sparse.csr_matrix((random.random((400, 20)) < random.random((400, 1))).astype(np.float32))
        correlation = np.corrcoef(matrix.toarray().T) - 2 * np.eye(20)  # an item is not near to itself
        found = weights_of(of_matrix(matrix, tmp_path, {**self.SPARSE, "candidates": 7}))
        gram = (matrix.T @ matrix).toarray().astype(np.float64)
        for item in range(20):
            scope = np.argsort(-correlation[item])[:6]  # the seventh candidate is the item itself
            assert correlation[item, scope].min() > 0
            expected = np.zeros(20)
            expected[scope] = np.linalg.solve(gram[np.ix_(scope, scope)] + 3.0 * np.eye(6), gram[scope, item])
            np.testing.assert_allclose(found[:, item], expected, atol=1e-5)

    def test_few_candidates_answer_nearly_as_well(self, tmp_path: Path) -> None:
        """A world in which an item has much to do with few others: a sixth of the items loses at most 2 %."""
        known, relevant = held_out(long_tail(600, 900, 20_000))
        asked = Question(known, known, relevant, np.ones(900, bool))
        settings = {"kind": "ease", "l2": 20.0, "neighbours": 300}
        dense = ndcg(of_matrix(known, tmp_path, {**settings, "solver": "dense"}), asked)
        near = ndcg(of_matrix(known, tmp_path, {**settings, "solver": "sparse", "candidates": 150}), asked)
        assert near > 0.98 * dense > 0.05

    def test_lists_are_cut_by_magnitude(self, tmp_path: Path) -> None:
        matrix = random_matrix(40, 12)
        whole = weights_of(of_matrix(matrix, tmp_path, {**self.SPARSE, "candidates": 12}))
        member = of_matrix(matrix, tmp_path, {**self.SPARSE, "candidates": 12, "neighbours": 4})
        cut = weights_of(member)
        for row, kept in zip(whole, cut, strict=True):
            np.testing.assert_allclose(np.sort(np.abs(kept))[-4:], np.sort(np.abs(row))[-4:], rtol=1e-5)
        assert member.truncation == pytest.approx(1 - np.abs(cut).sum() / np.abs(whole).sum(), abs=1e-6)
        assert member.truncation > 0.05

    def test_auto_is_dense_as_long_as_that_fits(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Told apart by candidates too few to be exact."""
        matrix = random_matrix(50, 20)
        settings = {**self.SPARSE, "solver": "auto", "candidates": 3, "neighbours": 3}
        exact = of_matrix(matrix, tmp_path, {**settings, "solver": "dense"})
        near = of_matrix(matrix, tmp_path, {**settings, "solver": "sparse"})
        assert np.abs(weights_of(exact) - weights_of(near)).max() > 0.01
        fits = of_matrix(matrix, tmp_path, settings)
        np.testing.assert_array_equal(fits.weight, exact.weight)
        monkeypatch.setattr(ease, "LIMIT_BYTES", 20 * 20 * 4 - 1)
        beyond = of_matrix(matrix, tmp_path, settings)
        np.testing.assert_array_equal(beyond.weight, near.weight)
        np.testing.assert_array_equal(beyond.index, near.index)


class TestSlim:
    def test_worked_by_hand(self, tmp_path: Path) -> None:
        """Item 0 has users {0, 1, 2}, item 1 {0, 1}, item 2 {3}: w = (2 - l1) / (count + l2) between 0 and 1."""
        matrix = sparse.csr_matrix(np.array([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 0, 1]], np.float32))
        member = of_matrix(matrix, tmp_path, {"kind": "slim", "l1": 0.5, "l2": 2.0})
        expected = np.array([[0, 1.5 / 5, 0], [1.5 / 4, 0, 0], [0, 0, 0]])
        np.testing.assert_allclose(weights_of(member), expected, atol=1e-6)
        strict = of_matrix(matrix, tmp_path, {"kind": "slim", "l1": 2.0, "l2": 2.0})
        assert not weights_of(strict).any()

    @pytest.mark.parametrize("candidates", [60, 8], ids=["SLIM", "fsSLIM"])
    @pytest.mark.parametrize(("l1", "l2"), [(0.5, 2.0), (2.0, 0.1)])
    def test_the_elastic_nets_of_scikit_learn(self, candidates: int, l1: float, l2: float, tmp_path: Path) -> None:
        """D3m: alpha = (l1 + l2) / n and l1_ratio = l1 / (l1 + l2), an item at a time, its nearest chosen here."""
        matrix = random_matrix(80, 30)
        settings = {"kind": "slim", "l1": l1, "l2": l2, "candidates": candidates, "rounds": 1000}
        found = weights_of(of_matrix(matrix, tmp_path, settings))
        dense = matrix.toarray().astype(np.float64)
        net = ElasticNet(
            alpha=(l1 + l2) / 80,
            l1_ratio=l1 / (l1 + l2),
            fit_intercept=False,
            positive=True,
            tol=1e-10,
            max_iter=100_000,
        )
        for item in range(29):
            scope = nearest_by_cosine(matrix, item, candidates)
            expected = np.zeros(30)
            expected[scope] = net.fit(dense[:, scope], dense[:, item]).coef_
            np.testing.assert_allclose(found[:, item], expected, atol=1e-4)
        assert (found >= 0).all() and not np.diag(found).any()
        assert 0.05 < (found > 0).mean() < 0.6, "some of the weights are 0, and not all"

    def test_systems_do_not_touch_each_other(self) -> None:
        """Solved side by side as alone, although some are done sooner; rounds that are too few stop early."""
        random = np.random.default_rng(0)
        roots = random.random((9, 40, 12)).astype(np.float32) * np.linspace(0.1, 3, 9, dtype=np.float32)[:, None, None]
        systems, targets = roots.transpose(0, 2, 1) @ roots, random.random((9, 12)).astype(np.float32) * 20
        solve = lambda rows, rounds: coordinate_descent(systems[rows], targets[rows], 1.0, 0.5, rounds)  # noqa: E731
        together = solve(slice(None), 3000)
        alone = np.concatenate([solve([row], 3000) for row in range(9)])
        np.testing.assert_allclose(together, alone, atol=1e-5)
        slopes = targets - np.einsum("bij,bj->bi", systems, together) - 0.5 * together - 1.0
        assert np.abs(slopes[together > 0]).max() < 0.01 and slopes[together == 0].max() < 0.01, "Karush-Kuhn-Tucker"
        assert np.abs(solve(slice(None), 1) - together).max() > 0.01


class TestGroups:
    def test_every_item_stands_in_one_group(self) -> None:
        gram = local_regression.gram_matrix(long_tail(300, 200, 4000))
        neighbours = local_regression.nearest_by_cosine(gram, 30)
        groups = local_regression.groups_of(neighbours, gram.diagonal(), 16)
        assert sorted(np.concatenate(groups).tolist()) == list(range(200))
        assert max(map(len, groups)) == 16 and len(groups) < 100
        assert groups[0][0] == np.argmax(gram.diagonal())
        for group in groups:
            scope = local_regression.scope_of(group, neighbours, 40)
            assert len(scope) == 40 and (np.diff(scope) > 0).all() and np.isin(group, scope).all()

    def test_results_come_in_the_order_of_the_groups(self) -> None:
        groups = [np.array([n]) for n in range(50)]
        assert list(local_regression.solved(groups, lambda group: int(group[0]))) == list(range(50))


REFUSED: dict[str, tuple[dict[str, Any], tuple[int, int], str]] = {
    "candidates": ({"kind": "ease", "solver": "sparse", "neighbours": 10}, (10, 900_000), "Lower candidates, or"),
    "neighbours": ({"kind": "ease", "solver": "sparse", "neighbours": 5000}, (10, 60_000), "Lower neighbours"),
    "dense": ({"kind": "ease", "solver": "dense", "neighbours": 10}, (30_000, 30_000), "Take solver: sparse"),
    "slim, candidates": ({"kind": "slim", "candidates": 2000, "neighbours": 10}, (10, 200_000), "Lower candidates, or"),
    "slim, neighbours": ({"kind": "slim", "neighbours": 5000}, (10, 60_000), "Lower neighbours"),
}


@pytest.mark.parametrize(("settings", "shape", "remedy"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(
    settings: dict[str, Any], shape: tuple[int, int], remedy: str, tmp_path: Path
) -> None:
    """Before anything is asked of the machine, with the setting that helps."""
    with pytest.raises(MachineError, match=rf"must fit into .* need \d+\.\d GB\. {remedy}"):
        of_matrix(sparse.csr_matrix(shape, dtype=np.float32), tmp_path, settings)


@pytest.mark.parametrize("kind", ["ease", "slim"])
def test_users_with_too_long_histories_are_refused(kind: str, tmp_path: Path) -> None:
    """What counts is how many pairs of items they took together, not how many items there are."""
    matrix = sparse.csr_matrix(np.ones((1, 30_000), np.float32))
    settings = {"kind": kind, "neighbours": 10, **({"solver": "sparse"} if kind == "ease" else {})}
    with pytest.raises(MachineError, match=r"need 7\.2 GB\. Raise cleaning\.k_core_items, or take item_knn"):
        of_matrix(matrix, tmp_path, settings)


@pytest.mark.parametrize(
    "settings", [{"kind": "ease", "solver": "sparse", "candidates": 100}, {"kind": "slim", "candidates": 30}]
)
def test_twice_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    """Although several processors take part."""
    matrix = long_tail(300, 400, 6000)
    first, second = (of_matrix(matrix, tmp_path, settings).state() for _ in range(2))
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])


def held_out(matrix: sparse.csr_matrix) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Training part and test part, by chance."""
    cells = matrix.tocoo()
    test = np.random.default_rng(1).random(cells.nnz) < TEST_SHARE
    parts = (
        sparse.csr_matrix((cells.data[of], (cells.row[of], cells.col[of])), shape=matrix.shape) for of in (~test, test)
    )
    return next(parts), next(parts)


def peak_memory(anew: bool = False) -> int:
    """The most memory that this process has had, in kilobytes; `anew` from this moment on, without what is free."""
    process = Path("/proc/self")
    if anew:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        (process / "clear_refs").write_text("5")
    line = next(line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"kind": "ease"}, {"kind": "slim"}], ids=["EASE", "SLIM"])
def test_a_catalogue_of_forty_thousand(settings: dict[str, Any], tmp_path: Path) -> None:
    """Within 2 GB, and it finds what was held out of users' histories: far more than the most popular items do."""
    known, relevant = held_out(long_tail(*SIZES["gowalla"]))
    before = peak_memory(anew=True)
    member = of_matrix(known, tmp_path, settings)
    assert peak_memory() - before < 2e6, "kilobytes, beside what the process had"
    assert member.index.shape == (40_981, 500) and member.truncation < 0.2
    asked = Question(known, known, only(relevant, range(0, 29_858, 100)), np.ones(40_981, bool))
    popular = of_matrix(known, tmp_path, {"kind": "popularity"})
    assert ndcg(member, asked) > 3 * ndcg(popular, asked)


def only(matrix: sparse.csr_matrix, users: range) -> sparse.csr_matrix:
    """The matrix with the rows of all other users empty."""
    chosen = np.zeros(matrix.shape[0], np.float32)
    chosen[users] = 1.0
    kept = (sparse.diags(chosen) @ matrix).tocsr()
    kept.eliminate_zeros()
    return kept
