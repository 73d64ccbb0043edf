"""Mixed precision, XLA and accumulated gradients: the same training, in fewer bits, compiled, or a part at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fusion.compat import keras, tf
from fusion.config import parse
from fusion.errors import ConfigError
from fusion.submodels.head import HeadSettings, classifier, head
from fusion.submodels.image_cnn import ImageCnn
from fusion.submodels.text_bert import ScaledDotProductAttention
from fusion.training.optimizers import Group, Optimizers, OptimizerSettings
from fusion.training.precision import precision_scope
from fusion.training.schedules import ScheduleSettings
from fusion.training.separate import (
    ClassifierTraining,
    Examples,
    classification_metrics,
    cross_entropy,
    train_classifier,
)
from fusion.training.strategy import StrategySettings, check_batch, check_training, scope
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import RunOptions

N, WIDTH, CLASSES = 90, 6, 3


def blobs(seed: int = 0) -> dict[str, np.ndarray]:
    """Points around one centre a class."""
    random = np.random.default_rng(seed)
    label = random.integers(0, CLASSES, N).astype(np.int32)
    return {
        "x": (3 * np.eye(CLASSES, WIDTH)[label] + random.normal(size=(N, WIDTH))).astype(np.float32),
        "label": label,
    }


def trained(folder: Path, penalty: float = 0.0, **settings: Any) -> tuple[keras.Model, list[float]]:
    """A small network after two epochs, and its losses."""
    parsed = parse(
        TrainingSettings, {"epochs": 2, "batch_size": 24, "optimizer": "sgd", "learning_rate": 0.3, **settings}
    )
    options = RunOptions(3, folder, quiet=True)
    with scope(options, parsed.precision):
        x = keras.Input((WIDTH,), name="x")
        start = keras.initializers.GlorotUniform(seed=1)
        regularizer = keras.regularizers.L2(penalty) if penalty else None
        y = keras.layers.Dense(8, "tanh", kernel_initializer=start, kernel_regularizer=regularizer)(x)
        top = head(8, CLASSES, HeadSettings(), 2)
        model = classifier(keras.Model(x, y), top)
    data = blobs()
    history = fit(
        model,
        lambda batch: cross_entropy(batch["label"], model(batch["x"], training=True)["logits"]),
        data,
        parsed,
        options,
        lambda: classification_metrics(model(data["x"])["logits"].numpy(), data["label"]),
        "accuracy",
    )
    return model, [row["train_loss"] for row in history.epochs]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[keras.Model, list[float]]:
    return trained(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_learns_what_float32_learns(
    precision: str, plain: tuple[keras.Model, list[float]], tmp_path: Path
) -> None:
    """I7: products in 16 bits; weights, logits and metrics in 32, and they come out about the same."""
    model, losses = trained(tmp_path, precision=precision)
    dense = next(layer for layer in model.layers if isinstance(layer, keras.layers.Dense))
    assert dense.compute_dtype == precision.removeprefix("mixed_")
    assert {variable.dtype for variable in model.trainable_variables} == {tf.float32}
    assert model.get_layer("logits").compute_dtype == "float32" == model.output["logits"].dtype.name
    np.testing.assert_allclose(losses, plain[1], rtol=0.02)
    data = blobs(1)
    ours, theirs = (classification_metrics(m(data["x"])["logits"].numpy(), data["label"]) for m in (model, plain[0]))
    assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=0.03) and theirs["accuracy"] > 0.8
    assert not np.array_equal(model.get_weights()[0], plain[0].get_weights()[0]), "computed otherwise"
    assert keras.mixed_precision.global_policy().name == "float32", "what is built later is not touched"


def test_a_step_whose_gradient_overflows_is_skipped_by_every_group() -> None:
    """I7: loss scaling halves the scale until the gradients of float16 fit."""
    one, two = tf.Variable(1.0), tf.Variable(1.0)
    settings = OptimizerSettings(optimizer="sgd", learning_rate=0.1)
    groups = [Group("one", [one], settings), Group("two", [two], settings)]
    optimizers = Optimizers(groups, [one, two], ScheduleSettings(), 10, 10, loss_scaling=True)
    scale = float(optimizers.scaled(tf.constant(1.0)))
    assert scale == 2.0**15
    optimizers.apply([tf.constant(float("inf")), tf.constant(scale)], [one, two])
    assert (one.numpy(), two.numpy()) == (1.0, 1.0)
    half = float(optimizers.scaled(tf.constant(1.0)))
    assert half == scale / 2
    optimizers.apply([tf.constant(half * 2.0), tf.constant(half)], [one, two])
    np.testing.assert_allclose([one.numpy(), two.numpy()], [0.8, 0.9], rtol=1e-6)


def test_softmax_of_attention_is_in_float32() -> None:
    """I7: beside a score of 100, padding of -100 leaves nothing, in 16 bits as in 32."""
    with precision_scope("mixed_bfloat16"):
        layer = ScaledDotProductAttention(1)
    vectors = tf.random.stateless_normal([1, 4, 8], seed=(1, 2))
    graph = tf.function(lambda x: layer([x, x, x, tf.constant([[1, 1, 1, 0]])])).get_concrete_function(vectors).graph
    kinds = {op.outputs[0].dtype for op in graph.get_operations() if op.type == "Softmax"}
    assert kinds == {tf.float32}


def test_embeddings_of_other_precision_have_another_fingerprint() -> None:
    """I7: a cache never mixes what was made in 16 bits with what was made in 32."""

    def encoder() -> ImageCnn:
        return ImageCnn(ImageCnn.Config(image_size=8, widths=(4,)), 1)

    plain, mixed = encoder(), encoder()
    with precision_scope("mixed_bfloat16"):
        mixed.encoder()
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    assert plain.fingerprint() == encoder().fingerprint() != mixed.fingerprint()
    first, second = (submodel.encode(submodel.prepare(images)) for submodel in (plain, mixed))
    assert first.dtype == second.dtype == np.float32
    np.testing.assert_allclose(first, second, atol=0.05)
    assert not np.array_equal(first, second)


def test_a_classifier_trains_in_bfloat16_and_is_kept_in_float32(tmp_path: Path) -> None:
    """I7: the weights of mixed precision, in a model that is built anew, give the same classes."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 48)
    images = (random.integers(0, 100, (48, 8, 8, 3)) + 120 * labels[:, None, None, None]).astype(np.uint8)
    settings = parse(ClassifierTraining, {"epochs": 3, "batch_size": 16, "precision": "mixed_bfloat16"})
    submodel = ImageCnn(ImageCnn.Config(image_size=8, widths=(4, 8)), 1)
    fitted = train_classifier(
        submodel, Examples(images, labels), None, 2, HeadSettings(), settings, RunOptions(1, tmp_path, quiet=True),
        tmp_path,
    )  # fmt: skip
    again = classifier(ImageCnn(submodel.config, 1).encoder(), head(8, 2, HeadSettings()))
    again.set_weights(fitted.model.get_weights())
    assert {layer.compute_dtype for layer in again.layers} <= {"float32", "uint8"}
    ours, theirs = (model(images)["logits"].numpy() for model in (fitted.model, again))
    np.testing.assert_allclose(ours, theirs, atol=0.1)


def test_xla_gives_the_same_weights(plain: tuple[keras.Model, list[float]], tmp_path: Path) -> None:
    """I8: compiled, the same steps; the short last batch is compiled apart."""
    model, losses = trained(tmp_path, xla=True)
    for ours, theirs in zip(model.get_weights(), plain[0].get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(losses, plain[1], rtol=1e-6)


@pytest.mark.parametrize("more", [{}, {"optimizer": "adam", "learning_rate": 0.01, "clip_norm": 0.5, "penalty": 0.1}])
def test_accumulated_gradients_equal_the_big_batch(more: dict[str, Any], tmp_path: Path) -> None:
    """F6: 4 parts of 6 rows, and a last batch of 18 that is filled up to 20, step as one batch does, to 1e-6."""
    whole, losses = trained(tmp_path / "whole", **more)
    parts, in_parts = trained(tmp_path / "parts", accumulate=4, **more)
    for ours, theirs in zip(parts.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(in_parts, losses, rtol=1e-6)


def test_accumulated_parts_are_equal() -> None:
    mirrored = StrategySettings(kind="mirrored", devices=["CPU:0", "CPU:1"])
    check_batch(24, mirrored, 4)
    with pytest.raises(
        ConfigError, match=r"2 devices of the strategy, times the 4 parts .* received 20. Take 16 or 24"
    ):
        check_batch(20, mirrored, 4)


@pytest.mark.parametrize(
    ("settings", "accelerations", "kind", "message"),
    [
        (
            {"precision": "mixed_bfloat16"},
            ("xla",),
            "default",
            "training.precision must be left as it is here, where xla",
        ),
        ({"accumulate": 2}, (), "default", "none of precision, xla and accumulate can be set; received 2"),
        ({"xla": True}, ("xla",), "mirrored", "training.xla must go with strategy.kind default; received mirrored"),
        ({"precision": "mixed_float16"}, ("precision",), "tpu", "which cannot scale losses"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    settings: dict[str, Any], accelerations: tuple[str, ...], kind: Any, message: str
) -> None:
    """I7, I9: checked from the config alone."""
    with pytest.raises(ConfigError, match=message):
        check_training(parse(TrainingSettings, settings), accelerations, StrategySettings(kind=kind))
