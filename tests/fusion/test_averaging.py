"""Averages of the weights over a run (G5, G6): against the weights of every step, and what they do to the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras
from fusion.config import parse
from fusion.errors import ConfigError
from fusion.training.averaging import AverageSettings
from fusion.training.batches import Rows
from fusion.training.separate import classification_metrics, cross_entropy
from fusion.training.strategy import StrategySettings, check_training, scope
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import Features, History, RunOptions

N, WIDTH, CLASSES = 48, 6, 3


def blobs(seed: int = 0) -> Features:
    """Points around one centre a class."""
    random = np.random.default_rng(seed)
    label = random.integers(0, CLASSES, N).astype(np.int32)
    x = 2 * np.eye(CLASSES, WIDTH)[label] + random.normal(size=(N, WIDTH))
    return {"x": x.astype(np.float32), "label": label}


def network(normalized: bool = False) -> keras.Model:
    """With `normalized` everything that has a state: moving statistics and random generators."""
    x = keras.Input((WIDTH,), name="x")
    y = keras.layers.Dense(8, "tanh", kernel_initializer=keras.initializers.GlorotUniform(seed=1), name="first")(x)
    if normalized:
        y = keras.layers.BatchNormalization(name="norm")(y)
        y = keras.layers.Dropout(0.3, seed=7, force_generator=True)(y)
    y = keras.layers.Dense(CLASSES, kernel_initializer=keras.initializers.GlorotUniform(seed=2))(y)
    return keras.Model(x, keras.layers.Activation("linear", dtype="float32")(y))


class Watched:
    """A run, with the weights and the log loss that validation saw after each epoch."""

    def __init__(self, folder: Path, normalized: bool = False, data: Any = None, **settings: Any) -> None:
        given = {"epochs": 6, "batch_size": N, "optimizer": "sgd", "learning_rate": 0.5, **settings}
        parsed, options = parse(TrainingSettings, given), RunOptions(3, folder, quiet=True)
        with scope(options, parsed.precision):
            self.model = network(normalized)
        self.seen: list[list[np.ndarray]] = []
        model, held = self.model, blobs(1)

        def validate() -> dict[str, float]:
            self.seen.append(model.get_weights())
            return classification_metrics(model(held["x"], training=False).numpy(), held["label"])

        def loss(batch: Any) -> Any:
            return cross_entropy(batch["label"], model(batch["x"], training=True))

        self.validate = validate
        rows = blobs() if data is None else data
        self.history: History = fit(model, loss, rows, parsed, options, validate, "log_loss", False)


def ema(weights: list[np.ndarray], decay: float) -> np.ndarray:
    """Written out: each step counts `decay` times the one after it, and the shares sum to 1."""
    shares = decay ** np.arange(len(weights))[::-1]
    return np.tensordot(shares / shares.sum(), np.array(weights, np.float64), 1)


def swa(weights: list[np.ndarray], start: int) -> np.ndarray:
    """The plain mean of what came after `start` steps; before that the weights themselves."""
    return np.mean(weights[start:], axis=0, dtype=np.float64) if len(weights) > start else weights[-1]


@pytest.mark.parametrize(
    ("average", "expected", "settings"),
    [
        ({"kind": "ema", "decay": 0.7}, lambda w: ema(w, 0.7), {"precision": "mixed_bfloat16", "accumulate": 3}),
        ({"kind": "swa", "start": 0.5}, lambda w: swa(w, 3), {"precision": "mixed_float16", "optimizer": "adam"}),
    ],
    ids=["ema-bfloat16-accumulated", "swa-float16-adam"],
)
def test_what_is_validated_is_the_average_of_all_steps(
    average: dict[str, Any],
    expected: Callable[[list[np.ndarray]], np.ndarray],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    """G5: one step an epoch, so a plain run shows the weights of every step; the average does not disturb them."""
    plain = Watched(tmp_path / "plain", **settings)
    averaged = Watched(tmp_path / "averaged", average=average, **settings)
    for epoch, found in enumerate(averaged.seen):
        for number, weight in enumerate(found):
            steps = [weights[number] for weights in plain.seen[: epoch + 1]]
            np.testing.assert_allclose(weight, expected(steps), rtol=0, atol=3e-7)
    assert not np.allclose(averaged.seen[-1][0], plain.seen[-1][0], atol=1e-3)
    best = averaged.history.best_epoch
    assert all(np.array_equal(a, b) for a, b in zip(averaged.model.get_weights(), averaged.seen[best], strict=True))


def test_steps_within_an_epoch_count_too(tmp_path: Path) -> None:
    """G5: six steps in two epochs; the mean that begins after five of them is the weights after the last."""
    last = Watched(tmp_path / "last", average={"kind": "swa", "start": 5 / 6}, epochs=2, batch_size=16)
    raw = Watched(tmp_path / "raw", epochs=2, batch_size=16)
    assert all(np.array_equal(a, b) for a, b in zip(last.seen[-1], raw.seen[-1], strict=True))


def test_no_epoch_before_the_mean_begins_is_kept(tmp_path: Path) -> None:
    """G5: steps so long that the first epochs are the best; patience counts from the first mean on."""
    run = Watched(
        tmp_path, average={"kind": "swa", "start": 0.5}, learning_rate=40.0, epochs=8, patience=1, optimizer="sgd"
    )
    losses = [row["log_loss"] for row in run.history.epochs]
    assert min(losses[:4]) < min(losses[4:])
    assert run.history.best_epoch == 4 + int(np.argmin(losses[4:]))
    assert len(losses) == 8 or losses[-1] >= losses[-2]


def test_statistics_are_those_of_the_averaged_weights(tmp_path: Path) -> None:
    """G5: mean and variance over the training rows, with the averages in place (Izmailov et al., section 3.2)."""
    run = Watched(tmp_path, normalized=True, average={"kind": "ema", "decay": 0.9}, batch_size=16, epochs=3)
    first, norm = run.model.get_layer("first"), run.model.get_layer("norm")
    read = np.tanh(blobs()["x"] @ first.get_weights()[0] + first.get_weights()[1])
    np.testing.assert_allclose(norm.moving_mean.numpy(), read.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(norm.moving_variance.numpy(), read.var(axis=0), atol=1e-5)
    assert norm.momentum == 0.99, "training goes on as before"


def test_interrupted_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    """G5, F10: the average, its count and the statistics are in the checkpoints."""
    average = {"kind": "swa", "start": 0.3}
    settings = {"average": average, "normalized": True, "batch_size": 16, "epochs": 4, "checkpoint_steps": 2}
    whole = Watched(tmp_path / "whole", **settings)
    data, calls = blobs(), [0]

    def gather(rows: np.ndarray) -> Features:
        calls[0] += len(rows) == 16
        if calls[0] == 16:  # statistics gather rows as well: this is within the third epoch
            raise KeyboardInterrupt
        return {name: array[rows] for name, array in data.items()}

    with pytest.raises(KeyboardInterrupt):
        Watched(tmp_path / "again", data=Rows(N, gather), **settings)
    resumed = Watched(tmp_path / "again", **settings)
    assert 0 < len(resumed.seen) < len(whole.seen)
    for one, other in zip(resumed.model.get_weights(), whole.model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert resumed.history.epochs == whole.history.epochs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ema", "start": 0.5}, "key start must go with kind swa; received kind ema"),
        ({"kind": "swa", "decay": 0.9}, "key decay must go with kind ema; received kind swa"),
        ({"kind": "swa", "start": 1.0}, "less than 1"),
        ({"kind": "mean"}, "'none', 'ema' or 'swa'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(AverageSettings, settings, "average")


def test_asynchronous_steps_have_no_average() -> None:
    training = parse(TrainingSettings, {"average": {"kind": "ema"}})
    with pytest.raises(ConfigError, match=r"training\.average must be left out with strategy.kind parameter_server"):
        check_training(training, (), StrategySettings(kind="parameter_server"))
