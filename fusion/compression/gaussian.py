"""Gaussian constraint: a prior that draws weights to zero while they are trained, then a threshold.

The prior of each weight is a Gaussian of mean zero: minus the logarithm of its density is w² / 2σ² and a constant, so
that the most probable weights are those of the loss plus a quadratic (L2) penalty (Bishop 2006, section 3.3). Bayes has
the penalty divided by the number of rows, beside the mean loss of a row. Here it is divided by the number of weights:
networks have thousands of weights for each row, whose penalties together would leave nothing of the loss. So the prior
has the form that Bayes gives it but not the weight, which is that of a prior of deviation σ · √(weights / rows).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace

import numpy as np
from pydantic import Field

from fusion.compat import keras, tf
from fusion.compression.base import Applied, Compressed, CompressionData, FineTuned, LayerPatterns, Method, clone
from fusion.compression.masks import fine_tune_sparse, kernels_of, layers_to_prune, repaired, sparsity_facts
from fusion.errors import GateError
from fusion.training.trainer import TrainingSettings


class Gaussian(Method):
    """Trains under a Gaussian prior over kernels, then makes zero what is small beside the rest of its kernel."""

    class Config(FineTuned):
        """Settings of the prior and the threshold."""

        deviation: float = Field(1.0, gt=0, allow_inf_nan=False)
        """σ, the standard deviation of the prior, in root mean squares of each kernel as it is at first: smaller ones
        draw weights to zero more strongly. What is added to the loss begins at 1 / 2σ²."""
        threshold: float = Field(0.5, gt=0, le=10)
        """Weights become zero whose absolute value is below this many times the root mean square of their kernel."""
        layers: LayerPatterns = ()
        """Layers to constrain, or patterns of them; none stands for all."""
        repair: TrainingSettings | None = TrainingSettings(epochs=3, batch_size=64, learning_rate=0.0005)
        """The training loop after the threshold, with zeros kept and without the prior; null does without, and leaves a
        model that lost two weights of five at once."""

    config: Config

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """Zeros below the threshold; facts compare their share with that of weights that are themselves Gaussian."""
        chosen, alone = layers_to_prune(subject.model, self.config.layers)
        names = [layer.name for layer in chosen]
        model = clone(subject.model)
        sizes_before = _root_mean_squares(model, names)
        kernels = kernels_of(model, names)
        weights = sum(int(np.prod(kernel.shape)) for kernel in kernels.values())

        def penalty() -> tf.Tensor:
            # l2_loss is half the sum of squares.
            parts = [
                tf.nn.l2_loss(kernel) / (self.config.deviation * sizes_before[name]) ** 2
                for name, kernel in kernels.items()
            ]
            return tf.reduce_sum(tf.stack(parts)) / weights

        fine_tune_sparse(model, data, self.config.training, penalty)
        sizes = _root_mean_squares(model, names)
        for name, kernel in kernels.items():
            kernel.assign(tf.where(tf.abs(kernel) < self.config.threshold * sizes[name], 0.0, kernel))
        facts = {
            **sparsity_facts(model, names),
            "sparsity_of_a_gaussian": math.erf(self.config.threshold / math.sqrt(2)),
            "root_mean_square_before": sizes_before,
            "root_mean_square": sizes,
        }
        if facts["sparsity"] == 0:
            raise GateError(
                f"a weight must be below {self.config.threshold:g} times the root mean square of its kernel; none is. "
                "Raise threshold."
            )
        return replace(subject, model=repaired(model, data, self.config.repair)), Applied(alone, facts)


def _root_mean_squares(model: keras.Model, names: Collection[str]) -> dict[str, float]:
    kernels = kernels_of(model, names)
    return {name: float(np.sqrt(np.mean(np.square(kernel.numpy())))) for name, kernel in kernels.items()}
