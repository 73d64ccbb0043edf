"""Pruning: weights that matter little become zero, while or before the others are trained to make up for it.

Masks are those of TFMOT's `prune_low_magnitude`. Zeros alone make nothing faster, and a file smaller only when it is
packed (gzip) or its format leaves them out; what a chain gains is measured, never assumed. A network as the latency
policy asks for it, with 90 % zeros in its 1×1 convolutions, took as long in LiteRT 2.3 on x86 as the dense one (1.17
against 1.21 ms), also in TFLite's sparse format, in which its file had 52 kB of 173.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from fusion.compat import keras, tf, tfmot
from fusion.compression.base import (
    Applied,
    Compressed,
    CompressionData,
    LayerPatterns,
    Method,
    MethodSettings,
    answer_of,
    clone,
    fine_tune,
    kernel_of,
)
from fusion.compression.masks import (
    Sparsity,
    kernels_of,
    layers_to_prune,
    random_mask,
    repaired,
    sparsity_facts,
    zeros_in,
)
from fusion.errors import GateError
from fusion.training.trainer import TrainingSettings
from fusion.types import derive_seed

layers = keras.layers

_UPDATES = 20
"""How often masks are chosen anew while sparsity rises: each choice sorts all weights."""

_PRUNABLE = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Embedding)

_Count = Annotated[int, Field(ge=1, le=4096)]


class Prune(Method):
    """Magnitude pruning (Zhu and Gupta 2017, arXiv:1710.01878), or random pruning as its baseline.

    Its facts hold what pruning at once without any training costs, by magnitude and by chance: the second is what
    any criterion has to beat.
    """

    class Config(MethodSettings):
        """Settings of pruning."""

        sparsity: Sparsity = 0.5
        """Share of the weights of the chosen layers that become zero."""
        schedule: Literal["polynomial", "constant"] = "polynomial"
        """Whether sparsity rises along a cubic polynomial, or is there from the first step."""
        ramp: float = Field(0.5, gt=0, le=1)
        """Share of the steps in which masks are chosen; in the rest they stay, and training repairs."""
        scope: Literal["local", "global"] = "local"
        """Whether each layer has a threshold of its own, or all of them one, so that layers with small weights lose
        more of them."""
        m_by_n: tuple[_Count, _Count] | None = None
        """[2, 4]: in each group of 4 consecutive input channels the 2 smallest weights become zero."""
        block: tuple[_Count, _Count] | None = None
        """[rows, columns] of blocks of a Dense kernel that become zero as a whole."""
        criterion: Literal["magnitude", "random"] = "magnitude"
        """random: as many zeros in each layer, anywhere, and before training begins; the baseline."""
        policy: Literal["all", "latency"] = "all"
        """latency: 1×1 convolutions only, in networks for which XNNPACK has sparse kernels; other ones are refused."""
        layers: LayerPatterns = ()
        """Layers to prune, or patterns of them; none stands for all that can be pruned."""
        training: TrainingSettings | None = TrainingSettings(epochs=3, batch_size=64, learning_rate=0.0005)
        """The training loop that masks are chosen in and that repairs; null prunes at once and leaves it there."""

        @pydantic.model_validator(mode="after")
        def _one_pattern(self) -> Prune.Config:
            if self.m_by_n and self.block:
                raise ValueError("m_by_n and block are two patterns of zeros, of which only one can be had")
            if self.m_by_n and not self.m_by_n[0] < self.m_by_n[1]:
                raise ValueError(f"m_by_n must be fewer zeros than weights, as in [2, 4]; received {list(self.m_by_n)}")
            fixed = self.set_among("schedule", "scope", "sparsity")
            if self.m_by_n and fixed:
                raise ValueError(f"m_by_n says how many zeros there are, and where; leave out {', '.join(fixed)}")
            if self.block and self.scope == "global":
                raise ValueError("scope: global compares single weights, which block does not; leave out one of them")
            return self

        @pydantic.model_validator(mode="after")
        def _rises_while_trained(self) -> Prune.Config:
            risen = self.set_among("schedule", "ramp")
            if risen and (self.training is None or self.criterion == "random"):
                why = "training: null" if self.training is None else "criterion: random"
                raise ValueError(f"with {why} all zeros are there at once; leave out {', '.join(risen)}")
            return self

    config: Config

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """Zeros in the kernels of the chosen layers, which are trained, frozen or not; wrappers are taken off."""
        if self.config.policy == "latency":
            _check_latency(subject.model)
        chosen, alone = layers_to_prune(subject.model, self.config.layers, self._unable)
        names = [layer.name for layer in chosen]
        at_once = self._pruned(subject.model, names, None, data)
        by_chance = _randomly(subject.model, at_once, names, data.options.seed)
        model = by_chance if self.config.criterion == "random" else at_once
        training = self.config.training
        if training is not None and self.config.criterion == "magnitude":
            model = self._pruned(subject.model, names, training, data)
        elif training is not None:
            model = repaired(by_chance, data, training)
        facts = {
            **sparsity_facts(model, names),
            "quality_without_training": {
                "magnitude": data.quality(answer_of(at_once)),
                "random": data.quality(answer_of(by_chance)),
            },
        }
        return replace(subject, model=model), Applied(alone, facts)

    def _unable(self, layer: keras.layers.Layer) -> str | None:
        config, shape = self.config, kernel_of(layer).shape
        if type(layer) not in _PRUNABLE:
            return f"is a {type(layer).__name__}, which TFMOT does not prune"
        if config.policy == "latency" and not (isinstance(layer, layers.Conv2D) and layer.kernel_size == (1, 1)):
            return "is no 1×1 convolution"
        if config.m_by_n and type(layer) not in (layers.Dense, layers.Conv2D):
            return "has no input channels to cut into groups"
        if config.block and (len(shape) != 2 or any(side < by for side, by in zip(shape, config.block, strict=True))):
            return f"has a kernel {list(shape)}, which is not to be cut into blocks {list(config.block)}"
        return None

    def _pruned(
        self, model: keras.Model, names: Collection[str], training: TrainingSettings | None, data: CompressionData
    ) -> keras.Model:
        """A copy with masked kernels: at once, or while it is trained."""
        schedule = self._schedule(0 if training is None else _forward_passes(training, data))
        copy, pruned = self._wrapped(model, names, schedule)
        for layer in pruned:
            layer.pruning_step.assign(0)  # Keras' callback does this where `fit` is Keras' own
        if training is not None:
            fine_tune(copy, data, training)
        else:
            for layer in pruned:
                layer.pruning_step.assign(1)
            for layer in pruned:
                layer.pruning_obj.conditional_mask_update()
        for layer in pruned:
            layer.pruning_obj.weight_mask_op()  # the last step has moved what is masked
        return stripped(copy)

    def _schedule(self, passes: int) -> Any:
        """TFMOT's schedule over the forward passes of training, which it counts from 1."""
        schedules, config = tfmot().sparsity.keras, self.config
        rising = int(config.ramp * passes)
        every = max(1, rising // _UPDATES)
        last = 1 + (rising - 1) // every * every  # masks are chosen every so often, and must be when it has risen
        if config.schedule == "constant" or last <= 1:
            return schedules.ConstantSparsity(config.sparsity, 1, max(1, last), every)
        return schedules.PolynomialDecay(0.0, config.sparsity, 1, last, frequency=every)

    def _wrapped(self, model: keras.Model, names: Collection[str], schedule: Any) -> tuple[keras.Model, list[Any]]:
        """A copy in which the named layers are wrapped, and the wrappers."""
        pruned: dict[str, Any] = {}
        threshold = _Threshold(schedule)

        def replaced(layer: keras.layers.Layer) -> keras.layers.Layer:
            new = type(layer).from_config(layer.get_config())
            if layer.name not in names:
                return new
            new.trainable = True
            pruned[layer.name] = tfmot().sparsity.keras.prune_low_magnitude(
                new,
                threshold.of(new) if self.config.scope == "global" else schedule,
                block_size=self.config.block or (1, 1),
                sparsity_m_by_n=self.config.m_by_n,
            )
            return pruned[layer.name]

        copy = keras.models.clone_model(model, clone_function=replaced)
        copied = {layer.name: layer for layer in copy.layers} | pruned
        for layer in model.layers:
            copied[layer.name].set_weights(layer.get_weights())
        return copy, list(pruned.values())


def stripped(wrapped: keras.Model) -> keras.Model:
    """A model without TFMOT's wrappers that answers as `wrapped` does."""
    # The layers within the wrappers are called for a second time there; those of a clone once.
    return clone(tfmot().sparsity.keras.strip_pruning(wrapped))


class _Threshold:
    """One threshold over all layers, as schedules that tell TFMOT the share of each layer's weights below it.

    TFMOT then zeroes that many of the smallest weights of the layer, which are those below the threshold.
    """

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule
        self._layers: list[keras.layers.Layer] = []
        self._value = tf.Variable(0.0, trainable=False)
        self._of_step = tf.Variable(-1, dtype=tf.int64, trainable=False)

    def of(self, layer: keras.layers.Layer) -> Any:
        """The schedule of a layer: pruning step -> whether masks are chosen in it, and the share of zeros."""
        self._layers.append(layer)

        def schedule(step: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            due, sparsity = self._schedule(step)
            # The first layer of a pass finds it for all of them: it takes to sort all weights.
            new = tf.logical_and(due, tf.not_equal(self._of_step, tf.cast(step, tf.int64)))
            tf.cond(new, lambda: self._find(step, sparsity), lambda: 0.0)
            return due, tf.reduce_mean(tf.cast(tf.abs(kernel_of(layer)) < self._value, tf.float32))

        return schedule

    def _find(self, step: tf.Tensor, sparsity: tf.Tensor) -> tf.Tensor:
        magnitudes = tf.concat([tf.reshape(tf.abs(kernel_of(layer)), [-1]) for layer in self._layers], 0)
        kept = tf.maximum(tf.round(tf.cast(tf.size(magnitudes), tf.float32) * (1.0 - sparsity)), 1.0)
        self._of_step.assign(tf.cast(step, tf.int64))
        return self._value.assign(tf.math.top_k(magnitudes, tf.cast(kept, tf.int32)).values[-1])


def _forward_passes(training: TrainingSettings, data: CompressionData) -> int:
    return math.ceil(data.rows.n / training.batch_size) * training.epochs * training.accumulate


def _randomly(model: keras.Model, like: keras.Model, names: Collection[str], seed: int) -> keras.Model:
    """A copy with as many zeros in each named kernel as that of `like` has, drawn evenly."""
    copy = clone(model)
    zeros = {name: zeros_in(kernel) for name, kernel in kernels_of(like, names).items()}
    for name, kernel in kernels_of(copy, names).items():
        random = np.random.default_rng(derive_seed(seed, "random pruning", name))
        kernel.assign(kernel * random_mask(kernel.shape, zeros[name], random))
    return copy


def _check_latency(model: keras.Model) -> None:
    """Raises GateError for a network which XNNPACK does not run on sparse weights."""
    try:
        tfmot().sparsity.keras.PruneForLatencyOnXNNPack().ensure_model_supports_pruning(model)
    except ValueError as error:
        raise GateError(
            "policy: latency needs a network from a 3×3 convolution of stride 2 behind ZeroPadding2D(1) to a "
            f"GlobalAveragePooling2D that keeps its dimensions; TFMOT says: {str(error).rstrip('.')}. Use policy: all."
        ) from error
