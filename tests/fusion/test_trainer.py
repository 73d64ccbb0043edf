"""The training loop against independent slow versions, and what it does when it is stopped in the middle.

Run as a program it is the process that the kill test kills.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.config import parse
from fusion.errors import ConfigError, DataError, EngineError, MachineError
from fusion.training import trainer
from fusion.training.batches import Rows, epoch_order
from fusion.training.checkpoints import Checkpoints, TrainingState, read_history
from fusion.training.schedules import Schedule, ScheduleSettings
from fusion.training.separate import classification_metrics, cross_entropy
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import Features, History, RunOptions

ROOT = Path(__file__).parents[2]
N, WIDTH, CLASSES = 50, 4, 3


def blobs(n: int = N, seed: int = 0) -> Features:
    """Points around one centre per class."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, n).astype(np.int32)
    centres = np.array([[3, 0, 0, 0], [0, 3, 0, 0], [0, 0, 3, 0]], np.float32)
    return {"x": (centres[label] + rng.normal(size=(n, WIDTH))).astype(np.float32), "label": label}


def linear(**kernel: Any) -> keras.Model:
    x = keras.Input((WIDTH,), name="x")
    dense = keras.layers.Dense(CLASSES, kernel_initializer=keras.initializers.GlorotUniform(seed=1), **kernel)
    return keras.Model(x, dense(x))


def with_dropout() -> keras.Model:
    """Everything that has a state: weights, moving statistics, random generators."""
    x = keras.Input((WIDTH,), name="x")
    y = keras.layers.Dense(8, "relu", kernel_initializer=keras.initializers.GlorotUniform(seed=1))(x)
    y = keras.layers.BatchNormalization()(y)
    y = keras.layers.Dropout(0.5, seed=7, force_generator=True)(y)
    y = keras.layers.Dense(CLASSES, kernel_initializer=keras.initializers.GlorotUniform(seed=2))(y)
    return keras.Model(x, y)


def loss_of(model: keras.Model) -> trainer.Loss:
    return lambda batch: cross_entropy(batch["label"], model(batch["x"], training=True))


def validation_of(model: keras.Model, data: Features | None = None) -> Callable[[], dict[str, float]]:
    data = data or blobs(40, seed=1)
    return lambda: classification_metrics(model(data["x"], training=False).numpy(), data["label"])


def run(
    model: keras.Model, directory: Path, data: trainer.Data | None = None, seed: int = 3, **settings: Any
) -> History:
    monitor, higher = settings.pop("monitor", "log_loss"), settings.pop("higher", False)
    loss = settings.pop("loss", loss_of(model))
    validate = settings.pop("validate", validation_of(model))
    return fit(
        model,
        loss,
        blobs() if data is None else data,
        parse(TrainingSettings, {"epochs": 3, "batch_size": 16, "learning_rate": 0.05, **settings}),
        RunOptions(seed=seed, directory=directory, quiet=True),
        validate,
        monitor,
        higher,
    )


def same_bits(a: keras.Model, b: keras.Model) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a.get_weights(), b.get_weights(), strict=True))


# ---- steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.9, "clip_norm": 0.1},
        {"optimizer": "sgd", "weight_decay": 0.1},
        {"optimizer": "adam"},
        {"optimizer": "adagrad"},
    ],
    ids=lambda settings: "-".join(settings.values() if len(settings) == 1 else settings),
)
def test_steps_are_those_of_keras_fit(settings: dict[str, Any], tmp_path: Path) -> None:
    """F6, F7, F12: same optimiser, order, short last batch and penalty as Keras's own loop, an independent version."""
    ours, theirs = (linear(kernel_regularizer=keras.regularizers.L2(0.01)) for _ in range(2))
    run(ours, tmp_path, epochs=1, batch_size=16, **settings)
    rows = epoch_order(3, 0, N)
    optimizers = {"sgd": keras.optimizers.SGD, "adam": keras.optimizers.Adam, "adagrad": keras.optimizers.Adagrad}
    options = {"momentum": 0.9} if "momentum" in settings else {}
    theirs.compile(
        optimizers[settings["optimizer"]](
            0.05, weight_decay=settings.get("weight_decay"), global_clipnorm=settings.get("clip_norm"), **options
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    data = blobs()
    theirs.fit(data["x"][rows], data["label"][rows], batch_size=16, shuffle=False, verbose=0)
    for a, b in zip(ours.get_weights(), theirs.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert not np.allclose(ours.get_weights()[0], linear().get_weights()[0], atol=1e-3)


def test_order_differs_by_epoch_and_seed_and_is_a_permutation() -> None:
    """F12: deterministic shuffle."""
    orders = [epoch_order(seed, epoch, 100) for seed, epoch in [(1, 0), (1, 1), (2, 0)]]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert not any(np.array_equal(orders[0], other) for other in orders[1:])
    assert np.array_equal(orders[1], epoch_order(1, 1, 100))


def test_result_does_not_depend_on_how_rows_are_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """F12: gathering callable, worker threads and steps per call are matters of speed alone."""
    data = blobs(200)
    plain, gathered = with_dropout(), with_dropout()
    run(plain, tmp_path / "a", data)
    monkeypatch.setattr(trainer, "_MOST_STEPS_PER_CALL", 1)
    rows = Rows(200, lambda i: {name: array[i] for name, array in data.items()})
    run(gathered, tmp_path / "b", rows, workers=3, checkpoint_steps=4)
    assert same_bits(plain, gathered)


def test_batches_may_differ_in_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are padded to the longest of their batch: each batch alone, however many steps a call takes."""
    lengths = np.random.default_rng(0).integers(1, 9, 64)
    lengths[np.linspace(0, 63, 16).astype(int)] = 4  # the rows looked at beforehand are all of one length
    widths: list[set[int]] = []

    def gather(rows: np.ndarray) -> Features:
        widths[-1].add(int(lengths[rows].max()))
        return {"x": np.ones((len(rows), lengths[rows].max()), np.float32)}

    models = []
    for most_steps in (64, 1):
        monkeypatch.setattr(trainer, "_MOST_STEPS_PER_CALL", most_steps)
        widths.append(set())
        x = keras.Input((None,), name="x")
        model = keras.Model(x, keras.layers.Dense(1)(keras.layers.Reshape((-1, 1))(x)))
        model.set_weights([np.ones((1, 1)), np.zeros(1)])
        run(
            model,
            tmp_path / str(most_steps),
            Rows(64, gather),
            loss=lambda batch, model=model: tf.reduce_sum(model(batch["x"]) ** 2, axis=[1, 2]),
            validate=lambda: {"log_loss": 1.0},
            batch_size=4,
            epochs=2,
            learning_rate=1e-3,
        )
        models.append(model)
    assert widths[0] == widths[1] and len(widths[0]) > 2
    assert same_bits(*models)


def test_dropout_differs_by_step_in_training_and_is_inactive_at_inference(tmp_path: Path) -> None:
    """F2."""
    model = with_dropout()
    x = blobs()["x"]
    assert not np.array_equal(model(x, training=True), model(x, training=True))
    assert np.array_equal(model(x, training=False), model(x, training=False))


def test_labels_are_smoothed_as_stated() -> None:
    """F7: worked by hand for logits (0, ln 3), label 0, s = 0.2: -(0.9 ln 1/4 + 0.1 ln 3/4)."""
    logits = tf.constant([[0.0, np.log(3.0)]])
    np.testing.assert_allclose(
        cross_entropy(tf.constant([0]), logits, 0.2), [-(0.9 * np.log(0.25) + 0.1 * np.log(0.75))], rtol=1e-6
    )
    np.testing.assert_allclose(cross_entropy(tf.constant([0]), logits), [np.log(4)], rtol=1e-6)
    assert np.isfinite(cross_entropy(tf.constant([0]), tf.constant([[-1e4, 1e4]]))).all()


# ---- schedules -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "constant"}, [1, 1, 1, 1, 1]),
        ({"kind": "constant", "warmup_steps": 4}, [0.25, 0.5, 0.75, 1, 1]),
        ({"kind": "cosine"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"kind": "cosine", "final_fraction": 0.5}, [1, 0.875, 0.75, 0.625, 0.5]),
        ({"kind": "exponential", "decay_rate": 0.25}, [1, 0.5, 0.25, 0.125, 0.0625]),
        ({"kind": "step", "decay_rate": 0.1, "decay_epochs": 1.5}, [1, 1, 1, 0.1, 0.1]),
        ({"kind": "step", "decay_rate": 0.5, "warmup_steps": 2}, [0.5, 1, 1, 1, 0.5]),
    ],
)
def test_schedules_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    """F5: 6 steps, 2 an epoch; cosine is read where its angle is 0, 60, 90, 120 and 180 degrees."""
    schedule = Schedule(2.0, ScheduleSettings(**settings), steps=6, steps_per_epoch=2)
    steps = [0, 2, 3, 4, 6] if settings["kind"] == "cosine" else range(5)
    np.testing.assert_allclose([schedule(step) for step in steps], 2 * np.array(expected), atol=1e-6)
    assert float(Schedule.from_config(schedule.get_config())(1)) == float(schedule(1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": {"kind": "cosine", "decay_rate": 0.2}}, "decay_rate must go with .* exponential or step"),
        ({"optimizer": "adam", "momentum": 0.9}, "momentum must go with optimizer sgd; received optimizer adam"),
        ({"learning_rate": 0}, "learning_rate.*greater than 0.*received 0"),
        ({"schedule": {"knd": "cosine"}}, "unknown key 'schedule.knd': did you mean 'kind'"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(settings: dict[str, Any], message: str) -> None:
    assert parse(TrainingSettings, TrainingSettings().model_dump()) == TrainingSettings()  # a resolved config is read
    with pytest.raises(ConfigError, match=message):
        parse(TrainingSettings, settings)


# ---- when to stop --------------------------------------------------------------------------------------------


def _given(values: list[float]) -> Callable[[], dict[str, float]]:
    answers = iter(values)
    return lambda: {"metric": next(answers)}


def test_patience_stops_and_the_best_weights_come_back(tmp_path: Path) -> None:
    """F4: best at the second epoch; two worse ones follow, and the weights of the second are left."""
    model, seen = linear(), []
    values = iter([0.5, 0.8, 0.7, 0.8, 0.9])

    def validate() -> dict[str, float]:
        seen.append(model.get_weights())
        return {"metric": next(values)}

    history = run(model, tmp_path, epochs=5, patience=2, validate=validate, monitor="metric", higher=True)
    assert (len(history.epochs), history.best_epoch) == (4, 1)
    assert history.stopped == "no better metric for 2 epochs"
    assert np.array_equal(model.get_weights()[0], seen[1][0])
    assert not np.array_equal(seen[3][0], seen[1][0])


@pytest.mark.parametrize(("higher", "target", "epochs"), [(True, 0.7, 2), (False, 0.4, 3), (True, 0.99, 4)])
def test_target_stops_training(higher: bool, target: float, epochs: int, tmp_path: Path) -> None:
    """F4: stop when the accuracy is reached."""
    validate = _given([0.5, 0.8, 0.3, 0.9])
    history = run(linear(), tmp_path, epochs=4, target=target, validate=validate, monitor="metric", higher=higher)
    assert len(history.epochs) == epochs
    assert history.stopped.startswith("target reached: metric" if epochs < 4 else "all epochs done")


def test_without_validation_all_epochs_are_done_and_the_last_is_kept(tmp_path: Path) -> None:
    """A fold or a final fit on every row has nothing to look at: patience and target do not apply."""
    model, other = linear(), linear()
    history = run(model, tmp_path / "a", validate=None, target=0.0, patience=1)
    run(other, tmp_path / "b", validate=_given([1.0, 2.0, 3.0]), monitor="metric", higher=True)
    assert (len(history.epochs), history.best_epoch, history.stopped) == (3, 2, "all epochs done")
    assert same_bits(model, other)


def test_it_learns_and_leaves_history_and_tensorboard(tmp_path: Path) -> None:
    """F8, F9: learning curves as JSON and as TensorBoard scalars."""
    model = linear()
    history = run(model, tmp_path, monitor="accuracy", higher=True, epochs=10)
    assert validation_of(model)()["accuracy"] > 0.9
    assert history.epochs[-1]["train_loss"] < history.epochs[0]["train_loss"] / 2
    assert read_history(tmp_path / "history.json") == history
    tags: dict[str, list[int]] = {}
    for path in (tmp_path / "tensorboard").iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                tags.setdefault(value.tag, []).append(event.step)
    assert tags.keys() >= {"train/loss", "train/learning_rate", "validation/accuracy", "validation/log_loss"}
    assert tags["validation/accuracy"] == [4 * epoch for epoch in range(1, 11)]


def test_training_loss_is_the_mean_over_rows(tmp_path: Path) -> None:
    """The short last batch counts by its rows; with a learning rate of nearly 0 the loss is that of the start."""
    model = linear()
    expected = float(np.mean(loss_of(model)(blobs())))
    history = run(model, tmp_path, epochs=1, learning_rate=1e-12)
    assert history.epochs[0]["train_loss"] == pytest.approx(expected, rel=1e-6)


# ---- what is refused -----------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_with_its_place(tmp_path: Path) -> None:
    data = blobs()
    data["x"][epoch_order(3, 0, N)[40]] = np.nan  # row 40 of the order is in the third batch of 16
    with pytest.raises(EngineError, match="loss must stay finite; received nan in epoch 1, step 3 of 4"):
        run(linear(), tmp_path, data)
    assert not list(tmp_path.glob("checkpoints/*")), "spoilt weights must not be saved"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"monitor": "acuracy"}, ConfigError, "received 'acuracy', validation gives accuracy, log_loss"),
        ({"validate": lambda: {"log_loss": float("nan")}}, EngineError, "log_loss = nan after epoch 1"),
        ({"data": {"x": np.zeros((3, 4)), "label": np.zeros(2)}}, DataError, "one length"),
        ({"data": {"x": np.zeros((0, 4)), "label": np.zeros(0)}}, DataError, "at least one row"),
    ],
)
def test_bad_input_gets_one_sentence(
    change: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(linear(), tmp_path, **change)


def test_dropout_whose_state_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    """F10: without a generator in a variable a resumed run could not repeat the masks."""
    x = keras.Input((WIDTH,), name="x")
    model = keras.Model(x, keras.layers.Dense(CLASSES)(keras.layers.Dropout(0.5, name="hidden_state")(x)))
    with pytest.raises(ValueError, match=r"layer 'hidden_state' .* force_generator=True"):
        run(model, tmp_path)


# ---- stopped in the middle -----------------------------------------------------------------------------------

RESUMABLE = {
    "epochs": 4,
    "checkpoint_steps": 3,
    "optimizer": "adam",
    "schedule": {"kind": "cosine", "warmup_steps": 3},
    "patience": 3,
}


def _stopping_at(call: int, stop: Callable[[], None]) -> Rows:
    """Rows whose gathering stops the process or raises at the n-th batch."""
    data, calls = blobs(), itertools.count()

    def gather(rows: np.ndarray) -> Features:
        if len(rows) > 1 and next(calls) == call:  # single rows are only looked at
            stop()
        return {name: array[rows] for name, array in data.items()}

    return Rows(N, gather)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[keras.Model, History]:
    model = with_dropout()
    return model, run(model, tmp_path_factory.mktemp("whole"), **RESUMABLE)


def _without_seconds(history: History) -> History:
    return dataclasses.replace(history, seconds=0.0)


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, uninterrupted: tuple[keras.Model, History]) -> None:
    """F10: kill -9 in the middle of an epoch, run again: weights and history of an uninterrupted run, bit by bit."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, __file__, str(tmp_path)], cwd=ROOT, env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    rows = read_history(tmp_path / "history.json").epochs
    assert len(rows) == 2, "the kill must fall into the third of four epochs"
    model = with_dropout()
    history = run(model, tmp_path, **RESUMABLE)
    assert same_bits(model, uninterrupted[0])
    assert _without_seconds(history) == _without_seconds(uninterrupted[1])


def test_interrupt_propagates_and_the_last_checkpoint_serves(
    tmp_path: Path, uninterrupted: tuple[keras.Model, History]
) -> None:
    """F10: Ctrl-C passes through; the run goes on from the last completed epoch or step."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(with_dropout(), tmp_path, _stopping_at(10, stop), **RESUMABLE)
    newest = tf.train.latest_checkpoint(str(tmp_path / "checkpoints"))
    saved = json.loads(tf.train.load_variable(newest, "state/.ATTRIBUTES/py_state"))
    assert (saved["epoch"], saved["position"], saved["step"]) == (2, 1, 9)  # every third step, and each epoch's end
    model = with_dropout()
    run(model, tmp_path, **RESUMABLE)
    assert same_bits(model, uninterrupted[0])


def _damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:100] + bytes(byte ^ 255 for byte in content[100:]))


@pytest.mark.parametrize("how", ["cut", "flipped"])
@pytest.mark.parametrize("part", ["index", "data-00000-of-00001"])
def test_a_damaged_checkpoint_is_passed_over(
    part: str, how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """F10: the one before is used, with a note."""
    saved = with_dropout()
    checkpoints = Checkpoints(tmp_path, saved, keras.optimizers.SGD(), TrainingState("same run"))
    for step in (1, 2):
        checkpoints.state.step = step
        saved.set_weights([np.full_like(weight, step) for weight in saved.get_weights()])
        checkpoints.save()
    _damage(tmp_path / "checkpoints" / f"ckpt-2.{part}", how)
    model = with_dropout()
    restored = Checkpoints(tmp_path, model, keras.optimizers.SGD(), TrainingState("same run"))
    assert restored.restore(quiet=False)
    err = capsys.readouterr().err
    assert "ckpt-2 cannot be read" in err and "trying the one before" in err
    assert restored.state.step == 1
    assert all((weight == 1).all() for weight in model.get_weights())


def test_finished_runs_are_recognised_and_other_runs_refused(tmp_path: Path) -> None:
    """F10: nothing is trained twice, and no run goes on from another one's checkpoint."""
    first, again = with_dropout(), with_dropout()
    history = run(first, tmp_path)

    def never(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        raise AssertionError("a finished run must not be trained again")

    assert run(again, tmp_path, loss=never) == history
    assert same_bits(first, again)
    for change in ({"learning_rate": 0.06}, {"seed": 4}, {"data": blobs(51)}):
        with pytest.raises(ConfigError, match="begun with others"):
            run(with_dropout(), tmp_path, **change)
    for path in (tmp_path / "checkpoints").glob("*.index"):
        _damage(path, "cut")
    with pytest.raises(MachineError, match="all 2 are damaged"):
        run(with_dropout(), tmp_path)


def test_a_folder_that_cannot_be_written_is_a_machine_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="must be writable"):
        run(linear(), tmp_path / "file" / "run")


def test_frozen_layers_stay_and_are_not_saved(tmp_path: Path) -> None:
    model = with_dropout()
    model.layers[1].trainable = False
    before = model.get_weights()
    run(model, tmp_path)
    after = model.get_weights()
    assert np.array_equal(before[0], after[0]) and not np.array_equal(before[-2], after[-2])
    names = [name for name, _ in tf.train.list_variables(tf.train.latest_checkpoint(str(tmp_path / "checkpoints")))]
    assert sum(name.startswith("weights/") for name in names) == len(model.weights) - 2
    other = with_dropout()
    other.layers[1].trainable = False
    other.layers[1].set_weights([weight + 1 for weight in other.layers[1].get_weights()])
    with pytest.raises(ConfigError, match="begun with others"):  # its best weights stand on other frozen ones
        run(other, tmp_path)


# ---- speed ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_loop_is_not_slower_than_keras_fit(tmp_path: Path) -> None:
    """F12: best of three epochs of 1,000 tiny steps each."""
    data = blobs(16_000)
    ours, theirs = linear(), linear()
    theirs.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    begins: list[float] = []

    def validate() -> dict[str, float]:
        begins.append(time.perf_counter())
        return {"log_loss": 1.0}

    run(ours, tmp_path, data, epochs=4, validate=validate)
    keras_seconds = []
    for _ in range(3):
        began = time.perf_counter()
        theirs.fit(data["x"], data["label"], batch_size=16, verbose=0)
        keras_seconds.append(time.perf_counter() - began)
    ratio = min(keras_seconds) / min(np.diff(begins))
    print(json.dumps({"keras_fit_s": min(keras_seconds), "ours_s": min(np.diff(begins)), "ratio": ratio}))
    assert ratio > 1


if __name__ == "__main__":
    run(
        with_dropout(),
        Path(sys.argv[1]),
        _stopping_at(10, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        **RESUMABLE,
    )
