"""Trains one classification member by itself: its head on stored embeddings, or encoder and head end to end.

Which of the two is decided by the submodel: what is frozen of an encoder gives the same numbers in every epoch, so it
runs once over the data. Fusing members is not done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fusion.activations import activations
from fusion.augmentation import Augmentation
from fusion.compat import keras, tf
from fusion.embeddings import embed, take
from fusion.errors import DataError
from fusion.progress import progress, reached
from fusion.submodels.base import Pretrained, Submodel, has_trunk
from fusion.submodels.head import HeadSettings, classifier, head
from fusion.submodels.warm_start import WarmStart
from fusion.training.batches import Rows, as_rows
from fusion.training.optimizers import Group, OptimizerSettings
from fusion.training.strategy import scope
from fusion.training.trainer import LoopSettings, TrainingSettings, fit
from fusion.training.unfreezing import joining_epochs
from fusion.types import Features, History, RunOptions, derive_seed

_LABEL = "label"


class ClassifierLoop(LoopSettings):
    """How the training loop of classifiers runs."""

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target probability that is spread evenly over all classes."""
    monitor: Literal["accuracy", "log_loss"] = "accuracy"
    """The validation metric that decides on the best epoch, patience and target."""


class ClassifierTraining(ClassifierLoop, TrainingSettings):
    """How a classifier is fitted."""

    encoder_rate: float = Field(default=1.0, gt=0, le=1)
    """What the learning rate is multiplied by for the encoder: a pretrained one wants smaller steps than a new head."""
    layer_decay: float = Field(default=1.0, gt=0, le=1)
    """The same again for each block of a pretrained encoder below the last one (Howard and Ruder 2018)."""
    unfreeze: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(), max_length=64)
    """Gradual unfreezing: epochs of the head alone until the last block joins it, then until the block below joins, and
    so on; the last number repeats, so that [1] is one block an epoch. Empty: all that fine_tune names from the start.
    Blocks whose turn does not come within the epochs stay as they are."""


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
    """Examples whose values are inputs of the model that is trained."""

    rows: Rows
    labels: np.ndarray

    def with_labels(self) -> Rows:
        """The rows, each with its label."""
        labels = np.asarray(self.labels, np.int32)
        return self.rows._replace(gather=lambda numbers: {**self.rows.gather(numbers), _LABEL: labels[numbers]})


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
    augmentation: Augmentation | None = None,
    start: WarmStart | None = None,
) -> TrainedClassifier:
    """Fits head and, unless it is frozen, encoder of `submodel` with softmax cross-entropy.

    Without `validation` all epochs are done and the last one is kept. Embeddings of a frozen encoder, and what
    leaves the frozen part of another, are kept under `cache_dir`. Training values are varied as `augmentation` says.
    The head takes from `start` what fits; the encoder knows its own (`Submodel.start_from`).
    Raises DataError for labels that do not fit.
    """

    def prepared(part: Examples, name: str, varied: Augmentation | None = None) -> _Prepared:
        part.check(classes, name)
        return _Prepared(trained_rows(submodel, part.values, cache_dir, options, varied), part.labels)

    # What is frozen is not trained: its embeddings are those that will be served, in float32.
    with scope(options, "float32" if submodel.frozen else settings.precision):
        fitted, whole = new_classifier(submodel, classes, head_settings, options.seed, start)
    fitting = prepared(train, "training", augmentation)
    held = prepared(validation, "validation") if validation is not None else None
    history = _fit_logits(fitted, fitting, held, settings, options, groups_of(submodel, fitted, settings))
    return TrainedClassifier(whole, history)


def groups_of(submodel: Submodel, fitted: keras.Model, settings: ClassifierTraining) -> list[Group]:
    """The head and the trained blocks of the encoder, each with its learning rate and the epoch in which it joins; none
    where all are moved alike."""
    if submodel.frozen or (settings.encoder_rate == settings.layer_decay == 1 and not settings.unfreeze):
        return []
    optimizer = OptimizerSettings(**settings.model_dump(include=set(OptimizerSettings.model_fields)))
    blocks = submodel.blocks() if isinstance(submodel, Pretrained) else [submodel.encoder().layers]
    own = [[v for layer in block for v in layer.trainable_variables] for block in blocks]
    trained = [variables for variables in own if variables]
    joins = joining_epochs(settings.unfreeze or (0,), len(trained))
    groups = []
    for number, variables in enumerate(trained):
        depth = len(trained) - 1 - number
        rate = settings.encoder_rate * settings.layer_decay**depth
        groups.append(Group(f"block{number}", variables, optimizer, rate, joins[depth]))
    known = {id(variable) for variables in trained for variable in variables}
    head_variables = [variable for variable in fitted.trainable_variables if id(variable) not in known]
    return [Group("head", head_variables, optimizer), *groups]


def new_classifier(
    submodel: Submodel, classes: int, head_settings: HeadSettings, seed: int, start: WarmStart | None = None
) -> tuple[keras.Model, keras.Model]:
    """The part of a new classifier that training changes, from `trained_rows` to `logits`, and the whole of it.

    The head takes from `start` what fits.
    """
    top = head(submodel.dimensions, classes, head_settings, derive_seed(seed, "head"))
    if start is not None:
        start.give(top.layers)
    whole = classifier(submodel.encoder(), top)
    if submodel.frozen:
        return keras.Model(top.inputs, {"logits": top.output}), whole
    if has_trunk(submodel):
        return classifier(submodel.top(), top), whole
    return whole, whole


def trained_rows(
    submodel: Submodel, values: Any, cache_dir: Path, options: RunOptions, augmentation: Augmentation | None = None
) -> Rows:
    """The inputs of what training changes: embeddings, activations behind the frozen layers, or prepared values, these
    varied by `augmentation` each time that they are read."""
    if submodel.frozen:
        return as_rows({"embedding": _embeddings(submodel, values, cache_dir, options)})
    if has_trunk(submodel):
        kept = activations(submodel, values, cache_dir, options.directory.name, quiet=options.quiet)
        return Rows(len(kept), kept.gather, kept.lengths)
    features = submodel.prepare(values)

    def gather(numbers: np.ndarray) -> Features:
        return submodel.trim({name: array[numbers] for name, array in features.items()})

    vary = augmentation.of(submodel.modality) if augmentation else None
    if vary is None:
        return Rows(len(values), gather, submodel.lengths(features))

    def gather_varied(numbers: np.ndarray) -> Features:
        # Decided by seed and rows, which are others in each epoch, so that an interrupted run draws the same again.
        seed = derive_seed(options.order_seed, "augmentation")
        random = np.random.default_rng([seed, len(numbers), *numbers[:8].tolist()])
        varied: Any = vary.apply(take(values, numbers), random)
        return submodel.prepare(varied)

    return Rows(len(values), gather_varied, submodel.lengths(features))


def _embeddings(submodel: Submodel, values: Any, cache_dir: Path, options: RunOptions) -> np.ndarray:
    total = len(set(values)) if submodel.modality == "text" else len(values)
    with progress(f"embed {options.directory.name}", total, "values", quiet=options.quiet) as bar:
        return embed(submodel, values, cache_dir, progress=reached(bar, total))


def _fit_logits(
    model: keras.Model,
    train: _Prepared,
    validation: _Prepared | None,
    settings: ClassifierTraining,
    options: RunOptions,
    groups: Sequence[Group],
) -> History:
    """Fits a model with the output `logits`."""

    def logits_of(inputs: Mapping[str, tf.Tensor], training: bool) -> tf.Tensor:
        return model({name: inputs[name] for name in model.input_names}, training=training)["logits"]

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        return cross_entropy(batch[_LABEL], logits_of(batch, True), settings.label_smoothing)

    score = tf.function(lambda inputs: logits_of(inputs, False), reduce_retracing=True)

    def validate(validation: _Prepared) -> dict[str, float]:
        return classification_metrics(in_batches(score, validation.rows, settings.batch_size), validation.labels)

    return fit(
        model,
        loss,
        train.with_labels(),
        settings,
        options,
        (lambda: validate(validation)) if validation is not None else None,
        settings.monitor,
        higher_is_better=settings.monitor == "accuracy",
        groups=groups,
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


def in_batches(score: Any, data: Features | Rows, batch_size: int) -> np.ndarray:
    """Applies `score` (named tensors [b, ...] -> [b, C]) batch by batch -> [N, C]; rows of like length together."""
    rows = as_rows(data)
    order = np.arange(rows.n) if rows.lengths is None else np.argsort(rows.lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, rows.n, batch_size)]
    parts = [score({n: tf.convert_to_tensor(a) for n, a in rows.gather(batch).items()}).numpy() for batch in batches]
    result = np.empty((rows.n, *parts[0].shape[1:]), parts[0].dtype)
    result[order] = np.concatenate(parts)
    return result


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """`accuracy` (share of rows whose largest logit is the label's) and `log_loss` (mean, nats) of logits [N, C]."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    of_label = log_probabilities[np.arange(len(labels)), labels]
    return {"accuracy": float(np.mean(logits.argmax(axis=1) == labels)), "log_loss": float(-of_label.mean())}
