"""Averages of the weights over the steps of one training run, which are validated, kept and exported in their place.

`ema` is the exponential moving average of the weights after each step, with its bias towards the start corrected
(Kingma & Ba 2015, arXiv:1412.6980, section 7.2); `swa` is their plain mean over the last part of the run (Polyak &
Juditsky 1992; Izmailov et al. 2018, arXiv:1803.05407, with one model a step instead of one an epoch). With w_t the
weights after step t, and n the steps that the average has seen:

    a_t = (1 - s_n) a_(t-1) + s_n w_t        ema: s_n = (1 - d) / (1 - d^n)        swa: s_n = 1 / n

BatchNormalization has no statistics of weights that no step was taken with. They are estimated anew from training rows
with the averages in place (Izmailov et al., section 3.2), before anything is judged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pydantic
from pydantic import Field

from fusion.compat import keras, tf
from fusion.config import Settings

STATISTICS_ROWS = 4096
"""Training rows, drawn at random, that statistics are estimated from: more change little (Wu & Johnson 2021,
arXiv:2105.07576, section 3)."""

# The key that only one kind reads; another kind that is given it is refused instead of ignoring it.
_KIND_OF_KEY = {"decay": "ema", "start": "swa"}


class AverageSettings(Settings):
    """Which average of the weights is validated, kept and exported."""

    kind: Literal["none", "ema", "swa"] = "none"
    """ema: moving average over all steps, the latest weigh most; swa: plain mean over the steps from `start` on, for a
    learning rate that stays high; none: the weights themselves."""
    decay: float = Field(default=0.999, ge=0, lt=1)
    """What a step counts, relative to the one after it (ema); it remembers about 1 / (1 - decay) steps."""
    start: float = Field(default=0.75, ge=0, lt=1)
    """Share of the steps of all epochs that are done before the mean begins (swa); no earlier epoch is kept."""

    @pydantic.model_validator(mode="after")
    def _no_key_of_another_kind(self) -> AverageSettings:
        for key, kind in _KIND_OF_KEY.items():
            # Defaults pass, so that a resolved config, which spells out every key, can be read again.
            if self.kind != kind and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"the key {key} must go with kind {kind}; received kind {self.kind}")
        return self


class WeightAverage(tf.Module):
    """The average of some variables over the steps of a run. Make it in the scope of the strategy.

    Everything that changes is tracked, so a checkpoint that holds this holds all.

    Args:
        settings: ema or swa.
        weights: the variables that steps change.
        steps: steps of the whole training.
    """

    def __init__(self, settings: AverageSettings, weights: Sequence[tf.Variable], steps: int) -> None:
        super().__init__(name="average")
        self._settings, self._weights = settings, list(weights)
        self._start = int(settings.start * steps) if settings.kind == "swa" else 0
        self._step = tf.Variable(0, dtype=tf.int64, trainable=False, name="step")
        self._averages = [tf.Variable(weight.numpy(), trainable=False) for weight in weights]

    def begun(self, step: int) -> bool:
        """Whether there is an average after so many steps."""
        return step > self._start

    def update(self, strategy: Any) -> None:
        """Takes in the weights after a step. Called in the graph of the loop, outside of the replicas."""
        self._step.assign_add(1)
        share = tf.cast(self._share(), tf.float32)

        def mix(average: tf.Variable, weight: tf.Tensor, share: tf.Tensor) -> tf.Operation:
            # At share 1 this is the weight itself, to the bit.
            return average.assign((1.0 - share) * average + share * weight)

        for average, weight in zip(self._averages, self._weights, strict=True):
            strategy.extended.update(average, mix, args=(weight, share))  # each device its own copy

    def _share(self) -> tf.Tensor:
        """What the newest weights count, float64; 1 before the mean begins, so that it follows the weights."""
        seen = tf.cast(tf.maximum(self._step - self._start, 1), tf.float64)
        if self._settings.kind == "swa":
            return 1.0 / seen
        decay = tf.constant(self._settings.decay, tf.float64)
        return (1.0 - decay) / (1.0 - tf.pow(decay, seen))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The averages stand in the variables while the context lasts."""
        kept = [weight.numpy() for weight in self._weights]
        _assign(self._weights, [average.numpy() for average in self._averages])
        try:
            yield
        finally:
            _assign(self._weights, kept)


def _assign(variables: Sequence[tf.Variable], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def normalizations(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    """The BatchNormalization layers that training changes; frozen ones keep their statistics."""
    layers = [part for part in model.submodules if isinstance(part, keras.layers.BatchNormalization)]
    return [layer for layer in layers if layer.trainable]


@contextlib.contextmanager
def latest_statistics(layers: Sequence[keras.layers.BatchNormalization]) -> Iterator[None]:
    """Programs that are traced within leave the statistics of the latest batch alone, instead of a moving average."""
    before = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, before, strict=True):
            layer.momentum = momentum


def statistics_of(layers: Sequence[keras.layers.BatchNormalization]) -> list[tf.Variable]:
    """Mean and variance of each layer in turn."""
    return [variable for layer in layers for variable in (layer.moving_mean, layer.moving_variance)]


def set_statistics(layers: Sequence[keras.layers.BatchNormalization], found: Sequence[np.ndarray]) -> None:
    """Gives each layer the mean and variance of all rows, out of those of batches of one size: as `statistics_of`, each
    `[batches, ...]`.

    The variance of all is the mean of the variances and the variance of the means.
    """
    for layer, means, variances in zip(layers, found[::2], found[1::2], strict=True):
        means, variances = means.astype(np.float64), variances.astype(np.float64)
        layer.moving_mean.assign(means.mean(axis=0).astype(np.float32))
        layer.moving_variance.assign((variances.mean(axis=0) + means.var(axis=0)).astype(np.float32))
