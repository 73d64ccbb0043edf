"""What every compression method promises: a model in, a smaller one out, and what was left alone and why.

A model is a flat functional Keras model with named inputs and one output: the logits of a classifier, or the embedding
of an encoder. A method never changes the model that it is given.
"""

from __future__ import annotations

import abc
import fnmatch
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic
from pydantic import Field

from fusion.compat import keras, tf
from fusion.config import Part, Settings, content_hash
from fusion.errors import ConfigError, DataError
from fusion.export.tflite import Conversion
from fusion.registry import nearest
from fusion.training.batches import Rows
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import Features, RunOptions, derive_seed

Answer = Callable[[Features], np.ndarray]
"""Whatever answers: named inputs, each with the leading axis n -> float32 `[n, C]` or `[n, D]`."""

LayerPatterns = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=256)]
"""Names of layers, or patterns of them such as `block1_*`; none stands for all that the method can work on."""

SMALL = 256
"""Kernels with fewer weights are left alone where nothing else is said: they cost more than they save."""


@dataclass(frozen=True)
class CompressionData:
    """What a model is compressed with. Rows are of the training part; only `judge` sees the validation part.

    Attributes:
        rows: training rows: the model's inputs by name, and what `loss` reads beside them.
        loss: the model's output `[b, C]` and a batch of `rows` -> the loss of each example `[b]`.
        representative: the model's inputs of up to a few hundred training rows, of fixed shape; their ranges are those
            that integers are scaled to.
        judge: how good an answer is on the validation rows: one value a row (or a user) `[n]`, in their order, NaN
            where it is undefined.
        metric: what these values are, such as `accuracy` or `ndcg@10`; their mean is the quality.
        higher_is_better: which way the metric is good.
        options: seed, folder for checkpoints, quiet.
        teacher: what a better model says of `rows`, `[rows.n, C]` in their order, where students are to learn from
            another one than the model itself.
    """

    rows: Rows
    loss: Callable[[tf.Tensor, Mapping[str, tf.Tensor]], tf.Tensor]
    representative: Features
    judge: Callable[[Answer], np.ndarray]
    metric: str
    higher_is_better: bool
    options: RunOptions
    teacher: np.ndarray | None = None

    def for_step(self, number: int, part: Part, model: keras.Model) -> CompressionData:
        """The same for one step of a chain, with a seed and a folder of its own.

        The folder is named after settings and weights too: a training loop that finds its own end in a folder takes it.
        Its last part is what progress is shown under.
        """
        options = self.options
        weights = hashlib.sha256(b"".join(weight.tobytes() for weight in model.get_weights())).hexdigest()
        step = replace(
            options,
            seed=derive_seed(options.seed, "compression", number, part.kind),
            directory=options.directory / f"{number}_{content_hash([part.dump(), weights])[:16]}" / part.kind,
        )
        return replace(self, options=step)

    def quality(self, answer: Answer) -> float:
        """The mean of what `judge` gives."""
        return float(np.nanmean(self.judge(answer)))


@dataclass(frozen=True)
class Compressed:
    """A model on its way through a chain of methods.

    Attributes:
        model: the Keras model, in which what is simulated (fake quantisation) is simulated.
        conversion: how its `.tflite` is written.
        coded_bytes: what the weights need in a code of their own (indices into a codebook, Huffman's code), where a
            method made one; no runtime reads it, so it counts for storage and transport alone.
        huffman: whether that is counted with codes of unequal length; later steps count as the method did.
    """

    model: keras.Model
    conversion: Conversion = field(default_factory=Conversion)
    coded_bytes: int | None = None
    huffman: bool = False


@dataclass(frozen=True)
class Applied:
    """What a method did.

    Attributes:
        left_alone: by layer with weights, why it was not touched.
        facts: what there is to tell beside, ready for JSON: thresholds, errors, ratios.
    """

    left_alone: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Method(abc.ABC):
    """One way to make a model smaller; subclasses fill `apply`.

    Attributes:
        Config: the settings class.
    """

    Config: ClassVar[type[Settings]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abc.abstractmethod
    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """The model made smaller, and what was done; `subject` stays as it is.

        Raises:
            ConfigError: `layers` names what the model does not have.
            GateError: the model has nothing that the method could work on.
        """


class MethodSettings(Settings):
    """Settings of a method; the training loops among them do all epochs, because nothing is validated in a step."""

    @pydantic.field_validator("training", "repair", check_fields=False)
    @classmethod
    def _validates_nothing(cls, training: TrainingSettings | None) -> TrainingSettings | None:
        asked = {"patience": training.patience > 0, "target": training.target is not None} if training else {}
        idle = [name for name, there in asked.items() if there]
        if idle:
            raise ValueError(
                f"a step does all of its epochs, because none is validated; leave out {' and '.join(idle)}"
            )
        return training

    def set_among(self, *names: str) -> list[str]:
        """Those of these settings that differ from their default. What is dumped names all of them, and is read again,
        so that it does not count whether one was named."""
        return [name for name in names if getattr(self, name) != type(self).model_fields[name].default]


class FineTuned(MethodSettings):
    """Settings of methods that train."""

    training: TrainingSettings = TrainingSettings(epochs=3, batch_size=64, learning_rate=0.0005)
    """The training loop, over the rows that the member was trained on."""


def fine_tune(model: keras.Model, data: CompressionData, training: TrainingSettings) -> None:
    """Trains `model` in place for all epochs of `training`; nothing is validated, so that the last one is kept."""
    unfreeze(model)

    def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
        return data.loss(model(inputs_of(model, batch), training=True), batch)

    fit(model, loss, data.rows, training, data.options, None)


def unfreeze(model: keras.Model) -> None:
    """Has all of a model trained, also where the member was frozen: what was taken from a layer can be made up for by
    any other. Only a frozen BatchNormalization keeps its statistics."""
    kept = [x for x in model.layers if isinstance(x, keras.layers.BatchNormalization) and not x.trainable]
    model.trainable = True  # and with it every layer
    for layer in kept:
        layer.trainable = False


def inputs_of(model: keras.Model, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Those tensors of a batch that the model reads."""
    return {name: batch[name] for name in input_names(model)}


def input_names(model: keras.Model) -> list[str]:
    """Names of the inputs, in the order of the model."""
    return [tensor.name.split(":")[0] for tensor in model.inputs]


def clone(
    model: keras.Model, replaced: Callable[[keras.layers.Layer], keras.layers.Layer] | None = None
) -> keras.Model:
    """A copy with layers and weights of its own; `replaced` says which layer stands in the place of one."""
    copy = keras.models.clone_model(model, clone_function=replaced) if replaced else keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    return copy


def answer_of(model: keras.Model, batch_size: int = 64) -> Answer:
    """The model in inference mode as an `Answer`, in batches."""
    call = tf.function(lambda inputs: model(inputs, training=False), reduce_retracing=True)

    def answer(features: Features) -> np.ndarray:
        n = len(next(iter(features.values())))
        parts = [
            call({name: tf.constant(features[name][start : start + batch_size]) for name in input_names(model)}).numpy()
            for start in range(0, n, batch_size)
        ]
        return np.concatenate(parts)

    return answer


def kernel_of(layer: keras.layers.Layer) -> Any:
    """The variable that most of the weights of a layer are in, a kernel or a table of embeddings; None without one."""
    for name in ("kernel", "depthwise_kernel", "embeddings"):
        variable = getattr(layer, name, None)
        if variable is not None and hasattr(variable, "shape"):
            return variable
    return None


def chosen_layers(
    model: keras.Model,
    patterns: Sequence[str],
    able: Callable[[keras.layers.Layer], str | None] = lambda layer: None,
    smallest: int = SMALL,
) -> tuple[list[keras.layers.Layer], dict[str, str]]:
    """The layers with a kernel that a method is to work on, and why the others with weights are left alone.

    Args:
        model: whose layers they are.
        patterns: names of layers or patterns of them; none stands for all.
        able: why the method cannot work on a layer with a kernel; None where it can.
        smallest: kernels with fewer weights are left alone.

    Raises:
        ConfigError: a pattern fits no layer with a kernel.
    """
    weighted = [layer for layer in model.layers if layer.weights]
    names = [layer.name for layer in weighted if kernel_of(layer) is not None]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"layers must name layers of the model that have a kernel; received '{pattern}': "
                f"{nearest(pattern, names)}"
            )
    chosen, alone = [], {}
    for layer in weighted:
        reason = _why_not(layer, patterns, able, smallest)
        if reason is None:
            chosen.append(layer)
        else:
            alone[layer.name] = reason
    return chosen, alone


def _why_not(
    layer: keras.layers.Layer, patterns: Sequence[str], able: Callable[[keras.layers.Layer], str | None], smallest: int
) -> str | None:
    kernel = kernel_of(layer)
    if kernel is None:
        return "has no kernel"
    if patterns and not any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns):
        return "not among the layers that were asked for"
    if int(np.prod(kernel.shape)) < smallest:
        return f"has only {int(np.prod(kernel.shape))} weights"
    return able(layer)


def check_representative(features: Features) -> None:
    """Raises DataError for a representative set without rows, or with a number that is not finite."""
    if not features or min(map(len, features.values())) == 0:
        raise DataError("the representative set must hold training rows to read ranges from; it is empty.")
    for name, array in features.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            row = int(np.argwhere(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0, 0])
            raise DataError(
                f"the representative set must hold finite numbers; input '{name}' has NaN or infinity in row {row}. "
                "Leave such rows out."
            )


def told(alone: Mapping[str, str]) -> str:
    """Why layers were left alone, the first five of them, for a sentence."""
    return "; ".join(f"{name} {reason}" for name, reason in list(alone.items())[:5])
