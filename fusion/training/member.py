"""A classification member: fitted on labelled rows, kept as arrays, loaded, and asked for logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fusion.augmentation import Augmentation
from fusion.compat import keras, tf
from fusion.config import Settings, content_hash, part_of
from fusion.embeddings import take
from fusion.errors import ConfigError
from fusion.registry import Registry
from fusion.submodels import SUBMODELS
from fusion.submodels.head import HeadSettings, classifier, head
from fusion.submodels.warm_start import WarmStart
from fusion.training.averaging import (
    STATISTICS_ROWS,
    latest_statistics,
    normalizations,
    set_statistics,
    statistics_of,
)
from fusion.training.separate import ClassifierTraining, Examples, in_batches, new_classifier, train_classifier
from fusion.types import History, RunOptions, derive_seed

CLASSIFIERS = Registry(
    "classifier member",
    {
        "neural": "fusion.training.member:ClassifierMember",
        "sklearn": "fusion.training.sklearn_member:SklearnMember",
    },
)


@dataclass(frozen=True)
class LabelledData:
    """What a member may see while it is fitted.

    Attributes:
        train: labelled values of the training rows.
        validation: labelled values that decide on the best epoch; None where nothing may be validated.
        classes: C.
        cache: folder for embeddings.
        hash: names rows, labels and content, for the cache of fitted members.
    """

    train: Examples
    validation: Examples | None
    classes: int
    cache: Path
    hash: str

    def fingerprint(self, part: Any) -> str:
        """Names what fitting `part` on this data depends on."""
        return content_hash([self.hash, self.classes])


def check_columns(config: Any) -> str:
    """The modality of a member's encoder; ConfigError when it reads columns and the member names none."""
    modality: str = config.encoder.registry[config.encoder.kind].modality
    if modality != "image" and not config.columns:
        raise ConfigError(f"a {modality} member must name its columns, as in 'columns: [title]'; received none.")
    return modality


class ClassifierMember:
    """An encoder and a head: values -> logits `[N, C]`.

    The encoder of a frozen member is not kept with it, because its weights come from where they came from, unless that
    is another member, which may be gone.
    """

    class Config(Settings):
        """Settings of a member."""

        encoder: part_of(SUBMODELS)  # type: ignore[valid-type]
        """The submodel: image_cnn, text_bert, ..."""
        columns: tuple[str, ...] = ()
        """Text columns, joined in this order; columns of a table, or patterns of names; unused for images."""
        share: str = ""
        """Members that give the same word here have one encoder between them; joint training only."""
        init_from: str = ""
        """Folder of a fitted member, RUN/submodels/NAME, from whose weights this one starts: arrays of layers of the
        same name and shape, and the vocabulary. The head starts anew where the classes are others."""
        head: HeadSettings = HeadSettings()
        """The classifier on top of the embedding."""
        augmentation: Augmentation = Augmentation()
        """How training values are varied, of encoders that are trained whole."""
        training: ClassifierTraining = ClassifierTraining(epochs=30, batch_size=64, learning_rate=0.001)
        """The training loop."""

    PREDICT_BATCH: ClassVar[int] = 64
    differentiable: ClassVar[bool] = True
    """Whether it learns by gradient, so that it may be trained together with others."""
    averageable: ClassVar[bool] = True
    """Whether the mean of the states of copies is a state, see `recsys.soups`."""
    accelerations: ClassVar[tuple[str, ...]] = ("precision", "xla", "accumulate")
    """Keys of the training loop that may be set, see `fusion.training.strategy.check_training`."""

    def __init__(self, config: Any, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self.submodel = config.encoder.make(derive_seed(seed, "encoder"))
        self.classes = 0
        self.start: WarmStart | None = None

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises ConfigError for settings that contradict each other."""
        modality = check_columns(config)
        frozen = config.encoder.make(0).frozen
        whole = getattr(config.encoder.config, "fine_tune", "all") == "all" and not frozen
        config.augmentation.check(modality, trained=whole)
        if config.training.unfreeze and frozen:
            raise ConfigError(
                "training.unfreeze must go with an encoder of which something is trained; this one is frozen. Set "
                "encoder.fine_tune to a number of blocks or to all, or leave unfreeze out."
            )

    @classmethod
    def depends_on_seed(cls, config: Any) -> bool:
        """Whether another seed gives another member: the weights of the head start at random."""
        return True

    def start_from(self, start: WarmStart) -> None:
        """Lets encoder and head start from another member's weights; called before fitting."""
        self.submodel.start_from(start)
        self.start = start

    def warm_start(self, origin: str) -> WarmStart:
        """What this member, fitted or loaded, gives to a new one."""
        return WarmStart(origin, self.submodel, self.model)

    def fit(self, data: LabelledData, options: RunOptions) -> History:
        """Fits vocabulary, head, and the layers that `fine_tune` names, on the training rows."""
        self.submodel.adapt_to(data.train.values)
        trained = train_classifier(
            self.submodel,
            data.train,
            data.validation,
            data.classes,
            self.config.head,
            self.config.training,
            options,
            data.cache / "embeddings",
            self.config.augmentation,
            self.start,
        )
        self.classes, self._model = data.classes, trained.model
        return trained.history

    def build(self, classes: int, seed: int) -> keras.Model:
        """Makes encoder and head with new weights, for whoever trains them; returns the part that training changes.

        Called in the scope of the strategy, after the encoder has adapted. `seed` is that of the training.
        """
        trained, self._model = new_classifier(self.submodel, classes, self.config.head, seed, self.start)
        self.classes = classes
        return trained

    @property
    def model(self) -> keras.Model:
        """Named inputs -> `logits` `[B, C]` and `embedding` `[B, D]`."""
        return self._model

    def state(self) -> dict[str, np.ndarray]:
        """The head's weights, the encoder's where they were trained, and what the encoder adapted."""
        state = {f"encoder/{name}": value for name, value in self.submodel.state().items()}
        weights = [weight for layer in self._kept_layers() for weight in layer.get_weights()]
        state |= {f"weights/{number:04d}": weight for number, weight in enumerate(weights)}
        return {**state, "classes": np.int64(self.classes)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """The inverse of `state`; builds the model."""
        prefix = "encoder/"
        self.submodel.load_state({n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)})
        self.classes = int(state["classes"])
        top = head(self.submodel.dimensions, self.classes, self.config.head, derive_seed(self.seed, "head"))
        self._model = classifier(self.submodel.encoder(), top)
        weights = [state[name] for name in sorted(state) if name.startswith("weights/")]
        for layer in self._kept_layers():
            count = len(layer.get_weights())
            layer.set_weights(weights[:count])
            weights = weights[count:]

    def renew_statistics(self, data: LabelledData) -> None:
        """Gives BatchNormalization the statistics of training rows under weights that no step was taken with, such as
        the mean of several (see `fusion.training.averaging`)."""
        layers = normalizations(self.model)
        if not layers:
            return
        values, size = data.train.values, self.config.training.batch_size
        order = np.random.default_rng(derive_seed(self.seed, "statistics")).permutation(len(values))[:STATISTICS_ROWS]
        full = max(len(order) // size * size, 1)
        found = []
        with latest_statistics(layers):
            for start in range(0, full, size):
                self.model(self.submodel.prepare(take(values, order[start : start + size])), training=True)
                found.append([variable.numpy() for variable in statistics_of(layers)])
        set_statistics(layers, [np.stack(parts) for parts in zip(*found, strict=True)])

    def classify(self, embedding: Any) -> Any:
        """Logits `[B, C]` of embeddings `[B, D]`, in inference mode."""
        for layer in self._head_layers():
            embedding = layer(embedding)
        return embedding

    def _kept_layers(self) -> list[keras.layers.Layer]:
        """The layers whose weights are in the state."""
        return self._head_layers() if self.submodel.frozen and not self.config.init_from else self.model.layers

    def _head_layers(self) -> list[keras.layers.Layer]:
        """The layers that do not belong to the encoder."""
        encoder = {id(layer) for layer in self.submodel.encoder().layers}
        return [layer for layer in self.model.layers if id(layer) not in encoder]

    @property
    def parameters(self) -> int:
        """Weights of encoder and head."""
        return int(self.model.count_params())

    def logits(self, values: Sequence[Any]) -> np.ndarray:
        """Logits float32 `[N, C]` of raw values."""
        score = tf.function(lambda inputs: self.model(inputs, training=False)["logits"], reduce_retracing=True)
        parts = [
            in_batches(score, self.submodel.prepare(values[start : start + 1024]), self.PREDICT_BATCH)
            for start in range(0, len(values), 1024)
        ]
        return np.concatenate(parts) if parts else np.zeros((0, self.classes), np.float32)
