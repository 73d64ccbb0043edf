"""Approximate retrieval: recall is measured and kept, scores are exact, files are verified."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fusion.compat import tf
from fusion.errors import ConfigError, DataError, GateError
from fusion.rules import RULES
from recsys.approximate import FACTS, INDEX, ApproximateIndex, TwoStage, exact_top, recall
from recsys.collaborative.base import TrainingData
from recsys.core import MemberScores, RankingCore
from recsys.datasets.long_tail import SIZES, long_tail
from recsys.evaluation import history_rows
from worlds import fitted


def vectors(items: int = 5000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Items in groups, with norms that differ by an order of magnitude, and users between two groups."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(60, 16))
    table = centres[random.integers(0, 60, items)] + 0.3 * random.normal(size=(items, 16))
    table *= random.lognormal(0, 0.8, (items, 1))
    users = centres[random.integers(0, 60, (150, 2))].sum(axis=1) + 0.2 * random.normal(size=(150, 16))
    return table.astype(np.float32), users.astype(np.float32)


@pytest.fixture(scope="module")
def index() -> ApproximateIndex:
    table, users = vectors()
    return ApproximateIndex.build(table, users[:100], ApproximateIndex.Config(recall=0.95, k=20))


class TestApproximateIndex:
    def test_recall_on_users_it_was_not_tuned_on(self, index: ApproximateIndex) -> None:
        table, users = vectors()
        found = index.search(users[100:], 20)[1]
        assert recall(found, exact_top(table, users[100:], 20)) > 0.93
        assert 1 <= index.probes <= index.lists // 4, "it must not look everywhere"

    def test_the_table_is_monotone_and_ends_at_the_goal(self, index: ApproximateIndex) -> None:
        recalls = [point.recall for point in index.table]
        assert recalls == sorted(recalls) and recalls[0] < 0.9 and recalls[-1] >= 0.95
        assert all(point.p50_ms > 0 for point in index.table)

    def test_scores_are_inner_products_in_order(self, index: ApproximateIndex) -> None:
        table, users = vectors()
        scores, items = index.search(users[:5], 10)
        np.testing.assert_allclose(scores, np.einsum("bd,bkd->bk", users[:5], table[items]), rtol=1e-4)
        assert (np.diff(scores, axis=1) <= 0).all()

    def test_all_lists_are_exact(self, index: ApproximateIndex) -> None:
        table, users = vectors()
        assert recall(index.search(users, 20, probes=10_000)[1], exact_top(table, users, 20)) == 1.0

    def test_the_same_seed_gives_the_same_answers(self, index: ApproximateIndex) -> None:
        table, users = vectors()
        again = ApproximateIndex.build(table, users[:100], index.config)
        np.testing.assert_array_equal(again.search(users, 20, probes=4)[1], index.search(users, 20, probes=4)[1])

    def test_written_and_read(self, index: ApproximateIndex, tmp_path: Path) -> None:
        index.save(tmp_path / "index")
        again = ApproximateIndex.load(tmp_path / "index")
        users = vectors()[1]
        np.testing.assert_array_equal(again.search(users, 20)[1], index.search(users, 20)[1])
        assert again.table == index.table and again.probes == index.probes

    def test_changed_bytes_are_refused_before_they_are_parsed(self, index: ApproximateIndex, tmp_path: Path) -> None:
        index.save(tmp_path / "index")
        file = tmp_path / "index" / INDEX
        file.write_bytes(file.read_bytes()[:-8] + b"tampered")
        with pytest.raises(GateError, match="must have the hash"):
            ApproximateIndex.load(tmp_path / "index")
        assert "sha256" in json.loads((tmp_path / "index" / FACTS).read_text())


@pytest.mark.parametrize("items", [1, 3])
def test_a_tiny_catalogue(items: int) -> None:
    """More is asked for than there is: -1 fills up."""
    table = np.eye(items, 4, dtype=np.float32)
    scores, numbers = ApproximateIndex.build(table, table).search(table[:1], 5)
    assert numbers[0, 0] == 0 and scores[0, 0] == 1.0
    assert (numbers[0, items:] == -1).all()


def test_bad_vectors_are_refused() -> None:
    good = np.ones((4, 3), np.float32)
    with pytest.raises(DataError, match="item vectors must be finite"):
        ApproximateIndex.build(np.full((4, 3), np.nan), good)
    with pytest.raises(DataError, match="the items' 3 dimensions; received 2"):
        ApproximateIndex.build(good, np.ones((2, 2)))
    with pytest.raises(ConfigError, match="k must be at least 1"):
        ApproximateIndex.build(good, good).search(good, 0)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> RankingCore:
    matrix = long_tail(*SIZES["small"])
    data = TrainingData(matrix, pd.DataFrame(index=range(matrix.shape[1])), tmp_path_factory.mktemp("cache"))
    settings = {"ials": {"kind": "ials", "factors": 16, "epochs": 5}, "knn": {"kind": "item_knn"}}
    members = {name: fitted(part, data, data.cache) for name, part in settings.items()}
    average = RULES["average"](RULES["average"].Config(), list(members), "candidates")
    return RankingCore(MemberScores(members), average)


class TestTwoStage:
    def test_members_at_some_items_are_members_at_all_of_them(self, core: RankingCore) -> None:
        history, items = tf.constant([[3, 5, -1], [7, -1, -1]]), tf.constant([[1, 8, -1], [0, 9, 4]])
        scores, mask = core.members(history)
        some, heard = core.members.at(history, items)
        numbers = np.maximum(items.numpy(), 0)[:, None].repeat(2, axis=1)
        np.testing.assert_allclose(some, np.take_along_axis(scores.numpy(), numbers, axis=2), rtol=1e-5, atol=1e-6)
        expected = np.take_along_axis(mask.numpy(), numbers, axis=2) & (items.numpy() >= 0)[:, None]
        np.testing.assert_array_equal(heard, expected)

    def test_it_finds_nearly_what_scoring_everything_finds(self, core: RankingCore) -> None:
        """The shortlist of one member holds most of what the ensemble would recommend, and never what is known."""
        matrix = long_tail(*SIZES["small"])
        history = history_rows(matrix, np.arange(60))
        scorer = core.members.scorers[0]
        index = ApproximateIndex.build(scorer.item_table.numpy(), scorer.user(tf.constant(history)).numpy())
        scores, items = TwoStage(core, "ials", index, shortlist=200).recommend(history, 10)
        whole = core(tf.constant(history)).numpy()
        whole[np.repeat(np.arange(60), np.diff(matrix.indptr)[:60]), matrix[:60].indices] = -np.inf
        assert recall(items, np.argsort(-whole, axis=1)[:, :10]) > 0.85
        assert (np.diff(scores, axis=1) <= 0).all()
        assert not any(np.isin(row, known).any() for row, known in zip(items, history, strict=True))

    def test_fewer_items_than_asked_for(self, core: RankingCore) -> None:
        scorer = core.members.scorers[0]
        index = ApproximateIndex.build(scorer.item_table.numpy(), scorer.item_table.numpy()[:50])
        scores, items = TwoStage(core, "ials", index).recommend(np.array([[0, 1]], np.int32), 899)
        assert items.shape == (1, 899) and items[0, -1] == -1 and scores[0, -1] == -np.inf

    def test_a_member_without_vectors_cannot_propose(self, core: RankingCore) -> None:
        with pytest.raises(ConfigError, match="'knn' cannot propose"):
            TwoStage(core, "knn", None)  # type: ignore[arg-type]
