"""Several optimizers in one training: who moves what, by how much, and what a resumed run finds again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.errors import ConfigError
from fusion.training.batches import epoch_order
from fusion.training.optimizers import Group, OptimizerSettings
from fusion.training.trainer import LoopSettings, TrainingSettings, fit
from fusion.types import Features, History, RunOptions

SGD = OptimizerSettings(optimizer="sgd", learning_rate=0.1)
ROWS = {"x": np.array([[1.0, 2.0]] * 4, np.float32)}


def two_layers() -> keras.Model:
    """x -> 2 -> 1, all weights 1, no bias: the output is 2 (x0 + x1)."""
    x = keras.Input((2,), name="x")
    first = keras.layers.Dense(2, use_bias=False, kernel_initializer="ones", name="first")
    second = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones", name="second")
    return keras.Model(x, second(first(x)))


def groups_of(model: keras.Model, first: OptimizerSettings, second: OptimizerSettings, **of_first: Any) -> list[Group]:
    return [
        Group("first", model.get_layer("first").trainable_variables, first, **of_first),
        Group("second", model.get_layer("second").trainable_variables, second),
    ]


def run(model: keras.Model, groups: list[Group], directory: Path, data: Any = None, **settings: Any) -> History:
    return fit(
        model,
        lambda batch: model(batch["x"], training=True)[:, 0],
        ROWS if data is None else data,
        LoopSettings(**{"epochs": 1, "batch_size": 4, **settings}),
        RunOptions(seed=1, directory=directory, quiet=True),
        None,
        groups=groups,
    )


def test_each_group_steps_by_its_own_rule(tmp_path: Path) -> None:
    """F6: worked by hand. The output is u·W·x: dW = x u' = [[1, 1], [2, 2]], du = W'x = [3, 3]; sgd moves W by 0.1 of
    a half, adam moves u by its whole rate whatever the gradient."""
    model = two_layers()
    adam = OptimizerSettings(optimizer="adam", learning_rate=0.01)
    history = run(model, groups_of(model, SGD, adam, multiplier=0.5), tmp_path)
    np.testing.assert_allclose(model.get_layer("first").get_weights()[0], [[0.95, 0.95], [0.9, 0.9]], atol=1e-6)
    np.testing.assert_allclose(model.get_layer("second").get_weights()[0], [[0.99], [0.99]], atol=1e-6)
    rates = {name: rate for name, rate in history.epochs[0].items() if name.startswith("learning_rate")}
    assert rates == pytest.approx({"learning_rate": 0.05, "learning_rate/first": 0.05, "learning_rate/second": 0.01})


def test_gradients_of_all_groups_are_clipped_together(tmp_path: Path) -> None:
    """F5, F6: the norm of all gradients is sqrt(10 + 18); clipped to 1, each is divided by it, in both groups."""
    model = two_layers()
    run(model, groups_of(model, SGD, SGD), tmp_path, clip_norm=1.0)
    norm = np.sqrt(28)
    np.testing.assert_allclose(model.get_layer("first").get_weights()[0][:, 0], 1 - 0.1 * np.array([1, 2]) / norm)
    np.testing.assert_allclose(model.get_layer("second").get_weights()[0][:, 0], 1 - 0.1 * np.array([3, 3]) / norm)


def test_interrupted_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    """F6, F10: the moments of every optimizer come back; another optimizer for a group is another run."""
    adam = OptimizerSettings(learning_rate=0.02)
    momentum = OptimizerSettings(optimizer="sgd", learning_rate=0.01, momentum=0.9)
    rng = np.random.default_rng(0)
    rows = {"x": rng.normal(size=(12, 2)).astype(np.float32)}
    calls = iter(range(1000))

    def gather(numbers: np.ndarray) -> Features:
        if len(numbers) > 1 and next(calls) == 4:
            raise KeyboardInterrupt
        return {name: values[numbers] for name, values in rows.items()}

    whole, broken, resumed = two_layers(), two_layers(), two_layers()
    loop = {"epochs": 3, "checkpoint_steps": 1}
    run(whole, groups_of(whole, adam, momentum), tmp_path / "whole", rows, **loop)
    with pytest.raises(KeyboardInterrupt):
        run(broken, groups_of(broken, adam, momentum), tmp_path / "broken", (12, gather), **loop)
    with pytest.raises(ConfigError, match="begun with others"):
        run(resumed, groups_of(resumed, adam, adam), tmp_path / "broken", rows, **loop)
    run(resumed, groups_of(resumed, adam, momentum), tmp_path / "broken", rows, **loop)
    for a, b in zip(whole.get_weights(), resumed.get_weights(), strict=True):
        assert np.array_equal(a, b)
    assert not np.allclose(whole.get_weights()[0], broken.get_weights()[0])


def _twice(model: keras.Model) -> list[Group]:
    everything = groups_of(model, SGD, SGD)
    return [*everything, Group("again", everything[0].variables, SGD)]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (_twice, "'first/kernel:0' is in 'first' and in 'again'"),
        (lambda model: groups_of(model, SGD, SGD)[:1], "'second/kernel:0' is in none"),
        (lambda model: [*groups_of(model, SGD, SGD), Group("x", [tf.Variable(1.0, name="other")], SGD)], "'other:0'"),
        (lambda model: [*groups_of(model, SGD, SGD), Group("none", [], SGD)], "'none' must have a variable"),
        (lambda model: groups_of(model, SGD, SGD)[:1] * 2, "distinct names; received first, first"),
        (lambda model: [], "must name an optimizer, or groups must be given"),
    ],
)
def test_a_variable_is_in_exactly_one_group(
    groups: Callable[[keras.Model], list[Group]], message: str, tmp_path: Path
) -> None:
    model = two_layers()
    with pytest.raises(ValueError, match=message):
        run(model, groups(model), tmp_path)


def test_adagrad_makes_of_a_mean_what_it_makes_of_a_sum(tmp_path: Path) -> None:
    """F6: the sum of squares begins with 1, the gradients [3, 3] of u add 9; a tenth of the loss gives the same."""
    steps = []
    for scale, start in ((1.0, 1.0), (0.1, 0.01)):
        model = two_layers()
        adagrad = OptimizerSettings(optimizer="adagrad", learning_rate=0.1, initial_accumulator=start)
        fit(
            model,
            lambda batch, model=model, scale=scale: scale * model(batch["x"], training=True)[:, 0],
            ROWS,
            LoopSettings(epochs=1, batch_size=4),
            RunOptions(seed=1, directory=tmp_path / str(scale), quiet=True),
            None,
            groups=groups_of(model, adagrad, adagrad),
        )
        steps.append(model.get_layer("second").get_weights()[0].ravel())
    np.testing.assert_allclose(steps, [[1 - 0.1 * 3 / np.sqrt(10)] * 2] * 2, rtol=1e-5)
    with pytest.raises(ValueError, match="initial_accumulator must go with optimizer adagrad"):
        OptimizerSettings(initial_accumulator=1.0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_rows_of_a_table_are_moved_as_keras_moves_them(mirrored: bool, tmp_path: Path) -> None:
    """F6: adagrad over a table of which a batch reads some rows, some of them twice; those it never reads stay."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0"], tf.distribute.ReductionToOneDevice()) if mirrored else None
    start = np.random.default_rng(2).normal(size=(9, 3)).astype(np.float32)

    def table() -> keras.Model:
        x = keras.Input((4,), dtype=tf.int32, name="x")
        return keras.Model(x, keras.layers.Embedding(9, 3, weights=[start])(x))

    with (strategy or tf.distribute.get_strategy()).scope():
        ours = table()
    rows = {"x": np.random.default_rng(0).integers(0, 7, (12, 4)).astype(np.int32)}
    fit(
        ours,
        lambda batch: tf.reduce_sum(ours(batch["x"], training=True) ** 2, axis=[1, 2]),
        rows,
        TrainingSettings(epochs=1, batch_size=4, optimizer="adagrad", learning_rate=0.2, initial_accumulator=0.01),
        RunOptions(seed=1, directory=tmp_path, strategy=strategy, quiet=True),
        None,
    )
    theirs = table()
    theirs.compile(keras.optimizers.Adagrad(0.2, 0.01), lambda _, y: tf.reduce_sum(y**2, axis=[1, 2]))
    order = epoch_order(1, 0, 12)
    theirs.fit(rows["x"][order], np.zeros(12), batch_size=4, shuffle=False, verbose=0)
    moved, expected = ours.get_weights()[0], theirs.get_weights()[0]
    np.testing.assert_allclose(moved, expected, atol=1e-5)
    np.testing.assert_array_equal(moved[7:], start[7:])
    assert np.abs(moved - start)[:7].max(axis=1).min() > 0.1
