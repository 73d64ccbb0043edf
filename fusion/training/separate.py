"""Trains one classification member by itself: its head on stored embeddings, or encoder and head end to end.

Which of the two is decided by the submodel: a frozen encoder gives the same embedding in every epoch, so it runs
once over the data. Fusing members is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.embeddings import embed
from fusion.errors import DataError
from fusion.progress import progress, reached
from fusion.submodels.base import Submodel
from fusion.submodels.head import HeadSettings, classifier, head
from fusion.training.strategy import scope
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import Features, History, RunOptions, derive_seed

_LABEL = "label"


class ClassifierTraining(TrainingSettings):
    """How a classifier is fitted."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread evenly over all classes."""
    monitor: Literal["accuracy", "log_loss"] = "accuracy"
    """The validation metric that decides on the best epoch, patience and target."""


@dataclass(frozen=True)
class Examples:
    """Labelled rows of one part of the data.

    Attributes:
        values: what the submodel reads: N texts, or images uint8 [N, H, W, 3].
        labels: class numbers, int [N].
    """

    values: Any
    labels: np.ndarray

    def check(self, classes: int, part: str) -> None:
        """Raises DataError when labels and values do not fit together."""
        labels = np.asarray(self.labels)
        if len(labels) != len(self.values) or labels.ndim != 1 or len(labels) == 0:
            raise DataError(
                f"each {part} example must have one label; received {len(self.values)} values and labels of "
                f"shape {list(labels.shape)}."
            )
        if labels.min() < 0 or labels.max() >= classes:
            raise DataError(
                f"labels must be class numbers from 0 to {classes - 1}; the {part} part holds {labels.min()} to "
                f"{labels.max()}."
            )


@dataclass(frozen=True)
class _Prepared:
    """Examples whose values are named model inputs."""

    features: Features
    labels: np.ndarray


@dataclass(frozen=True)
class TrainedClassifier:
    """A fitted member.

    Attributes:
        model: flat functional model, the submodel's inputs -> `logits` [B, C] and `embedding` [B, D]. It shares its
            layers with the submodel's encoder.
        history: what training did.
    """

    model: keras.Model
    history: History


def train_classifier(
    submodel: Submodel,
    train: Examples,
    validation: Examples | None,
    classes: int,
    head_settings: HeadSettings,
    settings: ClassifierTraining,
    options: RunOptions,
    cache_dir: Path,
) -> TrainedClassifier:
    """Fits head and, unless it is frozen, encoder of `submodel` with softmax cross-entropy.

    Without `validation` all epochs are done and the last one is kept. Embeddings of a frozen encoder are kept
    under `cache_dir`. Raises DataError for labels that do not fit.
    """

    def prepared(part: Examples, name: str) -> _Prepared:
        part.check(classes, name)
        frozen = submodel.frozen
        features = _embeddings(submodel, part, cache_dir, options) if frozen else submodel.prepare(part.values)
        return _Prepared(features, part.labels)

    fitting = prepared(train, "training")
    held = prepared(validation, "validation") if validation is not None else None
    with scope(options):
        top = head(submodel.dimensions, classes, head_settings, derive_seed(options.seed, "head"))
        whole = classifier(submodel.encoder(), top)
    fitted = keras.Model(top.inputs, {"logits": top.output}) if submodel.frozen else whole
    history = _fit_logits(fitted, fitting, held, settings, options)
    return TrainedClassifier(whole, history)


def _embeddings(submodel: Submodel, part: Examples, cache_dir: Path, options: RunOptions) -> Features:
    total = len(set(part.values)) if submodel.modality == "text" else len(part.values)
    with progress(f"embed {options.directory.name}", total, "values", quiet=options.quiet) as bar:
        return {"embedding": embed(submodel, part.values, cache_dir, progress=reached(bar, total))}


def _fit_logits(
    model: keras.Model,
    train: _Prepared,
    validation: _Prepared | None,
    settings: ClassifierTraining,
    options: RunOptions,
) -> History:
    """Fits a model with the output `logits`."""

    def logits_of(inputs: Mapping[str, tf.Tensor], training: bool) -> tf.Tensor:
        return model({name: inputs[name] for name in train.features}, training=training)["logits"]

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        return cross_entropy(batch[_LABEL], logits_of(batch, True), settings.label_smoothing)

    score = tf.function(lambda inputs: logits_of(inputs, False), reduce_retracing=True)

    def validate(validation: _Prepared) -> dict[str, float]:
        return classification_metrics(in_batches(score, validation.features, settings.batch_size), validation.labels)

    return fit(
        model,
        loss,
        {**train.features, _LABEL: np.asarray(train.labels, np.int32)},
        settings,
        options,
        (lambda: validate(validation)) if validation is not None else None,
        settings.monitor,
        higher_is_better=settings.monitor == "accuracy",
    )


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor, smoothing: float = 0.0) -> tf.Tensor:
    """Softmax cross-entropy of each example, from logits [b, C] and class numbers [b] -> float32 [b].

    The target is (1 - s) for the label plus s / C for every class (Szegedy et al. 2016, arXiv:1512.00567).
    """
    logits = tf.cast(logits, tf.float32)
    if smoothing == 0:
        return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    classes = logits.shape[-1]
    target = tf.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes
    return tf.nn.softmax_cross_entropy_with_logits(target, logits)


def in_batches(score: Any, features: Features, batch_size: int) -> np.ndarray:
    """Applies `score` (named tensors [b, ...] -> [b, C]) batch by batch -> [N, C]; never copies all features."""
    n = len(next(iter(features.values())))
    parts = [
        score({name: tf.convert_to_tensor(array[start : start + batch_size]) for name, array in features.items()})
        for start in range(0, n, batch_size)
    ]
    return np.concatenate([part.numpy() for part in parts])


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracy` (share of rows whose largest logit is the label's) and `log_loss` (mean, nats) of logits [N, C]."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    of_label = log_probabilities[np.arange(len(labels)), labels]
    return {"accuracy": float(np.mean(logits.argmax(axis=1) == labels)), "log_loss": float(-of_label.mean())}
