"""Members that scikit-learn fits: the same answers from arrays and a graph of our own (D10m)."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from fusion.compat import keras, tf
from fusion.config import parse_part
from fusion.ensemble import Ensemble
from fusion.errors import ConfigError, DataError
from fusion.estimators import ESTIMATORS, SumOfTrees, Votes
from fusion.export.litert import run as run_tflite
from fusion.export.tflite import convert
from fusion.rules import RULES
from fusion.training.member import CLASSIFIERS, LabelledData
from fusion.training.separate import Examples
from fusion.types import RunOptions, derive_seed

SMALL = {
    "logistic_regression": {},
    "linear_svm": {"c": 0.1},
    "knn": {"neighbours": 7, "floor": 1e-7},
    "random_forest": {"trees": 10, "floor": 1e-7},
    "gradient_boosting": {"turns": 8, "max_depth": 3, "learning_rate": 0.3},
}


def cells(numbers: np.ndarray) -> np.ndarray:
    """Rows of numbers as the text that tabular members read."""
    values = np.empty(len(numbers), [(f"c{column}", "U24") for column in range(numbers.shape[1])])
    for column in range(numbers.shape[1]):
        values[f"c{column}"] = [repr(float(number)) for number in numbers[:, column]]
    return values


COLUMNS = {"kind": "dense", "widths": []}


def member_of(kind: str, encoder=COLUMNS, seed: int = 3):
    columns = ["text"] if encoder["kind"].startswith("text") else ["*"]
    settings = {"kind": "sklearn", "encoder": encoder, "columns": columns}
    part = parse_part(CLASSIFIERS, {**settings, "estimator": {"kind": kind, **SMALL.get(kind, {})}}, "member")
    CLASSIFIERS["sklearn"].check(part.config)
    return part.make(seed)


def fitted(kind: str, values, labels, classes: int, folder, encoder=COLUMNS):
    member = member_of(kind, encoder)
    member.fit(LabelledData(Examples(values, labels), None, classes, folder, "data"), RunOptions(3, folder, quiet=True))
    return member


def features_of(member, values):
    return member.submodel.encode(member.submodel.prepare(values))


def references(member, values, labels):
    """scikit-learn's own estimator, fitted on what the member was fitted on."""
    estimator = member.estimator.new(labels, derive_seed(member.seed, "estimator"))
    with threadpool_limits(limits=1, user_api="openmp"):
        return estimator.fit(features_of(member, values), labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("members")


@pytest.fixture(scope="module")
def wine():
    numbers, labels = load_wine(return_X_y=True)
    return cells(numbers), labels


@pytest.fixture(scope="module")
def members(wine, folder):
    """Every estimator on every second row of wine."""
    values, labels = wine
    return {kind: fitted(kind, values[::2], labels[::2], 3, folder) for kind in ESTIMATORS}


def test_every_estimator_has_small_settings_here():
    assert set(SMALL) == set(ESTIMATORS)


@pytest.mark.parametrize("kind", sorted(ESTIMATORS))
@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_probabilities_are_those_of_scikit_learn(kind, load, folder):
    """D10m: within 1e-5 of predict_proba on rows that were not seen, for two classes and for three."""
    numbers, labels = load(return_X_y=True)
    values = cells(numbers[:, :8])
    member = fitted(kind, values[::2], labels[::2], labels.max() + 1, folder)
    found = tf.nn.softmax(member.logits(values[1::2])).numpy()
    expected = references(member, values[::2], labels[::2]).predict_proba(features_of(member, values[1::2]))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.mean(found.argmax(axis=1) == labels[1::2]) > 0.85


@pytest.mark.parametrize("kind", sorted(ESTIMATORS))
def test_state_is_arrays_and_makes_an_equal_member(kind, wine, members):
    """B13: no pickle; what is loaded answers what was saved, bit by bit."""
    values, member = wine[0], members[kind]
    state = member.state()
    assert all(np.asarray(array).dtype.kind in "fiubU" for array in state.values())
    restored = member_of(kind)
    restored.load_state(state)
    np.testing.assert_array_equal(restored.logits(values), member.logits(values))
    assert restored.parameters == member.parameters > 0


@pytest.mark.parametrize("kind", ["logistic_regression", "knn", "random_forest", "gradient_boosting"])
def test_a_class_without_rows_keeps_its_column(kind, wine, folder):
    """Folds may lack a rare class: its column is there, says next to nothing, and the others are as fitted."""
    values, labels = wine
    rows = np.flatnonzero(labels != 1)
    shifted = np.where(labels == 2, 3, labels)  # classes 0 and 3 of 4
    member = fitted(kind, values[rows], shifted[rows], 4, folder)
    found = tf.nn.softmax(member.logits(values[rows])).numpy()
    assert found.shape[1] == 4 and found[:, [1, 2]].max() < 1e-6
    expected = references(member, values[rows], shifted[rows]).predict_proba(features_of(member, values[rows]))
    np.testing.assert_allclose(found[:, [0, 3]], expected, atol=1e-5)


def test_all_of_them_in_one_exported_ensemble(wine, members, tmp_path):
    """D10m: trees and neighbours are converted too, in builtin operations; TFLite answers what Keras does."""
    values = wine[0]
    rule = RULES["average"](RULES["average"].Config(), list(members), "classes")
    ensemble = Ensemble(members, rule)
    row = {name: values[1:2] for name in members}
    inputs = {**ensemble.prepare(row), "mask": np.ones((1, len(members)), bool)}
    model = ensemble.functional()
    specs = {name: tf.TensorSpec(array.shape, array.dtype, name) for name, array in inputs.items()}
    function = tf.function(lambda **given: model(given, training=False)).get_concrete_function(**specs)
    owner = tf.Module()
    owner.kept = model.variables
    path = tmp_path / "ensemble.tflite"
    path.write_bytes(convert({"serving_default": function}, owner))
    found = run_tflite(path, inputs)["probabilities"]
    np.testing.assert_allclose(found, ensemble.predict(row), atol=1e-5)


@pytest.mark.parametrize("kind", sorted(ESTIMATORS))
def test_the_model_is_flat_and_cloneable(kind, wine, members):
    values, member = wine[0], members[kind]
    assert not any(isinstance(layer, keras.Model | keras.layers.Lambda) for layer in member.model.layers)
    clone = keras.models.clone_model(member.model)
    clone.set_weights(member.model.get_weights())
    inputs = member.submodel.prepare(values)
    np.testing.assert_array_equal(clone(inputs)["logits"], member.model(inputs)["logits"])


def test_words_are_features_too(folder):
    """A frozen text encoder under logistic regression."""
    texts = ["a red film", "the red sea", "red night", "blue war", "the blue film", "night and blue"] * 4
    labels = np.array([0, 0, 0, 1, 1, 1] * 4)
    encoder = {"kind": "text_tfidf", "max_features": 20, "dimensions": 4}
    member = fitted("logistic_regression", texts, labels, 2, folder, encoder)
    assert (member.logits(["red", "blue"]).argmax(axis=1) == [0, 1]).all()


def test_an_encoder_that_would_be_trained_is_refused():
    with pytest.raises(ConfigError, match=r"no gradient back.*dense would be trained.*'widths: \[\]'"):
        member_of("knn", {"kind": "dense", "widths": [4]})


def test_one_class_is_refused(wine, folder):
    values, labels = wine
    with pytest.raises(DataError, match="at least two classes; these 59 hold one"):
        fitted("random_forest", values[labels == 0], labels[labels == 0], 3, folder)


def test_margins_are_given_a_temperature(wine, members):
    """LIBLINEAR's margins times one number above 0, so that classes keep their order and log-loss gets better."""
    values, labels = wine
    member = members["linear_svm"]
    machine = references(member, values[::2], labels[::2]).calibrated_classifiers_[0].estimator
    margins, logits = machine.decision_function(features_of(member, values)), member.logits(values)
    factor = (logits * margins).sum() / np.square(margins).sum()
    np.testing.assert_allclose(logits, factor * margins, rtol=1e-3, atol=1e-4)
    assert factor > 1.0


def test_a_class_of_one_row_leaves_margins_as_they_are(wine, folder):
    values, labels = wine
    rows = np.concatenate([np.flatnonzero(labels < 2)[::2], np.flatnonzero(labels == 2)[:1]])
    member = fitted("linear_svm", values[rows], labels[rows], 3, folder)
    machine = references(member, values[rows], labels[rows])
    margins = machine.decision_function(features_of(member, values))
    np.testing.assert_allclose(member.logits(values), margins, rtol=1e-4, atol=1e-4)


def test_a_floor_keeps_what_was_never_seen_possible(wine, folder):
    """No votes are no proof: with the default floor no class is below 1 in 1,000 by much."""
    values, labels = wine
    settings = {"kind": "sklearn", "encoder": COLUMNS, "columns": ["*"]}
    part = parse_part(CLASSIFIERS, {**settings, "estimator": {"kind": "knn", "neighbours": 3}}, "member")
    member = part.make(0)
    member.fit(LabelledData(Examples(values, labels), None, 3, folder, "x"), RunOptions(0, folder, quiet=True))
    least = tf.nn.softmax(member.logits(values)).numpy().min(axis=1)
    assert 0.0009 < least.min() < 0.0011


def test_layers_say_what_they_were_made_of():
    """Keras can make them again from their settings alone."""
    votes = Votes(3, 10, 4, 0.001, name="logits")
    trees = SumOfTrees([0, 3], 2, (8, 1), 1, name="logits")
    for layer in (votes, trees):
        again = type(layer).from_config(layer.get_config())
        assert [weight.shape for weight in again.weights] == [weight.shape for weight in layer.weights]


def test_the_linear_models_are_what_scikit_learn_documents():
    """An independent slow version: softmax of x·W + b by hand."""
    rows = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    labels = (rows[:, 0] > 0).astype(int) + (rows[:, 1] > 0.5)
    estimator = ESTIMATORS["logistic_regression"](ESTIMATORS["logistic_regression"].Config(c=2.0))
    arrays = estimator.fit(rows, labels, 3, seed=0)
    shown = np.exp(rows @ arrays["kernel"] + arrays["bias"])
    expected = LogisticRegression(C=2.0, max_iter=5000).fit(rows, labels).predict_proba(rows)
    np.testing.assert_allclose(shown / shown.sum(axis=1, keepdims=True), expected, atol=1e-5)
