"""Out-of-fold scores (H5): folds that look like the split, and what stands in the lists that rules learn from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from fusion.compat import tf
from fusion.errors import DataError
from fusion.rules.average import Average
from fusion.rules.normalisation import LARGEST
from recsys.core import MemberScores
from recsys.evaluation import Question
from recsys.fit_rows import FitRows
from recsys.out_of_fold import Fold, make_folds, rows_of, sampled_scores
from recsys.schema import HISTORY, TEST, TRAIN
from recsys.settings import OutOfFoldSettings
from recsys.splits import SplitSettings, split
from worlds import World

STRATEGIES = (
    "temporal_global", "temporal_per_user", "leave_last_out", "user_holdout", "item_holdout", "random", "given",
)  # fmt: skip


def world_of(strategy: str) -> tuple[World, SplitSettings]:
    made = World.planted(users=40, items=30, interactions_per_user=12)
    rng = np.random.default_rng(0)
    given = rng.choice(3, len(made.data.users), p=[0.8, 0.1, 0.1]).astype(np.int8)
    data = replace(made.data, given_split=given, positive=rng.random(len(given)) < 0.9)
    settings = SplitSettings(strategy=strategy)
    return World(data, split(data, settings)), settings


def triples(data: Any, rows: np.ndarray) -> set[tuple[int, int, int]]:
    return set(zip(data.users[rows].tolist(), data.items[rows].tolist(), data.timestamps[rows].tolist(), strict=True))


def pairs(matrix: sparse.csr_matrix) -> set[tuple[int, int]]:
    rows, columns = matrix.nonzero()
    return set(zip(rows.tolist(), columns.tolist(), strict=True))


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestFolds:
    def test_no_row_of_a_fold_is_trained_on(self, strategy: str) -> None:
        """H5: neither in its own fold, nor does any fold hold a row of validation or test."""
        where, settings = world_of(strategy)
        allowed = triples(where.data, where.parts == TRAIN)
        folds = make_folds(where.data, where.parts, settings, 2, seed=1)
        assert len(folds) == 2
        for fold in folds:
            trained = triples(fold.data, fold.training_rows)
            held = triples(fold.data, fold.parts == TEST)
            assert trained and held and not trained & held and trained | held <= allowed
            assert set(np.unique(fold.parts)) <= {TRAIN, TEST, HISTORY}, "all that is held out is asked"
            assert fold.data.positive[fold.training_rows].all()
            asked = fold.question(held_out=False)
            assert len(asked.users)
            assert not pairs(asked.relevant) & pairs(fold.data.matrix(fold.training_rows))
            assert not pairs(asked.relevant) & pairs(asked.seen)

    def test_what_has_not_appeared_is_no_candidate(self, strategy: str) -> None:
        """A rule that met items of the future as sure negatives would learn to bury every new item."""
        where, settings = world_of(strategy)
        for fold in make_folds(where.data, where.parts, settings, 2, seed=1):
            asked = fold.question(held_out=False)
            assert set(np.flatnonzero(asked.candidates)) == set(fold.data.items.tolist())
            assert {item for _, item in pairs(asked.relevant)} <= set(np.flatnonzero(asked.candidates))

    def test_folds_are_a_function_of_the_seed(self, strategy: str) -> None:
        where, settings = world_of(strategy)
        first, again, other = (make_folds(where.data, where.parts, settings, 1, seed)[0] for seed in (1, 1, 2))
        np.testing.assert_array_equal(first.parts, again.parts)
        if strategy in ("random", "given", "user_holdout", "item_holdout"):
            assert (first.parts != other.parts).any()


class TestFoldsLookLikeTheSplit:
    def folds(self, strategy: str, count: int = 2) -> list[Fold]:
        where, settings = world_of(strategy)
        return make_folds(where.data, where.parts, settings, count, seed=1)

    def test_temporal_folds_lie_later_and_one_before_the_other(self) -> None:
        last, before = self.folds("temporal_global")
        for fold in (last, before):
            held = fold.data.timestamps[fold.parts == TEST]
            assert held.min() >= fold.data.timestamps[fold.parts == TRAIN].max()
        assert before.data.timestamps.max() <= last.data.timestamps[last.parts == TEST].min()

    @pytest.mark.parametrize("strategy", ["temporal_per_user", "leave_last_out"])
    def test_of_each_user_the_last(self, strategy: str) -> None:
        for fold in self.folds(strategy):
            for user in range(40):
                own = fold.data.users == user
                trained = fold.data.timestamps[own & (fold.parts == TRAIN)]
                held = fold.data.timestamps[own & (fold.parts == TEST)]
                assert len(held) and held.min() >= trained.max()
        last, before = self.folds(strategy)
        assert not triples(last.data, last.parts == TEST) & triples(before.data, before.parts == TEST)

    def test_items_of_a_fold_are_cold(self) -> None:
        for fold in self.folds("item_holdout"):
            held = set(fold.data.items[fold.parts == TEST].tolist())
            assert held and not held & set(fold.data.items[fold.training_rows].tolist())
            candidates = np.flatnonzero(fold.question(held_out=True).candidates)
            assert set(candidates.tolist()) == held

    def test_users_of_a_fold_are_known_by_a_history_alone(self) -> None:
        for fold in self.folds("user_holdout"):
            asked = fold.question(held_out=False)
            assert not set(asked.users.tolist()) & set(fold.data.users[fold.training_rows].tolist())
            assert (np.diff(asked.history.indptr)[asked.users] > 0).all()

    def test_random_folds_are_not_the_last(self) -> None:
        for fold in self.folds("random"):
            held, trained = (fold.data.timestamps[fold.parts == part] for part in (TEST, TRAIN))
            assert held.min() < np.median(trained)

    def test_as_many_as_the_rows_allow_and_never_none(self) -> None:
        assert 3 <= len(self.folds("leave_last_out", 20)) < 20
        where, settings = world_of("leave_last_out")
        few = rows_of(where.data, where.data.users < 1)
        with pytest.raises(DataError, match="leaves"):
            make_folds(rows_of(few, np.arange(len(few.users)) < 2), np.zeros(2, np.int8), settings, 2, 0)


# ---- sampled candidates --------------------------------------------------------------------------------------

USERS, ITEMS = 20, 60


class ItemNumber(tf.Module):
    """A member whose score of an item is its number; silent about the first three."""

    personal = False
    speaks = np.arange(ITEMS) > 2

    def scorer(self) -> tf.Module:
        return self

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return tf.tile(tf.range(ITEMS, dtype=tf.float32)[None], [tf.shape(history)[0], 1])


class WhoAsks(ItemNumber):
    """A member whose score is the first item of the history, which here is the number of the user."""

    speaks = np.ones(ITEMS, bool)

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return tf.tile(tf.cast(history[:, :1], tf.float32), [1, ITEMS])


class Backwards(ItemNumber):
    """A member that ranks items the other way round."""

    def __call__(self, history: tf.Tensor) -> tf.Tensor:
        return -super().__call__(history)


class AsItIs:
    """In place of a rule: features are the scores."""

    guards = False

    def normalise(self, scores: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
        return scores


def asked_of_all() -> Question:
    """User u has taken item u and a few more, and likes some others; the last ten items are no candidates."""
    random = np.random.default_rng(0)
    history = np.eye(USERS, ITEMS, dtype=bool)
    seen = history | (random.random((USERS, ITEMS)) < 0.1)
    candidates = np.arange(ITEMS) < ITEMS - 10
    relevant = (random.random((USERS, ITEMS)) < 0.15) & ~seen & candidates
    matrix = lambda dense: sparse.csr_matrix(dense.astype(np.float32))  # noqa: E731
    return Question(matrix(history), matrix(seen), matrix(relevant), candidates)


def sampled(settings: OutOfFoldSettings, seed: int = 0) -> FitRows:
    members = MemberScores({"item": ItemNumber(), "who": WhoAsks()})
    return FitRows.join(sampled_scores(members, {"r": AsItIs()}, asked_of_all(), settings, seed)["r"])


def test_a_guard_is_given_distances_over_the_whole_catalogue() -> None:
    """A10: of every user, whatever candidates are sampled; one that scores all items alike cannot be compared."""
    members = MemberScores({"item": ItemNumber(), "back": Backwards(), "who": WhoAsks()})
    rules = {guard: Average(Average.Config(guard=guard), members.names, "candidates") for guard in (True, None)}
    settings = OutOfFoldSettings(negatives=1, shortlist=2)
    named = {str(guard): rule for guard, rule in rules.items()}
    found = {
        name: FitRows.join(rows) for name, rows in sampled_scores(members, named, asked_of_all(), settings, 0).items()
    }
    assert found["None"].distances is None, "an average that is not fitted has no guard"
    far = np.float32(LARGEST)
    for row in found["True"].at(np.arange(3)).distances:
        np.testing.assert_allclose(row, [[far, 2, far], [2, far, far], [far, far, far]], rtol=1e-5)
    assert found["True"].distances.shape == (len(found["True"].labels), 3, 3)


@pytest.mark.parametrize("negatives", [5, 1000], ids=["a sample", "everything"])
def test_what_a_rule_learns_from(negatives: int) -> None:
    """Unseen candidates alone, each once; those drawn stand for all that they were drawn from."""
    asked, found = asked_of_all(), sampled(OutOfFoldSettings(negatives=negatives, shortlist=8))
    users = found.features[:, 1, 0].astype(int)
    assert sorted(users.tolist()) == asked.users.tolist()
    for row, user in enumerate(users):
        there = found.weights[row] > 0
        items = found.features[row, 0, there].astype(int)
        assert len(set(items.tolist())) == len(items)
        unseen = asked.candidates & (asked.seen[user].toarray()[0] == 0)
        assert unseen[items].all()
        liked = set(asked.relevant[user].indices.tolist())
        labels = found.labels[row, there]
        assert {int(item) for item in items[labels]} == set(items.tolist()) & liked
        assert (found.weights[row, there][labels] == 1).all()
        assert found.weights[row, there][~labels].sum() == pytest.approx(unseen.sum() - len(liked), rel=1e-6)
        top = np.flatnonzero(unseen)[-8:]  # the best of the member that likes high numbers
        assert set(top.tolist()) <= set(items.tolist())
        # Who is silent about an item is so here, and nobody is heard where a row is only filled up.
        np.testing.assert_array_equal(found.mask[row][:, there], [items > 2, np.ones(len(items), bool)])
        assert not found.mask[row][:, ~there].any() and not found.labels[row, ~there].any()


def test_samples_are_a_function_of_the_seed() -> None:
    settings = OutOfFoldSettings(negatives=5, shortlist=8)
    first, again, other = sampled(settings), sampled(settings), sampled(settings, seed=1)
    for name in ("features", "mask", "labels", "weights"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.features, other.features)


def test_what_rules_may_read_stands_beside_each_candidate() -> None:
    """Context `[N, K]`: how many items a user has, the same for all candidates, and how popular each candidate is."""
    members = MemberScores({"item": ItemNumber(), "who": WhoAsks()}, np.arange(ITEMS))
    parts = sampled_scores(members, {"r": AsItIs()}, asked_of_all(), OutOfFoldSettings(negatives=5, shortlist=8), 0)
    found = FitRows.join(parts["r"])
    there = found.weights > 0
    assert (found.context["history_length"][there] == np.float32(np.log(2))).all()
    np.testing.assert_allclose(found.context["popularity"][there], np.log1p(found.features[:, 0][there]), rtol=1e-6)


def test_at_most_so_many_users() -> None:
    found = sampled(OutOfFoldSettings(max_users=6))
    users = found.features[:, 1, 0].astype(int)
    assert len(set(users.tolist())) == 6 and set(users.tolist()) <= set(asked_of_all().users.tolist())


def test_lists_of_different_length_are_filled_up_without_weight() -> None:
    def part(width: int) -> FitRows:
        shape = (2, width)
        known = np.ones((2, 3, width), bool)
        return FitRows(np.ones((2, 3, width)), known, np.ones(shape, bool), np.ones(shape), {"x": np.ones(shape)})

    joined = FitRows.join([part(4), part(2)])
    assert joined.features.shape == (4, 3, 4) and joined.labels.shape == (4, 4)
    assert joined.context["x"].shape == (4, 4)
    assert joined.weights.tolist() == [[1, 1, 1, 1]] * 2 + [[1, 1, 0, 0]] * 2
    assert not joined.mask[2:, :, 2:].any() and not joined.labels[2:, 2:].any()
