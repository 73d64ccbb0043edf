"""A classification member that scikit-learn fits: a frozen encoder's embedding, and an estimator on top of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusion.compat import keras
from fusion.config import Settings, part_of
from fusion.embeddings import embed
from fusion.errors import ConfigError
from fusion.estimators import ESTIMATORS
from fusion.submodels import SUBMODELS
from fusion.training.member import ClassifierMember, LabelledData, check_columns
from fusion.types import History, RunOptions, derive_seed


class SklearnMember(ClassifierMember):
    """An encoder and a scikit-learn estimator: values -> logits `[N, C]`, in a graph of our own.

    The validation rows are not used. Nothing of scikit-learn is kept: the state is arrays, and the model that is
    evaluated, exported and served is written from them.
    """

    differentiable = False
    averageable = False

    class Config(Settings):
        """Settings of a member."""

        encoder: part_of(SUBMODELS)  # type: ignore[valid-type]
        """The submodel that makes the features: text_tfidf, text_bert, image_efficientnet, dense without widths, ..."""
        columns: tuple[str, ...] = ()
        """Text columns, joined in this order; columns of a table, or patterns of names; unused for images."""
        estimator: part_of(ESTIMATORS)  # type: ignore[valid-type]
        """The classifier: logistic_regression, linear_svm, knn, random_forest or gradient_boosting."""

    def __init__(self, config: Any, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.estimator = config.estimator.make()
        self._arrays: dict[str, np.ndarray] = {}

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises ConfigError for columns that are missing, and for an encoder that would have to be trained."""
        check_columns(config)
        if not config.encoder.make(0).frozen:
            raise ConfigError(
                f"a scikit-learn estimator sends no gradient back, so its encoder must be used as it is; "
                f"{config.encoder.kind} would be trained. Set fine_tune: 0, or 'widths: []' for a table, or take a "
                "pretrained encoder."
            )

    @classmethod
    def depends_on_seed(cls, config: Any) -> bool:
        """As its estimator does; of all that are offered, the forest alone draws at random."""
        return bool(config.estimator.registry[config.estimator.kind].random)

    def fit(self, data: LabelledData, options: RunOptions) -> History:
        """Fits encoder and estimator on the training rows. Raises DataError for labels that do not fit."""
        data.train.check(data.classes, "training")
        self.submodel.adapt(data.train.values)
        features = embed(self.submodel, data.train.values, data.cache / "embeddings")
        seed = derive_seed(self.seed, "estimator")
        self.classes = data.classes
        self._arrays = self.estimator.fit(features, np.asarray(data.train.labels), data.classes, seed)
        self._model = self._build()
        return History(stopped="not trained in epochs")

    def _build(self) -> keras.Model:
        encoder = self.submodel.encoder()
        logits = self.estimator.logits(encoder.output, self._arrays)
        return keras.Model(
            encoder.inputs, {"logits": logits, "embedding": encoder.output}, name=f"{encoder.name}_classifier"
        )

    def state(self) -> dict[str, np.ndarray]:
        """What the encoder adapted, and the estimator as arrays."""
        state = {f"encoder/{name}": value for name, value in self.submodel.state().items()}
        state |= {f"estimator/{name}": value for name, value in self._arrays.items()}
        return {**state, "classes": np.int64(self.classes)}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """The inverse of `state`; builds the model."""
        self.submodel.load_state(_below(state, "encoder/"))
        self.classes = int(state["classes"])
        self._arrays = _below(state, "estimator/")
        self._model = self._build()


def _below(state: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in state.items() if name.startswith(prefix)}
