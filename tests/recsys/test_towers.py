"""Features of items (B7), two towers with several interests (D3m, D15m), and the cross network over their shortlist."""

from __future__ import annotations

import functools
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fusion.compat import tf, tfrs
from fusion.errors import ConfigError, DataError
from fusion.types import RunOptions
from leaks import State, assert_fitted_on_train_only
from recsys.collaborative import MEMBERS
from recsys.collaborative.base import TrainingData
from recsys.collaborative.dcn import CandidatePairs, cross, nearest, only, pointwise_loss, shortlist, softmax_loss
from recsys.collaborative.features import FeatureSettings, item_aggregates, item_features, multi_hot
from recsys.collaborative.two_tower import attention, history_statistics, pool_interests
from recsys.evaluation import Question
from recsys.schema import Interactions
from worlds import World, fitted, member_part, ndcg, random_ndcg, training_data

TEXT = {"encoder": {"kind": "text_tfidf", "dimensions": 16}, "columns": ["text"], "dimensions": 16}
TRAINING = {"epochs": 4, "batch_size": 128, "learning_rate": 0.02}
TOWERS: dict[str, Any] = {
    "kind": "two_tower",
    "features": {"content": {"text": TEXT}, "categories": ["text"], "separator": " "},
    "dimensions": 16,
    "hidden": [16],
    "training": TRAINING,
}
DCN: dict[str, Any] = {
    "kind": "dcn",
    "towers": {name: value for name, value in TOWERS.items() if name != "kind"},
    "shortlist": 30,
    "held_out": 0.2,
    "rank": None,
    "hidden": [16],
    "training": {"epochs": 2, "batch_size": 128, "learning_rate": 0.003},
}


@functools.cache
def world(**settings: Any) -> World:
    return World.planted(**settings)


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("towers")
    return fitted(TOWERS, world().training(folder), folder)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("dcn")
    return fitted(DCN, world().training(folder), folder)


# ---- features ------------------------------------------------------------------------------------------------


def features_of(settings: dict[str, Any], data: TrainingData, folder: Path) -> Any:
    return item_features(FeatureSettings.model_validate(settings), data, RunOptions(0, folder, quiet=True), 0)


def test_aggregates_worked_by_hand() -> None:
    """B7: user 0 took items 0, 1, 2, 3 in this order, user 1 item 1 and then 0; item 4 is cold."""
    matrix = sparse.csr_matrix(
        (np.ones(6, np.float32), np.array([0, 1, 2, 3, 1, 0]), np.array([0, 4, 6])), shape=(2, 5)
    )
    found = item_aggregates(matrix)
    np.testing.assert_allclose(found["share"], [1.0, 1.0, 0.5, 0.5, 0.0])
    np.testing.assert_allclose(found["log_popularity"], np.log([3, 3, 2, 2, 1]))
    np.testing.assert_allclose(found["position"], [(0.125 + 0.75) / 2, (0.375 + 0.25) / 2, 0.625, 0.875, 0.0])
    np.testing.assert_allclose(found["recent_share"], [0.5, 0.0, 0.0, 1.0, 0.0])
    np.testing.assert_allclose(found["log_history"], [*[np.log(5 * 3) / 2] * 2, np.log(5), np.log(5), 0.0])
    uneven = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25))  # item 0 was with item 1 twice, with 2 and 3 once each
    np.testing.assert_allclose(found["company"], [uneven, uneven, np.log(3), np.log(3), 0.0], atol=1e-12)


def test_features_know_nothing_of_held_out_rows(tmp_path: Path) -> None:
    """B7, B17: aggregates, vocabularies, axes and deviations stay as they are when hidden rows and content change."""
    where = world(strategy="item_holdout")
    trained = where.warm
    number = iter(range(3))

    def fit(data: Interactions, parts: np.ndarray) -> State:
        folder = tmp_path / str(next(number))
        found = features_of(TOWERS["features"], training_data(data, parts, folder), folder)
        return {"table": found.table[trained], "widths": np.array(found.widths)}

    assert_fitted_on_train_only(fit, where.data, where.parts)


def test_categories_are_counted_on_training_items_and_the_rest_is_hashed() -> None:
    categories = [["drama", "war"], ["drama"], ["war", "noir"], ["drama", "unseen"], []]
    trained = np.array([True, True, True, False, True])
    found = multi_hot(categories, trained, frequent=2, buckets=4)  # drama 2, war 2, noir 1
    assert found.shape == (5, 6)
    assert found[1].tolist() == [1, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(found[0], np.array([1, 1, 0, 0, 0, 0]) / np.sqrt(2), rtol=1e-6)
    assert found[2, 2 + zlib.crc32(b"noir") % 4] == pytest.approx(np.sqrt(0.5))
    assert found[3, 2 + zlib.crc32(b"unseen") % 4] == pytest.approx(np.sqrt(0.5))
    assert not found[4].any()


def test_numbers_are_standardised_on_training_items(tmp_path: Path) -> None:
    matrix = sparse.csr_matrix(np.array([[1, 1, 0, 0, 0], [1, 0, 1, 0, 0]], np.float32))
    catalogue = pd.DataFrame({"year": ["1990", "2000", "2010", "2008", "not known"], "other": [""] * 5})
    data = TrainingData(matrix, catalogue, tmp_path)
    found = features_of({"numeric": ["year"], "aggregates": False}, data, tmp_path)
    deviation = np.std([1990, 2000, 2010])
    np.testing.assert_allclose(found.table[:, 0], [-10 / deviation, 0, 10 / deviation, 8 / deviation, 0], rtol=1e-6)
    assert found.described.tolist() == [True, True, True, True, False]
    with pytest.raises(DataError, match="did you mean 'year'"):
        features_of({"numeric": ["yaer"]}, data, tmp_path)


def test_what_a_tower_cannot_read_is_refused() -> None:
    def check(content: dict[str, Any]) -> None:
        part = member_part({"kind": "two_tower", "features": {"content": {"c": content}}})
        MEMBERS["two_tower"].check(part.config)

    with pytest.raises(ConfigError, match="'c' must name its columns"):
        check({"encoder": {"kind": "text_tfidf"}})
    with pytest.raises(ConfigError, match="image_cnn would be trained here"):
        check({"encoder": {"kind": "image_cnn"}})


# ---- two towers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["towers", "deep"])
def test_content_finds_cold_items(name: str, request: pytest.FixtureRequest) -> None:
    """D15m, D3m: items that nobody took in training are ranked by their text, far above chance."""
    member = request.getfixturevalue(name)
    cold = world().counts == 0
    asked = world().asked(among=cold)
    assert member.speaks[cold].all() and cold.sum() > 10
    chance = [random_ndcg(asked, seed) for seed in range(20)]
    assert ndcg(member, asked) > np.mean(chance) + 4 * np.std(chance)


def test_silent_on_a_cold_item_without_content(tmp_path: Path) -> None:
    data = world().training(tmp_path)
    cold = np.flatnonzero(data.counts == 0)
    texts = data.catalogue["text"].astype(object).copy()
    texts.iloc[[int(cold[0]), 0]] = ""
    data = TrainingData(data.matrix, data.catalogue.assign(text=texts), tmp_path)
    quick = {**TOWERS, "hidden": [], "training": {**TRAINING, "epochs": 1}}
    member = fitted(quick, data, tmp_path / "run")
    assert np.flatnonzero(~member.speaks).tolist() == [cold[0]]


def test_an_unknown_visitor_is_a_user_with_the_same_history(towers: Any) -> None:
    """The vector that training made of a user's history is the one that a visitor with this history is given."""
    matrix = world().training(Path()).matrix
    taken = matrix.indices[matrix.indptr[7] : matrix.indptr[8]][None].astype(np.int32)
    numbers = np.zeros(1, np.int32)
    trained = towers.model({"history": tf.constant(taken), "target": tf.constant(numbers)}, training=False)
    visitor = np.concatenate([taken, np.full((1, 5), -1, np.int32)], axis=1)
    found = towers.scorer().user(tf.constant(visitor)).numpy()
    np.testing.assert_allclose(found[:, 0], trained["user"], rtol=1e-4, atol=1e-5)
    item = towers.scorer().item_table.numpy()
    np.testing.assert_allclose(item[:1], trained["item"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(towers.scorer()(tf.constant(taken)).numpy(), found[:, 0] @ item.T, rtol=1e-4, atol=1e-5)


def two_tastes(users: int = 240, groups: int = 8, each: int = 6) -> tuple[sparse.csr_matrix, Question]:
    """Every user takes four items of each of two groups, and will take the other ones."""
    random = np.random.default_rng(0)
    known, later = np.zeros((2, users, groups * each), np.float32)
    for user in range(users):
        for group in random.choice(groups, 2, replace=False):
            items = group * each + random.permutation(each)
            known[user, items[:4]] = 1.0
            later[user, items[4:]] = 1.0
    matrix = sparse.csr_matrix(known)
    return matrix, Question(matrix, matrix, sparse.csr_matrix(later), np.ones(groups * each, bool))


def test_several_interests_serve_users_with_two_tastes(tmp_path: Path) -> None:
    """D15m: in few dimensions the sum of two tastes points at a third one; two vectors keep them apart."""
    matrix, asked = two_tastes()
    data = TrainingData(matrix, pd.DataFrame(index=range(matrix.shape[1])), tmp_path)
    settings = {
        "kind": "two_tower",
        "features": {"aggregates": False},
        "dimensions": 3,
        "hidden": [],
        "unit": False,
        "temperature": 1.0,
        "dropout": 0.0,
        "id_dropout": 0.0,
        "training": {"epochs": 20, "batch_size": 128, "learning_rate": 0.05},
    }
    found = {
        number: ndcg(fitted({**settings, "interests": number}, data, tmp_path / str(number)), asked)
        for number in (1, 2)
    }
    assert found[2] > 1.2 * found[1]


def test_pooling_worked_by_hand() -> None:
    """Two items and padding; the first interest reads both alike, the second one e times as much of the second item."""
    rows = tf.constant([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    known = tf.constant([[1.0, 1.0, 0.0]])
    weights = attention(tf.constant([[[3.0, 0.0], [3.0, 1.0], [7.0, 7.0]]]), known)
    np.testing.assert_allclose(weights[0], [[1, 1 / np.e], [1, 1], [0, 0]], rtol=1e-6)
    pooled = pool_interests(rows, weights).numpy()[0]
    np.testing.assert_allclose(pooled[0], [1 / np.sqrt(2), 2 / np.sqrt(2)], rtol=1e-6)
    np.testing.assert_allclose(pooled[1], np.array([1, 2 * np.e]) / np.sqrt(1 + np.e**2), rtol=1e-6)
    statistics = history_statistics(rows, known).numpy()[0]
    np.testing.assert_allclose(statistics, [0.5, 1.0, np.log(3) / 5], rtol=1e-6)
    user, product = nearest(tf.constant([[[1.0, 0.0], [0.0, 1.0]]]), tf.constant([[[2.0, 3.0], [1.0, 0.0]]]))
    assert user.numpy().tolist() == [[[0.0, 1.0], [1.0, 0.0]]] and product.numpy().tolist() == [[3.0, 1.0]]


# ---- the cross network ---------------------------------------------------------------------------------------


def test_a_cross_layer_worked_by_hand() -> None:
    """Wang et al. 2021, eq. 1: x0 * (x W + b) + x, and eq. 2 with W of rank 1."""
    first, x = tf.constant([[1.0, 2.0]]), tf.constant([[3.0, -1.0]])
    bias = tf.constant([0.5, 0.0])
    full = cross(first, x, [tf.constant([[1.0, 2.0], [0.0, 1.0]])], bias)  # x W = [3, 5]
    np.testing.assert_allclose(full, [[1 * 3.5 + 3, 2 * 5 - 1]])
    low = cross(first, x, [tf.constant([[1.0], [1.0]]), tf.constant([[2.0, 1.0]])], bias)  # x U = 2, then [4, 2]
    np.testing.assert_allclose(low, [[1 * 4.5 + 3, 2 * 2 - 1]])


@pytest.mark.parametrize("rank", [None, 3])
def test_a_cross_layer_is_that_of_tensorflow_recommenders(rank: int | None) -> None:
    layer = tfrs().layers.dcn.Cross(rank)
    first, x = (tf.constant(a) for a in np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32))
    expected = layer(first, x)
    *kernels, bias = layer.get_weights()
    assert len(kernels) == (1 if rank is None else 2)
    np.testing.assert_allclose(cross(first, x, kernels, bias), expected, rtol=1e-5, atol=1e-6)


def test_the_network_that_scores_is_the_one_that_was_trained(deep: Any) -> None:
    scorer = deep.scorer()
    history, candidates = tf.constant([[1, 4, -1], [2, -1, -1]]), tf.constant([[3, 5, 9], [0, 1, 7]])
    values, _ = scorer.inputs(history, candidates)
    mean, factor = deep.scale
    scaled = np.clip((values.numpy() - mean) * factor, -3, 3)
    np.testing.assert_allclose(scorer.network(values), deep.model(scaled), rtol=1e-4, atol=1e-5)
    assert np.abs(deep.model(scaled)).max() > 1e-3, "the last layer has left zero"


def test_the_cross_network_learns(tmp_path: Path) -> None:
    """D3m: towers that learned nothing give any order; from the aggregates the second stage makes a good one."""
    where = world(shuffle_labels=True, noise=20.0)
    idle = {"hidden": [], "dimensions": 4, "training": {"epochs": 1, "batch_size": 128, "learning_rate": 1e-6}}
    training = {"epochs": 3, "batch_size": 64, "learning_rate": 0.01}
    settings = {**DCN, "towers": idle, "shortlist": 80, "held_out": 0.0, "training": training}
    member: Any = fitted(settings, where.training(tmp_path), tmp_path)
    asked = where.asked(among=where.counts > 0)
    assert ndcg(member, asked) > 1.5 * ndcg(member.towers, asked)


def test_only_the_shortlist_is_ranked_anew(deep: Any) -> None:
    """The best 30 of the first stage, none of them in the history, stand first; the others follow in its order."""
    history = np.array([[int(n) for n in world().warm[:6]]], np.int32)
    scorer = deep.scorer()
    first = scorer.inputs.towers(tf.constant(history)).numpy()[0]
    found = scorer(tf.constant(history)).numpy()[0]
    unseen = np.setdiff1d(np.arange(len(first)), history)
    by_first = unseen[np.argsort(-first[unseen], kind="stable")]
    by_both = unseen[np.argsort(-found[unseen], kind="stable")]
    assert set(by_both[:30]) == set(by_first[:30]) and (by_both[:30] != by_first[:30]).any()
    np.testing.assert_array_equal(by_both[30:], by_first[30:])
    assert (found[by_both[:30]] > 0).all() and (found[by_both[30:]] <= 0).all() and (found[history[0]] <= 0).all()
    values, _ = scorer.inputs(tf.constant(history), tf.constant(by_first[None, :30]))
    assert values.shape[:2] == (1, 30)


def test_a_shortlist_leaves_out_the_history() -> None:
    scores = tf.constant([[5.0, 4.0, 3.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    values, numbers = shortlist(scores, tf.constant([[0, 2], [-1, -1]]), 2)
    assert numbers.numpy().tolist() == [[1, 3], [3, 2]] and values.numpy().tolist() == [[4.0, 2.0], [3.0, 2.0]]


def test_held_out_users_are_kept_from_the_towers(deep: Any) -> None:
    matrix = world().training(Path()).matrix
    first, second = deep._parts(matrix)
    of_first, of_second = (np.diff(part.indptr) > 0 for part in (first, second))
    assert 0.1 < of_second.mean() < 0.3 and not (of_first & of_second).any()
    assert (first + second != matrix).nnz == 0
    everybody = member_part({**DCN, "held_out": 0.0}).make(3)._parts(matrix)
    assert all((part != matrix).nnz == 0 for part in everybody)


def test_negatives_are_trained_items_that_the_user_did_not_take(towers: Any) -> None:
    matrix = world().training(Path()).matrix
    chosen = only(matrix, np.arange(matrix.shape[0]) % 3 == 0)
    config = member_part(DCN).config
    pairs = CandidatePairs(matrix, chosen, config, towers.scorer(), seed=1)
    positions = np.random.default_rng(0).permutation(len(pairs))
    batch, again = pairs.gather(positions), pairs.gather(positions)
    np.testing.assert_array_equal(batch["candidates"], again["candidates"])
    assert (pairs.gather(positions[::-1])["candidates"] != again["candidates"][::-1]).any()
    users, targets = pairs.users[positions], batch["candidates"][:, 0]
    assert (users % 3 == 0).all() and len(np.unique(users)) == len(np.unique(pairs.users))
    dense = matrix.toarray() > 0
    assert dense[users, targets].all() and not (batch["history"] == targets[:, None]).any()
    negatives = batch["candidates"][:, 1:]
    valid = negatives >= 0
    rows = np.repeat(users[:, None], negatives.shape[1], axis=1)
    assert valid.mean() > 0.7 and not dense[rows[valid], negatives[valid]].any()
    assert (world().counts[negatives[valid]] > 0).all()
    hard, row = negatives[:, : config.hard_negatives], 5
    history = matrix.indices[matrix.indptr[users[row]] : matrix.indptr[users[row] + 1]][None].astype(np.int32)
    first = np.where(dense[users[row]] | (world().counts == 0), -np.inf, towers.scorer()(tf.constant(history)))[0]
    best = first[np.argsort(-first)[29]]
    assert batch["last"][row] == pytest.approx(best, abs=1e-5)
    drawn = pairs.log_probability(tf.constant([[best + 0.1, best - 0.1]]), tf.constant([[best]]))
    rare = config.uniform_negatives / (world().counts > 0).sum()
    np.testing.assert_allclose(drawn, np.log([[config.hard_negatives / 30 + rare, rare]]), rtol=1e-5)
    assert set(hard[row]) <= {*np.argsort(-first)[:30]}, "of the user's 30 best ones"


def test_losses_worked_by_hand() -> None:
    scores, valid = tf.constant([[1.0, 0.0, 9.0], [0.0, 0.0, 0.0]]), tf.constant([[True, True, False], [True] * 3])
    np.testing.assert_allclose(softmax_loss(scores, valid), [np.log(1 + np.exp(-1)), np.log(3)], rtol=1e-6)
    np.testing.assert_allclose(
        pointwise_loss(scores, valid), [np.log1p(np.exp(-1)) + np.log(2), 2 * np.log(2)], rtol=1e-6
    )


def test_a_cross_network_needs_negatives() -> None:
    part = member_part({"kind": "dcn", "hard_negatives": 0, "uniform_negatives": 0})
    with pytest.raises(ConfigError, match="must have negatives"):
        MEMBERS["dcn"].check(part.config)
