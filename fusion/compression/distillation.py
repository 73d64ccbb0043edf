"""Distillation: a small student learns what a large model, or a whole ensemble, says of the training rows.

Hinton et al. 2015, arXiv:1503.02531. The teacher answers once; what is needed only to learn (projections of hidden
layers, the discriminator) is dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from fusion.compat import keras, tf
from fusion.compression.base import (
    Applied,
    Compressed,
    CompressionData,
    FineTuned,
    Method,
    answer_of,
    clone,
    inputs_of,
)
from fusion.compression.students import STUDENTS
from fusion.config import part_of
from fusion.errors import ConfigError, DataError
from fusion.initializers import initializer
from fusion.registry import nearest
from fusion.training.batches import Rows
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import Features, derive_seed

layers = keras.layers

TEACHER = "teacher_answer"
"""Name of the teacher's answer among the arrays of a batch."""

SILENT = 1e30
"""A teacher's score beyond ±1e30, or NaN, is none: that candidate is left out of the list."""

DISCRIMINATOR = (64, 64)
"""Units of the hidden layers that tell teacher's from student's answers."""

TINY = 1e-12
"""Keeps a hint that is zero everywhere from being divided by."""

BATCH = 64
"""Rows that the teacher answers together."""

TOLD_ROWS = 1024
"""Training rows that the facts about losses are of."""

Batch = Mapping[str, tf.Tensor]


class Distillation(Method):
    """Puts a small network in the model's place, taught by the model or by `data.teacher`.

    A student minimises weight × L(teacher) + (1 − weight) × loss of the task + the terms whose weights are above 0.
    """

    class Config(FineTuned):
        """Settings of distillation."""

        student: part_of(STUDENTS)  # type: ignore[valid-type]
        """The small network: bag_of_tokens, bert, cnn, dense or inverted_residual, with its settings."""
        loss: Literal["softened", "listwise", "cosine", "mse"] = "softened"
        """What brings the student's answer near the teacher's. softened: divergence of probabilities, for classes;
        listwise: cross-entropy over a list of scores, for candidates; cosine, mse: of vectors."""
        temperature: float = Field(4.0, gt=0, le=100)
        """What logits are divided by before the softmax (listwise: the teacher's scores); large ones tell more of the
        classes that are not the first."""
        weight: float = Field(0.9, ge=0, le=1)
        """Share of the teacher's term; the rest is that of the task's own loss, of the labels."""
        similarity: float = Field(0.0, ge=0)
        """Weight of the term that compares rows of a batch: cosines between students' answers with those between the
        teacher's."""
        features: dict[str, str] = Field({}, max_length=16)
        """Hidden layers of the model, each with the student's layer that learns it: {block1_relu: block1_relu}."""
        feature_weight: float = Field(1.0, gt=0)
        """Weight of the term of hidden layers."""
        adversarial: float = Field(0.0, ge=0, le=10)
        """Weight with which the student deceives a discriminator that tells the teacher's answers from its own."""
        training: TrainingSettings = TrainingSettings(epochs=30, batch_size=64, learning_rate=0.002)
        """The training loop, over the rows that the member was trained on."""

        @pydantic.model_validator(mode="after")
        def _a_teacher_is_heard(self) -> Distillation.Config:
            if not (self.weight or self.similarity or self.features or self.adversarial):
                raise ValueError("with weight 0 a student must learn from similarity, features or adversarial; none is")
            if self.temperature != 4.0 and self.loss in ("cosine", "mse"):
                raise ValueError(f"the key temperature must go with loss softened or listwise; received {self.loss}")
            return self

    config: Distillation.Config

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """The student in the model's place.

        Raises:
            ConfigError: the student is not smaller than the model, cannot read what it reads, or `features` names what
                one of them does not have.
            DataError: `data.teacher` is not of the training rows, or not finite where it has to be.
        """
        seed = data.options.seed
        student = self.config.student.make(derive_seed(seed, "student")).build(subject.model, data.representative)
        counts = {"teacher": subject.model.count_params(), "student": student.count_params()}
        if counts["student"] >= counts["teacher"]:
            raise ConfigError(
                f"a student must have fewer parameters than the model that it replaces; it has {counts['student']:,}, "
                f"the model {counts['teacher']:,}. Make it narrower."
            )
        rows = _with_answers(data.rows, self._teacher(subject.model, data))
        lesson = Lesson(self.config, subject.model, student, data.loss, derive_seed(seed, "lesson"))
        fit(lesson.model, lesson.loss, rows, self.config.training, data.options, None)
        facts = {"parameters": counts, "losses": lesson.ended_at(rows, self.config.training.batch_size)}
        return replace(subject, model=student, coded_bytes=None), Applied(facts=facts)

    def _teacher(self, model: keras.Model, data: CompressionData) -> np.ndarray:
        """What the student is to say of the training rows, float32 `[n, C]`."""
        shape = (data.rows.n, model.output.shape[-1])
        if data.teacher is None:
            answers = _answers(model, data.rows)
        else:
            answers = np.asarray(data.teacher, np.float32)
        if answers.shape != shape:
            raise DataError(
                f"a teacher must answer each training row as the model does, {list(shape)}; received "
                f"{list(answers.shape)}."
            )
        wrong = ~np.isfinite(answers).all(axis=1)
        gaps = self.config.loss == "listwise" and not (self.config.similarity or self.config.adversarial)
        if wrong.any() and not gaps:
            raise DataError(
                f"a teacher's answers must be finite; those of {wrong.sum()} rows are not, the first is row "
                f"{wrong.argmax()}. Leave such rows out; loss: listwise alone takes lists with gaps."
            )
        return answers


def _answers(model: keras.Model, rows: Rows) -> np.ndarray:
    """What the model says of all rows; those of similar length run together."""
    order = np.arange(rows.n) if rows.lengths is None else np.argsort(rows.lengths, kind="stable")
    answer, result = answer_of(model, BATCH), np.empty((rows.n, model.output.shape[-1]), np.float32)
    for start in range(0, rows.n, BATCH):
        numbers = order[start : start + BATCH]
        result[numbers] = answer(inputs_of(model, rows.gather(numbers)))
    return result


def _with_answers(rows: Rows, answers: np.ndarray) -> Rows:
    def gather(numbers: np.ndarray) -> Features:
        return {**rows.gather(numbers), TEACHER: answers[numbers]}

    return rows._replace(gather=gather)


# ---- what is minimised ---------------------------------------------------------------------------------------


class Lesson:
    """The student with all that it is taught by.

    Attributes:
        model: holds every weight that is trained: the student's, the projections', the discriminator's.
    """

    def __init__(
        self,
        config: Distillation.Config,
        teacher: keras.Model,
        student: keras.Model,
        task: Callable[[tf.Tensor, Batch], tf.Tensor],
        seed: int,
    ) -> None:
        self._config, self._task = config, task
        copy = clone(teacher) if config.features else teacher  # of a copy each layer is called once, and has one output
        hints = {name: _output_of(copy, name, "model") for name in config.features}
        guided = {name: _output_of(student, learner, "student") for name, learner in config.features.items()}
        projected = {name: _projection(name, hints[name], guided[name], seed) for name in hints}
        self._hints = keras.Model(copy.inputs, hints) if hints else None
        self._student = keras.Model(student.inputs, {TEACHER: student.output, **projected})
        self._critic = _discriminator(student.output.shape[-1], seed) if config.adversarial else None
        self.model = self._student
        if self._critic is not None:  # two graphs that do not touch: the model is there to hold their weights
            both = {**self._student.output, "verdict": self._critic.output}
            self.model = keras.Model([*student.inputs, *self._critic.inputs], both)

    def loss(self, batch: Batch) -> tf.Tensor:
        """What the optimizer minimises, `[b]`."""
        terms = self.terms(batch, training=True)
        weights = {"teacher": self._config.weight, "task": 1 - self._config.weight, "discriminator": 1.0}
        weights |= {"similarity": self._config.similarity, "features": self._config.feature_weight}
        # Stacked: TensorFlow's sum of three tensors or more depends on which of them is ready first.
        return tf.reduce_sum(tf.stack([weights[name] * term for name, term in terms.items()]), axis=0)

    def terms(self, batch: Batch, training: bool) -> dict[str, tf.Tensor]:
        """Each term that has a weight, unweighted, by name: float32 `[b]`."""
        config, truth = self._config, batch[TEACHER]
        outputs = self._student(inputs_of(self._student, batch), training=training)
        answer = outputs.pop(TEACHER)
        # A copy for each term, for the reason above: the gradient is then one sum over an axis.
        one, two, three, four = tf.unstack(tf.tile(answer[tf.newaxis], [4, 1, 1]))
        terms = {}
        if config.weight > 0:
            terms["teacher"] = _LOSSES[config.loss](one, truth, config.temperature)
        if config.weight < 1:
            terms["task"] = self._task(two, batch)
        if config.similarity:
            terms["similarity"] = similarity(three, truth)
        if self._hints is not None:
            hints = self._hints(inputs_of(self._hints, batch), training=False)
            found = [unlike(outputs[name], hints[name], batch.get("attention_mask")) for name in hints]
            terms["features"] = tf.reduce_mean(tf.stack(found), axis=0)
        if self._critic is not None:
            terms["discriminator"] = self._told_apart(four, truth, training)
        return terms

    def ended_at(self, rows: Rows, batch_size: int) -> dict[str, float]:
        """The mean of each term, unweighted and without dropout, over some of the training rows."""
        look = tf.function(lambda batch: self.terms(batch, training=False), reduce_retracing=True)
        count = min(rows.n, max(TOLD_ROWS // batch_size, 1) * batch_size)
        numbers = np.linspace(0, rows.n - 1, count).astype(np.int64)
        found: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(numbers), batch_size):
            batch = rows.gather(numbers[start : start + batch_size])
            for name, term in look({key: tf.constant(array) for key, array in batch.items()}).items():
                found.setdefault(name, []).append(term.numpy())
        return {name: float(np.concatenate(parts).mean()) for name, parts in found.items()}

    def _told_apart(self, answer: tf.Tensor, truth: tf.Tensor, training: bool) -> tf.Tensor:
        """How badly the discriminator tells whose answers these are, `[b]`; log 2 where it cannot. What makes it
        better makes the student's weights move the other way (Xu et al. 2018, arXiv:1709.00513; the reversal of the
        gradient is that of Ganin and Lempitsky 2015, arXiv:1409.7495)."""
        assert self._critic is not None
        if self._config.loss in ("softened", "listwise"):  # to which adding a constant to all logits is no change
            answer, truth = (tf.nn.log_softmax(x / self._config.temperature) for x in (answer, truth))
        own = self._critic(reversed_gradient(answer, self._config.adversarial), training=training)[:, 0]
        teachers = self._critic(truth, training=training)[:, 0]
        return 0.5 * (tf.nn.softplus(own) + tf.nn.softplus(-teachers))


def softened(answer: tf.Tensor, truth: tf.Tensor, temperature: float) -> tf.Tensor:
    """T² KL(softmax(truth / T) ‖ softmax(answer / T)) of logits `[b, C]` -> `[b]` (Hinton et al. 2015, section 2.1: T²
    keeps the size of its gradient beside that of the labels)."""
    target = tf.nn.softmax(truth / temperature)
    gap = tf.nn.log_softmax(truth / temperature) - tf.nn.log_softmax(answer / temperature)
    return temperature**2 * tf.reduce_sum(target * gap, axis=-1)


def listwise(answer: tf.Tensor, truth: tf.Tensor, temperature: float) -> tf.Tensor:
    """Cross-entropy of softmax(answer) under softmax(truth / T), scores `[b, C]` -> `[b]`: ListNet (Cao et al. 2007,
    top-one probabilities). Candidates on which the teacher is silent are not of the list; T says how much its first
    ones count."""
    heard = tf.abs(truth) <= SILENT
    target = tf.nn.softmax(tf.where(heard, truth / temperature, -SILENT))
    logs = tf.nn.log_softmax(tf.where(heard, answer, -SILENT))
    return -tf.reduce_sum(tf.where(heard, target * logs, 0.0), axis=-1)


def cosine(answer: tf.Tensor, truth: tf.Tensor, temperature: float) -> tf.Tensor:
    """1 − cosine of vectors `[b, D]` -> `[b]`."""
    return 1.0 - tf.reduce_sum(tf.nn.l2_normalize(answer, -1) * tf.nn.l2_normalize(truth, -1), axis=-1)


def mse(answer: tf.Tensor, truth: tf.Tensor, temperature: float) -> tf.Tensor:
    """Mean squared difference of vectors `[b, D]` -> `[b]`."""
    return tf.reduce_mean(tf.math.squared_difference(answer, truth), axis=-1)


_LOSSES = {"softened": softened, "listwise": listwise, "cosine": cosine, "mse": mse}


def similarity(answer: tf.Tensor, truth: tf.Tensor) -> tf.Tensor:
    """Mean squared difference between the cosines that a row has with the rows of its batch, among students' and among
    teacher's vectors `[b, D]` -> `[b]` (Park et al. 2019, arXiv:1904.05068, with cosines for distances)."""
    own, teachers = (tf.nn.l2_normalize(x, -1) for x in (answer, truth))
    gap = tf.matmul(own, own, transpose_b=True) - tf.matmul(teachers, teachers, transpose_b=True)
    return tf.reduce_mean(tf.square(gap), axis=-1)


def unlike(projected: tf.Tensor, hint: tf.Tensor, mask: tf.Tensor | None) -> tf.Tensor:
    """Squared error of a student's projected layer, as a share of the mean square of the teacher's: `[b]` (the hint
    loss of FitNets, Romero et al. 2015, arXiv:1412.6550, eq. 3, made independent of the layer's scale).

    Args:
        projected, hint: `[b, D]`, `[b, L, D]`, or `[b, H, W, D]`; the teacher's maps take the student's sides.
        mask: `[b, L]`, 1 for the tokens of `[b, L, D]` that count.
    """
    if len(hint.shape) == 4 and hint.shape[1:3] != projected.shape[1:3]:
        hint = tf.image.resize(hint, projected.shape[1:3], antialias=True)
    error = tf.reduce_mean(tf.math.squared_difference(projected, hint), axis=-1)
    scale = tf.reduce_mean(tf.square(hint), axis=-1)
    if len(hint.shape) == 3 and mask is not None:
        error, scale = (x * tf.cast(mask, x.dtype) for x in (error, scale))
    places = list(range(1, len(error.shape)))
    return tf.reduce_sum(error, places) / tf.maximum(tf.reduce_mean(tf.reduce_sum(scale, places)), TINY)


def reversed_gradient(x: tf.Tensor, scale: float) -> tf.Tensor:
    """`x`; its gradient comes back with the other sign, times `scale`."""

    @tf.custom_gradient
    def reverse(x: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        return tf.identity(x), lambda upstream: -scale * upstream

    return reverse(x)


# ---- what is dropped afterwards ------------------------------------------------------------------------------


def _output_of(model: keras.Model, name: str, whose: str) -> Any:
    known = [layer.name for layer in model.layers if not isinstance(layer, layers.InputLayer)]
    if name not in known:
        raise ConfigError(f"features must name layers of the {whose}; received '{name}': {nearest(name, known)}")
    return model.get_layer(name).output


def _projection(name: str, hint: Any, guided: Any, seed: int) -> Any:
    """The student's layer with as many channels as the teacher's, by a linear map at each place."""
    if len(hint.shape) != len(guided.shape):
        raise ConfigError(
            f"features must pair layers with as many axes; '{name}' is {list(hint.shape)}, and the student's "
            f"'{guided.node.layer.name}' is {list(guided.shape)}. Name another layer."
        )
    start = initializer("glorot_uniform", derive_seed(seed, "projection", name))
    return layers.Dense(hint.shape[-1], kernel_initializer=start, name=f"{name}_projection")(guided)


def _discriminator(width: int, seed: int) -> keras.Model:
    """Answers `[B, width]` -> a logit `[B, 1]`, high for the teacher's."""
    x = answers = layers.Input((width,), name=TEACHER)
    for number, units in enumerate(DISCRIMINATOR):
        start = initializer("he_normal", derive_seed(seed, "discriminator", number))
        x = layers.Dense(units, "relu", kernel_initializer=start, name=f"discriminator{number}")(x)
    start = initializer("glorot_uniform", derive_seed(seed, "discriminator"))
    return keras.Model(answers, layers.Dense(1, kernel_initializer=start, name="verdict")(x), name="discriminator")
