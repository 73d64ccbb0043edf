"""Gradual unfreezing: the head first, then one block more from the top, and nothing else moves by a bit."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest

from fusion.compat import keras
from fusion.config import Settings, parse_part
from fusion.errors import ConfigError
from fusion.submodels.base import FineTune, Pretrained
from fusion.submodels.head import HeadSettings
from fusion.training import separate
from fusion.training.checkpoints import Checkpoints
from fusion.training.member import CLASSIFIERS
from fusion.training.optimizers import Group, OptimizerSettings
from fusion.training.separate import ClassifierTraining, Examples, TrainedClassifier, train_classifier
from fusion.training.trainer import LoopSettings, fit
from fusion.training.unfreezing import Unfreezing, joining_epochs
from fusion.types import Features, RunOptions

RATE, DECAY = 0.01, 0.1
HEAD = {"logits"}
TOP = HEAD | {"dense2", "norm2"}
MIDDLE = TOP | {"dense1", "norm1"}
EVERYTHING = MIDDLE | {"dense0", "norm0"}

Weights = dict[str, list[np.ndarray]]


class Stack(Pretrained):
    """Three blocks of Dense and BatchNormalization over the mean colour of an image."""

    class Config(Settings):
        fine_tune: FineTune = "all"
        """How many blocks are trained."""

    modality: ClassVar[Literal["image"]] = "image"

    def prepare(self, values: Sequence[Any], fixed_length: bool = False) -> Features:
        return {"image": np.asarray(values)}

    def _build(self) -> keras.Model:
        image = keras.Input((4, 4, 3), dtype="uint8", name="image")
        x = keras.layers.GlobalAveragePooling2D(name="colour")(keras.layers.Rescaling(1 / 255, name="scaled")(image))
        for number in range(3):
            start = keras.initializers.GlorotUniform(seed=self.seed + number)
            x = keras.layers.Dense(6, kernel_initializer=start, name=f"dense{number}")(x)
            x = keras.layers.BatchNormalization(momentum=0.5, name=f"norm{number}")(x)
        return keras.Model(image, keras.layers.Activation("tanh", name="embedding", dtype="float32")(x))

    def blocks(self) -> list[list[keras.layers.Layer]]:
        encoder = self.encoder()
        return [[encoder.get_layer(f"{kind}{number}") for kind in ("dense", "norm")] for number in range(3)]


def examples() -> Examples:
    random = np.random.default_rng(0)
    labels = np.arange(24) % 2
    images = random.integers(0, 100, (24, 4, 4, 3))
    images[np.arange(24), :, :, labels] += 100
    return Examples(images.astype(np.uint8), labels)


def training(**settings: Any) -> ClassifierTraining:
    """One step an epoch, by Adam with decoupled weight decay."""
    given = {"epochs": 4, "batch_size": 24, "learning_rate": RATE, "weight_decay": DECAY, "unfreeze": [1], **settings}
    return ClassifierTraining.model_validate(given)


def train(submodel: Stack, directory: Path, settings: ClassifierTraining) -> TrainedClassifier:
    options = RunOptions(seed=5, directory=directory / "member", quiet=True)
    data, head = examples(), HeadSettings()
    return train_classifier(submodel, data, data, 2, head, settings, options, directory / "cache")


@pytest.fixture
def epochs(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """Collects the weights by layer as they are when an epoch is validated, the start first."""
    seen: list[Weights] = []
    built, measured = separate.new_classifier, separate.classification_metrics
    models: list[keras.Model] = []

    def remember(*args: Any) -> tuple[keras.Model, keras.Model]:
        found = built(*args)
        models.append(found[1])
        seen.append(_weights(found[1]))
        return found

    def look(*args: Any) -> dict[str, float]:
        seen.append(_weights(models[-1]))
        return measured(*args)

    monkeypatch.setattr(separate, "new_classifier", remember)
    monkeypatch.setattr(separate, "classification_metrics", look)
    return seen


def _weights(model: keras.Model) -> Weights:
    return {layer.name: layer.get_weights() for layer in model.layers if layer.weights}


def moved(before: Weights, after: Weights) -> set[str]:
    """Names of layers of which a weight or a moving statistic is not the same, bit by bit."""
    return {
        name
        for name, old in before.items()
        if not all(a.tobytes() == b.tobytes() for a, b in zip(old, after[name], strict=True))
    }


def test_blocks_join_by_intervals_of_which_the_last_repeats() -> None:
    """E3: one an epoch, as Howard and Ruder do; or the head, then two blocks, then all of the rest."""
    assert joining_epochs([1], 4) == [1, 2, 3, 4]
    assert joining_epochs([1, 0, 3, 0], 5) == [1, 1, 4, 4, 4]
    assert joining_epochs([0], 2) == [0, 0]


@pytest.mark.parametrize(("fine_tune", "layers"), [("all", [HEAD, TOP, MIDDLE, EVERYTHING]), (2, [HEAD, TOP, MIDDLE])])
def test_the_head_learns_first_and_then_one_block_more(
    fine_tune: Any, layers: list[set[str]], epochs: list[Weights], tmp_path: Path
) -> None:
    """E3: what has not joined keeps every bit, moving statistics and decayed weights too; `fine_tune` is the end, and
    over two blocks the frozen part below runs once.

    A block's moments and its count of steps start when it joins: Adam's first step is the rate whatever the gradient
    is, and decay takes rate times decay of the weight. The rate is that of the schedule by then, times the block's.
    """
    schedule = {"kind": "exponential", "decay_rate": 0.5}
    settings = training(epochs=len(layers), schedule=schedule, encoder_rate=0.5, layer_decay=0.1)
    trained = train(Stack(Stack.Config(fine_tune=fine_tune), seed=1), tmp_path, settings)
    assert bool(list(tmp_path.glob("cache/trunk-*"))) is (fine_tune == 2)
    assert [moved(a, b) for a, b in itertools.pairwise(epochs)] == layers
    assert all(layer.trainable for layer in trained.model.layers if layer.name in layers[-1]), "left as it was"
    for block, epoch, share in ((2, 1, 0.5), (1, 2, 0.05)):
        rate = RATE * 0.5**epoch * share
        before, after = (epochs[at][f"dense{block}"][0] for at in (epoch, epoch + 1))
        np.testing.assert_allclose(np.abs(after - before + rate * DECAY * before), rate, rtol=0.1)
        name = f"learning_rate/block{block if fine_tune == 'all' else block - 1}"
        assert [row[name] for row in trained.history.epochs[: epoch + 1]] == pytest.approx([0.0] * epoch + [rate])


def test_interrupted_in_a_later_epoch_it_ends_with_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """E3, F10: three steps an epoch, killed within the last, when the head and one block move."""
    settings = training(epochs=2, batch_size=8, checkpoint_steps=1)
    whole = train(Stack(Stack.Config(), seed=1), tmp_path / "whole", settings)
    saves = iter(range(100))
    save = Checkpoints.save

    def killed(self: Checkpoints) -> None:
        save(self)
        if next(saves) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(Stack(Stack.Config(), seed=1), tmp_path / "broken", settings)
    resumed = train(Stack(Stack.Config(), seed=1), tmp_path / "broken", settings)
    assert not moved(_weights(whole.model), _weights(resumed.model))
    assert resumed.history.epochs == whole.history.epochs


def test_it_goes_with_half_precision_xla_and_accumulation(epochs: list[Weights], tmp_path: Path) -> None:
    """E3, I2: the loss scale of the head is that of the blocks that join it."""
    settings = training(epochs=2, precision="mixed_float16", xla=True, accumulate=2)
    train(Stack(Stack.Config(), seed=1), tmp_path, settings)
    assert [moved(a, b) for a, b in itertools.pairwise(epochs)] == [HEAD, TOP]


def test_a_frozen_encoder_has_nothing_to_unfreeze() -> None:
    encoder = {"kind": "image_efficientnet", "image_size": 32}
    for fine_tune, numbers in ((0, [1]), (2, [-1])):
        member = {"kind": "neural", "encoder": encoder | {"fine_tune": fine_tune}, "training": {"unfreeze": numbers}}
        with pytest.raises(ConfigError, match=r"(this one is frozen|unfreeze.0: input should be greater)"):
            part = parse_part(CLASSIFIERS, member, "member")
            part.registry[part.kind].check(part.config)


def test_groups_that_cannot_join_later_are_refused(tmp_path: Path) -> None:
    x = keras.Input((2,), name="x")
    model = keras.Model(x, keras.layers.Dense(1, name="only")(x))
    kernel, bias = model.trainable_variables
    sgd = OptimizerSettings(optimizer="sgd", learning_rate=0.1)
    with pytest.raises(ValueError, match="first group must move from the start; 'a' joins later"):
        fit(
            model,
            lambda batch: model(batch["x"])[:, 0],
            {"x": np.zeros((4, 2), np.float32)},
            LoopSettings(),
            RunOptions(1, tmp_path, quiet=True),
            None,
            groups=[Group("a", [kernel, bias], sgd, joins=1)],
        )
    with pytest.raises(ValueError, match="'only' join after 0, 2 epochs"):
        Unfreezing(model, [Group("a", [kernel], sgd), Group("b", [bias], sgd, joins=2)])
