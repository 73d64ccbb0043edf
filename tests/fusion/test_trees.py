"""Trees of scikit-learn as arrays: the same branches, the same numbers, in TensorFlow and TFLite."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor, RandomForestClassifier
from threadpoolctl import threadpool_limits

from fusion.compat import tf
from fusion.errors import DataError
from fusion.export.litert import run as run_tflite
from fusion.export.tflite import convert
from fusion.trees import ALWAYS_LEFT, Trees, evaluate, placed, trees_of_boosting, trees_of_forest


def stump() -> Trees:
    """Two trees, by hand: x0 > 1 adds 10 instead of 1; x1 > 2 then x0 > 5 adds 300, else 200, else 100."""
    return Trees(
        feature=np.array([0, 0, 0, 1, 0, 0, 0, 0], np.int32),
        threshold=np.array([1, ALWAYS_LEFT, ALWAYS_LEFT, 2, ALWAYS_LEFT, 5, ALWAYS_LEFT, ALWAYS_LEFT], np.float32),
        child=np.array([1, 1, 2, 4, 4, 6, 6, 7], np.int32),
        value=np.array([[0], [1], [10], [0], [100], [0], [200], [300]], np.float32),
        roots=np.array([0, 3], np.int32),
        bias=np.array([0.5], np.float32),
        depth=np.array(2, np.int32),
    )


def test_trees_worked_by_hand():
    """D10m: a row goes right when its number is greater than the threshold, and left when it is equal."""
    rows = np.array([[1, 2], [1.1, 2], [1, 2.1], [6, 9]], np.float32)
    np.testing.assert_array_equal(evaluate(rows, stump())[:, 0], [101.5, 110.5, 201.5, 310.5])


def test_outputs_are_placed_where_they_belong():
    trees = placed(stump(), [2], 4, elsewhere=-7.0)
    np.testing.assert_array_equal(evaluate(np.array([[6, 9]], np.float32), trees), [[-7, -7, 310.5, -7]])
    two = Trees(**{**stump().state(), "bias": np.array([0.5, 0.25], np.float32)})  # tree 0 adds to 0, tree 1 to 1
    np.testing.assert_array_equal(evaluate(np.array([[6, 9]], np.float32), two), [[10.5, 300.25]])
    np.testing.assert_array_equal(evaluate(np.array([[6, 9]], np.float32), placed(two, [2, 0], 3)), [[300.25, 0, 10.5]])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with threadpool_limits(limits=1, user_api="openmp"):
        yield


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_a_forest_answers_as_scikit_learn_does(load):
    """D10m: 1e-5 to predict_proba on every row, trained on or not."""
    rows, labels = load(return_X_y=True)
    rows = rows.astype(np.float32)
    forest = RandomForestClassifier(20, random_state=0).fit(rows[::2], labels[::2])
    trees = trees_of_forest(forest)
    np.testing.assert_allclose(evaluate(rows, trees), forest.predict_proba(rows), atol=1e-6)
    assert int(trees.depth) == max(tree.get_depth() for tree in forest.estimators_)


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_boosting_answers_as_scikit_learn_does(load):
    """D10m: raw predictions of two classes (one output) and of three."""
    rows, labels = load(return_X_y=True)
    rows = rows.astype(np.float32)
    boosting = HistGradientBoostingClassifier(max_iter=15, max_depth=4, random_state=0).fit(rows[::2], labels[::2])
    raw = boosting.decision_function(rows).reshape(len(rows), -1)
    np.testing.assert_allclose(evaluate(rows, trees_of_boosting(boosting)), raw, atol=1e-5)


def test_a_regression_is_written_too():
    rows = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    boosting = HistGradientBoostingRegressor(max_iter=10, random_state=0).fit(rows, rows[:, 0] * rows[:, 1])
    np.testing.assert_allclose(evaluate(rows, trees_of_boosting(boosting))[:, 0], boosting.predict(rows), atol=1e-5)


def test_a_threshold_between_two_float32_numbers_keeps_its_side():
    """Rows that lie as close to a split as float32 can tell take scikit-learn's branch."""
    rows = np.array([[0.1], [np.nextafter(np.float32(0.1), np.float32(1))]], np.float32).repeat(20, axis=0)
    labels = np.repeat([0, 1], 20)
    forest = RandomForestClassifier(5, random_state=0).fit(rows, labels)
    np.testing.assert_allclose(evaluate(rows, trees_of_forest(forest)), forest.predict_proba(rows), atol=1e-6)


def test_splits_on_categories_are_refused():
    rows = np.repeat(np.arange(4.0), 20)[:, None]
    boosting = HistGradientBoostingClassifier(max_iter=2, categorical_features=[0]).fit(rows, rows[:, 0] % 2)
    with pytest.raises(DataError, match="column of its own"):
        trees_of_boosting(boosting)


def test_state_comes_back_and_foreign_state_is_refused():
    state = stump().state()
    rows = np.array([[6, 9]], np.float32)
    np.testing.assert_array_equal(evaluate(rows, Trees.of_state(state)), evaluate(rows, stump()))
    for wrong in ({}, {**state, "child": state["child"][1:]}, {"weights": np.zeros(3)}):
        with pytest.raises(DataError, match="over the same nodes"):
            Trees.of_state(wrong)


def test_the_same_in_tflite(tmp_path):
    rows = np.array([[1, 2], [6, 9]], np.float32)
    function = tf.function(lambda x: {"sum": evaluate(x, stump())}).get_concrete_function(
        tf.TensorSpec([2, 2], tf.float32, name="x")
    )
    path = tmp_path / "trees.tflite"
    path.write_bytes(convert({"serving_default": function}, tf.Module()))
    np.testing.assert_array_equal(run_tflite(path, {"x": rows})["sum"][:, 0], [101.5, 310.5])
