"""Strategies: what is refused before anything runs, and that two devices do what one does.

Run as a program it is the process that trains over two logical CPUs: the CPU can be divided only before
TensorFlow first uses it, which in the test process is long over.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.config import parse
from fusion.errors import ConfigError
from fusion.submodels.head import HeadSettings
from fusion.submodels.image_cnn import ImageCnn
from fusion.training.separate import ClassifierTraining, Examples, cross_entropy, train_classifier
from fusion.training.strategy import StrategySettings, check_batch, logical_cpus, make_strategy, replicas, strategy_of
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import RunOptions

ROOT = Path(__file__).parents[2]
TWO_CPUS = {"kind": "mirrored", "devices": ["CPU:0", "CPU:1"]}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mirrored", "devices": ["cpu"]}, "named like CPU:0 or GPU:1; received 'cpu'"),
        ({"kind": "mirrored", "devices": ["CPU:0", "CPU:0"]}, "each device must stand once"),
        ({"kind": "default", "devices": ["CPU:0"]}, "devices must go with kind mirrored"),
        ({"kind": "miror"}, "strategy.kind"),
        ({"placement": {"text": "gpu"}}, "named like CPU:0 or GPU:1; received 'gpu'"),
        (
            {**TWO_CPUS, "placement": {"text": "CPU:0"}},
            "placement must go with kind default, because mirrored has devices",
        ),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(StrategySettings, settings, "strategy")


def test_the_batch_must_be_shared_evenly() -> None:
    """I2: checked from the config alone."""
    two = parse(StrategySettings, TWO_CPUS)
    assert replicas(two) == 2
    check_batch(32, two)
    check_batch(33, StrategySettings())
    with pytest.raises(ConfigError, match=r"multiple of the 2 devices .* received 33. Take 32 or 34"):
        check_batch(33, two)


def test_default_is_one_device_and_missing_devices_are_named() -> None:
    """I8: the CPU is used when there is no GPU."""
    assert make_strategy(StrategySettings()).num_replicas_in_sync == 1
    with pytest.raises(ConfigError, match="GPU:7 is not"):
        make_strategy(StrategySettings(kind="mirrored", devices=["GPU:7"]))
    with pytest.raises(ConfigError, match=r"strategy\.placement must be on this machine; GPU:7 is not\. It has"):
        make_strategy(StrategySettings(placement={"text": "GPU:7"}))
    tf.constant(0.0) + 1.0  # opens the CPU
    with pytest.raises(ConfigError, match="before TensorFlow first uses it"):
        logical_cpus(64)


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the process below found."""
    directory = tmp_path_factory.mktemp("two_devices")
    subprocess.run(
        [sys.executable, __file__, str(directory)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        check=True,
        timeout=400,
    )
    return json.loads((directory / "result.json").read_text())


def test_mirrored_over_two_cpus_equals_one_device(two_devices: dict[str, Any]) -> None:
    """I2: ten SGD steps, with a short and odd last batch, to 1e-5; and the test can fail."""
    assert two_devices["replicas"] == 2
    assert two_devices["steps"] == 10
    one, two, start = (np.array(two_devices[name]) for name in ("one", "two", "start"))
    np.testing.assert_allclose(two, one, atol=1e-5, rtol=0)
    assert np.abs(one - start).max() > 0.1
    np.testing.assert_allclose(two_devices["losses_two"], two_devices["losses_one"], rtol=1e-5)


def test_mirrored_adam_with_penalty_and_clipping_equals_one_device(two_devices: dict[str, Any]) -> None:
    """I2: the penalty counts once and the clipped norm is that of the summed gradient."""
    np.testing.assert_allclose(two_devices["adam_two"], two_devices["adam_one"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("travel", "digits"), [("bfloat16", 2.0**-8), ("float16", 2.0**-11)])
def test_gradients_travel_in_half_the_bytes(two_devices: dict[str, Any], travel: str, digits: float) -> None:
    """I6: one step of SGD is off by what the type rounds, and by no more; what is sent is counted."""
    whole, start = (np.array(two_devices[name]) for name in ("step_float32", "start"))
    rounded = np.array(two_devices[f"step_{travel}"])
    largest = np.abs(whole - start).max()
    off = np.abs(rounded - whole).max()
    assert 0 < off <= 2 * digits * largest
    assert two_devices["sent"][travel] == two_devices["sent"]["float32"] / 2 == 2 * len(start)


def test_mirrored_average_of_the_weights_equals_one_device(two_devices: dict[str, Any]) -> None:
    """G5, I2: what is kept is the average over all steps, and BatchNormalization has its statistics, of all rows."""
    one, two, plain = (np.array(two_devices[name]) for name in ("ema_images_one", "ema_images_two", "images_two"))
    np.testing.assert_allclose(two, one, atol=1e-5, rtol=0)
    assert np.abs(two - plain).max() > 1e-3
    one, two = (np.array(two_devices[f"ema_moving_{devices}"]) for devices in ("one", "two"))
    np.testing.assert_allclose(two, one, atol=1e-5, rtol=1 / 255)


def test_mirrored_in_half_precision_equals_one_device(two_devices: dict[str, Any]) -> None:
    """I2, I7: products in bfloat16 on each device, as on one; what they end with differs by what rounding does."""
    one, two = (np.array(two_devices[f"half_images_{devices}"]) for devices in ("one", "two"))
    whole = np.array(two_devices["images_two"])
    assert 0 < np.abs(two - whole).max() < 0.1 * np.abs(whole).max()
    np.testing.assert_allclose(two, one, atol=2.0**-8 * np.abs(whole).max(), rtol=0)


def test_mirrored_with_dropout_and_normalisation_resumes(two_devices: dict[str, Any]) -> None:
    """F10, G5, I2: checkpoints hold the state of every replica, and the average of the weights."""
    np.testing.assert_allclose(two_devices["resumed"], two_devices["whole"], atol=1e-7, rtol=0)


def test_mirrored_statistics_and_negatives_are_of_the_whole_batch(two_devices: dict[str, Any]) -> None:
    """F3, I2: with shared BatchNormalization the network learns what it learns on one device, and so do towers with the
    in-batch loss of TFRS. Moving variances differ by n / (n - 1): one device alone corrects for the size of the batch.
    """
    for name in ("images", "pairs"):
        one, two = (np.array(two_devices[f"{name}_{devices}"]) for devices in ("one", "two"))
        np.testing.assert_allclose(two, one, atol=1e-5, rtol=0)
    one, two = (np.array(two_devices[f"moving_{devices}"]) for devices in ("one", "two"))
    np.testing.assert_allclose(two, one, atol=1e-5, rtol=1 / 255)
    assert np.abs(one - 1).min() > 1e-3, "they have moved"


def test_mirrored_joint_training_equals_one_device(two_devices: dict[str, Any]) -> None:
    """I2, G1: members of a ranking that are trained together have the negatives of the whole batch as well, in the
    fused loss and in their own; and their gradients agree as on one device."""
    one, two = two_devices["joint_one"], two_devices["joint_two"]
    np.testing.assert_allclose(two["learned"], one["learned"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    assert set(one["conflict"]) == {"conflict/factorization", "conflict/words"}
    assert two["conflict"] == pytest.approx(one["conflict"], abs=1e-4)


def test_one_strategy_per_process(two_devices: dict[str, Any]) -> None:
    """A second MirroredStrategy would abort the first one's collectives; a model from outside is named."""
    assert two_devices["same_object"]
    assert "can mirror over one set of devices" in two_devices["other_devices"]
    assert "must be built in the scope of the strategy" in two_devices["outside"]
    assert "multiple of the 2 devices" in two_devices["odd_batch"]


def test_a_member_is_trained_where_it_is_placed(two_devices: dict[str, Any]) -> None:
    """I5: its variables and its steps are on that device, and what it learns is what it learns elsewhere."""
    placed = two_devices["placed"]
    assert (placed["first"]["held"], placed["first"]["ran"]) == (["CPU:1"], ["CPU:1"])
    assert (placed["second"]["held"], placed["second"]["ran"]) == (["CPU:0"], ["CPU:0"])
    assert placed["anywhere"]["held"] == ["CPU:0"] and placed["anywhere"]["ran"] == [""]
    assert placed["first"]["weights"] == placed["second"]["weights"] == placed["anywhere"]["weights"]


# ---- the process with two devices ----------------------------------------------------------------------------


def _data(n: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 6)).astype(np.float32)
    return {"x": x, "label": (x @ rng.normal(size=(6, 3))).argmax(1).astype(np.int32)}


def _model(extras: bool, penalty: float = 0.0) -> keras.Model:
    x = keras.Input((6,), name="x")
    y = keras.layers.Dense(
        8,
        "tanh",
        kernel_initializer=keras.initializers.GlorotUniform(seed=1),
        kernel_regularizer=keras.regularizers.L2(penalty) if penalty else None,
    )(x)
    if extras:
        y = keras.layers.BatchNormalization(synchronized=True)(y)
        y = keras.layers.Dropout(0.3, seed=3, force_generator=True)(y)
    return keras.Model(x, keras.layers.Dense(3, kernel_initializer=keras.initializers.GlorotUniform(seed=2))(y))


sent: list[int] = []
"""Bytes of gradients of each training by `_train`."""


def _train(
    strategy: tf.distribute.Strategy | None,
    directory: Path,
    n: int = 64,
    extras: bool = False,
    penalty: float = 0.0,
    interrupt_at: int | None = None,
    **settings: Any,
) -> tuple[np.ndarray, list[float]]:
    with (strategy or tf.distribute.get_strategy()).scope():
        model = _model(extras, penalty)
    data = _data(n)
    calls = itertools.count()

    def gather(rows: np.ndarray) -> dict[str, np.ndarray]:
        if len(rows) > 1 and next(calls) == interrupt_at:
            raise KeyboardInterrupt
        return {name: array[rows] for name, array in data.items()}

    history = fit(
        model,
        lambda batch: cross_entropy(batch["label"], model(batch["x"], training=True)),
        (n, gather),
        parse(TrainingSettings, {"epochs": 2, "batch_size": 16, "learning_rate": 0.5, **settings}),
        RunOptions(seed=3, directory=directory, strategy=strategy, quiet=True),
        None,
    )
    weights = np.concatenate([weight.ravel() for weight in model.get_weights()])
    sent.append(history.gradient_bytes)
    return weights, [row["train_loss"] for row in history.epochs]


def _train_images(
    strategy: tf.distribute.Strategy | None, directory: Path, **settings: Any
) -> tuple[list[float], list[float]]:
    """Weights and moving statistics of a small network after four steps."""
    options = RunOptions(seed=3, directory=directory, strategy=strategy, quiet=True)
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (32, 8, 8, 3), dtype=np.uint8)
    given = {"epochs": 2, "batch_size": 16, "learning_rate": 0.1, "optimizer": "sgd", **settings}
    training = parse(ClassifierTraining, given)
    submodel = ImageCnn(ImageCnn.Config(image_size=8, widths=(4, 8), dropout=0.0), 1)
    examples = Examples(images, random.integers(0, 2, 32))
    fitted = train_classifier(submodel, examples, None, 2, HeadSettings(), training, options, directory)

    def flat(variables: list[tf.Variable]) -> list[float]:
        return np.concatenate([variable.numpy().ravel() for variable in variables]).tolist()

    return flat(fitted.model.trainable_variables), flat(fitted.model.non_trainable_variables)


def _placed(directory: Path) -> dict[str, dict[str, Any]]:
    """By member of a placement: where its variables are, where its steps ran, and the weights it ended with."""
    settings = parse(StrategySettings, {"placement": {"first": "CPU:1", "second": "CPU:0"}})
    found = {}
    for member in ("first", "second", "anywhere"):
        strategy = strategy_of(settings, member)
        with strategy.scope():
            model = _model(False)
        ran: set[str] = set()

        def loss(batch: dict[str, tf.Tensor], model: keras.Model = model, ran: set[str] = ran) -> tf.Tensor:
            logits = model(batch["x"], training=True)
            ran.add(logits.device[-5:])  # asked while the graph is made
            return cross_entropy(batch["label"], logits)

        options = RunOptions(seed=3, directory=directory / member, strategy=strategy, quiet=True)
        fit(model, loss, _data(64), TrainingSettings(epochs=2, batch_size=16), options, None)
        found[member] = {
            "held": sorted({variable.device[-5:] for variable in model.variables}),
            "ran": sorted(ran),
            "weights": np.concatenate([weight.ravel() for weight in model.get_weights()]).tolist(),
        }
    return found


def _refusal(action: Any) -> str:
    try:
        action()
    except (ConfigError, ValueError) as error:
        return str(error)
    return "not refused"


def _main(directory: Path) -> None:
    from test_distribute import train_pairs
    from worlds import joint_members

    settings = parse(StrategySettings, TWO_CPUS)
    strategy = make_strategy(settings)
    n = 77  # 5 batches of 16 an epoch, of which the last has 13 rows
    one, losses_one = _train(None, directory / "one", n, optimizer="sgd")
    two, losses_two = _train(strategy, directory / "two", n, optimizer="sgd")
    last = tf.train.latest_checkpoint(str(directory / "two/checkpoints"))
    steps = json.loads(tf.train.load_variable(last, "state/.ATTRIBUTES/py_state"))["step"]
    adam = {"optimizer": "adam", "learning_rate": 0.05, "clip_norm": 0.5, "penalty": 0.1}
    ema = {"average": {"kind": "ema", "decay": 0.8}}
    whole = {**ema, "extras": True, "optimizer": "adam", "learning_rate": 0.05, "checkpoint_steps": 2}
    try:  # after four steps, as many batches of statistics, and two steps
        _train(strategy, directory / "resumed", interrupt_at=10, **whole)
    except KeyboardInterrupt:
        resumed, _ = _train(strategy, directory / "resumed", **whole)
    images_one, moving_one = _train_images(None, directory / "images_one")
    images_two, moving_two = _train_images(strategy, directory / "images_two")
    ema_images_one, ema_moving_one = _train_images(None, directory / "ema_images_one", **ema)
    ema_images_two, ema_moving_two = _train_images(strategy, directory / "ema_images_two", **ema)
    half_images_one, _ = _train_images(None, directory / "half_images_one", precision="mixed_bfloat16")
    half_images_two, _ = _train_images(strategy, directory / "half_images_two", precision="mixed_bfloat16")
    stepped = {}
    for travel in ("float32", "bfloat16", "float16"):
        step, _ = _train(
            strategy, directory / travel, 16, optimizer="sgd", epochs=1, gradients=travel, learning_rate=1.0
        )
        stepped |= {f"step_{travel}": step.tolist(), travel: sent[-1]}
    other = StrategySettings(kind="mirrored", devices=["CPU:1"])
    outside = _model(False)
    result = {
        "replicas": strategy.num_replicas_in_sync,
        "steps": steps,
        "start": np.concatenate([weight.ravel() for weight in _model(False).get_weights()]).tolist(),
        "one": one.tolist(),
        "two": two.tolist(),
        "losses_one": losses_one,
        "losses_two": losses_two,
        "adam_one": _train(None, directory / "adam_one", **adam)[0].tolist(),
        "adam_two": _train(strategy, directory / "adam_two", **adam)[0].tolist(),
        "whole": _train(strategy, directory / "whole", **whole)[0].tolist(),
        "resumed": resumed.tolist(),
        "images_one": images_one,
        "images_two": images_two,
        "half_images_one": half_images_one,
        "half_images_two": half_images_two,
        "moving_one": moving_one,
        "moving_two": moving_two,
        "ema_images_one": ema_images_one,
        "ema_images_two": ema_images_two,
        "ema_moving_one": ema_moving_one,
        "ema_moving_two": ema_moving_two,
        "pairs_one": train_pairs(directory / "pairs_one").tolist(),
        "pairs_two": train_pairs(directory / "pairs_two", strategy).tolist(),
        "joint_one": joint_members(directory / "joint_one"),
        "joint_two": joint_members(directory / "joint_two", strategy),
        **{name: value for name, value in stepped.items() if name.startswith("step_")},
        "sent": {name: value for name, value in stepped.items() if not name.startswith("step_")},
        "same_object": make_strategy(settings) is strategy,
        "other_devices": _refusal(lambda: make_strategy(other)),
        "outside": _refusal(
            lambda: fit(
                outside,
                lambda batch: batch["x"],
                _data(64),
                TrainingSettings(batch_size=16),
                RunOptions(seed=3, directory=directory / "outside", strategy=strategy, quiet=True),
                None,
            )
        ),
        "placed": _placed(directory / "placed"),
        "odd_batch": _refusal(lambda: _train(strategy, directory / "odd", batch_size=15)),
    }
    (directory / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
