"""The dense submodel over columns: cleaning inside the graph, fitted on training rows; linear and deep (D9m, B3-B5)."""

from __future__ import annotations

import numpy as np
import pytest

from fusion.compat import keras
from fusion.config import parse
from fusion.errors import ConfigError, DataError
from fusion.submodels.dense import Dense
from fusion.training.member import CLASSIFIERS, ClassifierMember, LabelledData
from fusion.training.separate import Examples
from fusion.types import RunOptions


def table(**columns) -> np.ndarray:
    """A structured array of text out of lists of anything."""
    text = {name: [str(cell) for cell in column] for name, column in columns.items()}
    values = np.empty(len(next(iter(text.values()))), [(n, f"U{max(map(len, c)) or 1}") for n, c in text.items()])
    for name, column in text.items():
        values[name] = column
    return values


def adapted(values, **settings) -> Dense:
    submodel = Dense(parse(Dense.Config, {"widths": [], **settings}), seed=3)
    submodel.adapt(values)
    return submodel


def embedded(submodel, values) -> np.ndarray:
    return submodel.encode(submodel.prepare(values))


def test_numbers_are_standardised_on_training_rows():
    """B5: mean 0 and variance 1 on what was fitted, and the same shift and scale for what comes later."""
    training = table(x=np.random.default_rng(0).normal(50, 9, 400))
    submodel = adapted(training, clip=0)
    found = embedded(submodel, training)[:, 0]
    assert abs(found.mean()) < 1e-5 and abs(found.std() - 1) < 1e-5
    numbers = training["x"].astype(float)
    later = table(x=[50.0, 41.5])
    np.testing.assert_allclose(
        embedded(submodel, later)[:, 0], (np.array([50.0, 41.5]) - numbers.mean()) / numbers.std(), atol=1e-4
    )


def test_outliers_are_clipped_at_training_quantiles():
    """B3: beyond the kept range every number counts as its end; worked on 0..100 with the 10 % quantiles."""
    submodel = adapted(table(x=range(101)), clip=0.1)
    found = embedded(submodel, table(x=[-1e9, 10, 50, 90, 1e9]))[:, 0]
    kept = np.clip(np.arange(101), 10, 90)
    np.testing.assert_allclose(found, (np.array([10, 10, 50, 90, 90]) - kept.mean()) / kept.std(), atol=1e-5)


def test_a_few_different_rows_survive_the_quantiles():
    rare = embedded(adapted(table(x=[0] * 999 + [7])), table(x=[0, 7, 9]))[:, 0]
    assert rare[0] < 0 < rare[1] and rare[1] == rare[2]


def test_a_missing_number_is_the_mean_and_raises_a_flag():
    """B4: worked by hand: 1 and 3 are there, one of four is empty and one says nan."""
    submodel = adapted(table(x=["1", "", "3", "nan"]), clip=0)
    found = embedded(submodel, table(x=["1", "", "3", "word"]))
    np.testing.assert_allclose(found, [[-1, -1], [0, 1], [1, -1], [0, 1]], atol=1e-6)


def test_what_never_varied_stays_silent():
    """Weights behind a constant column or a flag that was never raised were not trained: later values do not count."""
    submodel = adapted(table(x=[5, 5, 5], y=[1, 2, 3]))
    np.testing.assert_allclose(embedded(submodel, table(x=["999", ""], y=[2, 2]))[:, [0, 2]], 0, atol=1e-12)


def test_categories_have_a_column_each_and_unknown_ones_none():
    """B4: one-hot in the order of the alphabet; what training did not hold is all zeros; nothing is a category too."""
    submodel = adapted(table(colour=["red", "blue", "", "red"], size=["s", "m", "s", "s"]))
    found = embedded(submodel, table(colour=["red", "green", "", " blue "], size=["m", "s", "xl", "xl"]))
    expected = [[0, 0, 1, 1, 0], [0, 0, 0, 0, 1], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0]]
    np.testing.assert_array_equal(found, expected)


def test_rare_categories_are_unknown():
    submodel = adapted(table(colour=["a", "b", "b", "c", "c", "c"]), max_categories=2)
    np.testing.assert_array_equal(embedded(submodel, table(colour=["a", "b", "c"])), [[0, 0], [1, 0], [0, 1]])


def test_numbers_that_are_names_can_be_categories():
    values = table(zip=[10115, 80331, 10115])
    np.testing.assert_array_equal(embedded(adapted(values, categorical=["zip"]), values), [[1, 0], [0, 1], [1, 0]])
    with pytest.raises(DataError, match=r"categorical names the column 'zap'.*did you mean 'zip'"):
        adapted(values, categorical=["zap"])


def test_vectors_of_categories_are_trained_and_start_at_zero_for_the_unknown():
    submodel = adapted(table(colour=["red", "blue"], size=["s", "m"]), category_vectors=3)
    assert submodel.dimensions == 6 and not submodel.frozen
    found = embedded(submodel, table(colour=["red", "green"], size=["xl", "m"]))
    assert (found[0, 3:] == 0).all() and (found[1, :3] == 0).all()
    assert np.abs(found[0, :3]).min() > 0 and np.abs(found[1, 3:]).min() > 0


def test_nothing_of_other_rows_enters_what_is_fitted():
    """B3-B5: state depends on the rows given to adapt alone, and what is prepared on that state alone."""
    training, other = table(x=[1, 2, 3], c=["a", "b", "a"]), table(x=[1000, -5, 0], c=["z", "z", "a"])
    submodel = adapted(training)
    before = {name: array.copy() for name, array in submodel.state().items()}
    alone = embedded(submodel, other[:1])
    np.testing.assert_array_equal(embedded(submodel, other)[:1], alone)
    for name, array in submodel.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_row_without_a_column_is_refused_by_name():
    submodel = adapted(table(width=[1, 2], height=[3, 4]))
    with pytest.raises(DataError, match=r"must have the column 'height'.*did you mean 'heigth'"):
        submodel.prepare(table(width=[1], heigth=[2]))


def test_an_adapted_state_is_needed():
    with pytest.raises(DataError, match="must be fitted before use"):
        Dense(Dense.Config(), 0).prepare(table(x=[1]))
    with pytest.raises(DataError, match="over the same columns"):
        Dense(Dense.Config(), 0).load_state({"numeric": np.array(["x"]), "scales": np.zeros((5, 1))})


def test_depth_is_a_key():
    """D9m: widths make the layers; none makes the linear model, whose only weights are those of the head."""
    training = table(x=np.arange(20), y=np.arange(20) % 3)
    linear, deep = adapted(training), adapted(training, widths=[8, 4], dropout=0.5, activation="tanh")
    assert linear.frozen and linear.dimensions == 4
    assert not deep.frozen and deep.dimensions == 4
    assert [type(layer).__name__ for layer in deep.encoder().layers[-7:]] == (
        ["Dense", "Activation", "Dropout"] * 2 + ["Activation"]
    )
    assert np.abs(embedded(deep, training)).max() <= 1


def test_a_deep_member_learns_what_a_linear_one_cannot(tmp_path):
    """D9m: exclusive or, in a number and a category."""
    rng = np.random.default_rng(0)
    x, colour = rng.normal(size=400), rng.choice(["red", "blue"], 400)
    labels = ((x > 0) ^ (colour == "red")).astype(int)
    values = table(x=np.round(x, 3), colour=colour)

    def accuracy(widths) -> float:
        settings = {
            "encoder": {"kind": "dense", "widths": widths, "dropout": 0},
            "columns": ["*"],
            "training": {"epochs": 15, "batch_size": 32, "learning_rate": 0.01},
        }
        member = ClassifierMember(parse(ClassifierMember.Config, settings), seed=1)
        data = LabelledData(Examples(values[:300], labels[:300]), None, 2, tmp_path, str(widths))
        member.fit(data, RunOptions(1, tmp_path / str(len(widths)), quiet=True))
        restored = ClassifierMember(member.config, seed=1)
        restored.load_state(member.state())
        logits = restored.logits(values[300:])
        np.testing.assert_array_equal(logits, member.logits(values[300:]))
        return float(np.mean(logits.argmax(axis=1) == labels[300:]))

    assert accuracy([16]) > 0.95
    assert accuracy([]) < 0.65


def test_columns_must_be_named():
    config = parse(ClassifierMember.Config, {"encoder": {"kind": "dense"}})
    with pytest.raises(ConfigError, match="a tabular member must name its columns"):
        CLASSIFIERS["neural"].check(config)


def test_stock_layers_alone():
    """TFMOT takes stock layers; what is fitted stands in them and not in Python."""
    submodel = adapted(table(x=[1, 2], c=["a", "b"]), widths=[4])
    assert {type(layer).__module__.split(".")[0] for layer in submodel.encoder().layers} == {"tf_keras"}
    assert isinstance(submodel.encoder().get_layer("standardise"), keras.layers.Normalization)
