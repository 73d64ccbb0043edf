"""L0 regularisation: a random gate on each weight, and training that is paid for closing gates.

Louizos, Welling and Kingma 2018, arXiv:1712.01312: the number of weights that are not zero has no gradient, but its
expectation under gates of the *hard concrete* distribution has. Equation numbers are those of the paper.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pydantic import Field

from fusion.compat import keras, tf
from fusion.compression.base import (
    Applied,
    Compressed,
    CompressionData,
    FineTuned,
    LayerPatterns,
    Method,
    clone,
    inputs_of,
    kernel_of,
    unfreeze,
)
from fusion.compression.masks import kernels_of, layers_to_prune, sparsity_facts
from fusion.errors import GateError
from fusion.training.optimizers import Group
from fusion.training.trainer import TrainingSettings, fit
from fusion.types import derive_seed

TEMPERATURE = 2 / 3
"""β: how far a gate is from being open or closed."""

LOW, HIGH = -0.1, 1.1
"""γ and ζ: the interval that gates are stretched to before they are cut to [0, 1], so that 0 and 1 have a chance."""

OPEN, CLOSED = 2.5, -10.0
"""log α that training begins with: a gate that is 1 in inference, so that the model is at first what it was; and one so
far below the -2.4 at which inference takes 0 that no gradient comes through."""


class L0(Method):
    """Trains kernels and their gates, then multiplies the gates into the kernels; no layer is added."""

    class Config(FineTuned):
        """Settings of the gates."""

        penalty: float = Field(10.0, gt=0, allow_inf_nan=False)
        """λ: what the loss grows by for the expected share of open gates, from 0 to 1; larger ones leave less."""
        gate_learning_rate: float = Field(0.1, gt=0, le=1)
        """Learning rate of log α by Adam: a gate goes a way of about 5 to be closed."""
        layers: LayerPatterns = ()
        """Layers to put gates on, or patterns of them; none stands for all."""

    config: Config

    def apply(self, subject: Compressed, data: CompressionData) -> tuple[Compressed, Applied]:
        """Zeros where gates have closed. Raises GateError where none has."""
        chosen, alone = layers_to_prune(subject.model, self.config.layers)
        gated: dict[str, HardConcrete] = {}

        def replaced(layer: keras.layers.Layer) -> keras.layers.Layer:
            new = type(layer).from_config(layer.get_config())
            if all(layer is not one for one in chosen):
                return new
            new.trainable = True
            gated[layer.name] = HardConcrete(new, derive_seed(data.options.seed, "gates", layer.name))
            return gated[layer.name]

        model = keras.models.clone_model(subject.model, clone_function=replaced)
        inner = {layer.name: layer for layer in model.layers} | {name: gate.layer for name, gate in gated.items()}
        for layer in subject.model.layers:
            inner[layer.name].set_weights(layer.get_weights())
        for gate in gated.values():
            gate.close_zeros()
        self._train(model, list(gated.values()), data)

        result = clone(subject.model)
        for layer in result.layers:
            layer.set_weights(inner[layer.name].get_weights())
        for name, kernel in kernels_of(result, gated).items():
            kernel.assign(gated[name].gated_kernel())
        facts = {
            **sparsity_facts(result, gated),
            "expected_share_open": float(_share_open(list(gated.values()))),
        }
        if facts["sparsity"] == 0:
            raise GateError(
                f"training must close gates; none of them closed with penalty {self.config.penalty:g} in "
                f"{self.config.training.epochs} epochs. Raise penalty or gate_learning_rate, or train for longer."
            )
        return replace(subject, model=result), Applied(alone, facts)

    def _train(self, model: keras.Model, gates: list[HardConcrete], data: CompressionData) -> None:
        training, penalty = self.config.training, self.config.penalty
        unfreeze(model)

        def loss(batch: dict[str, tf.Tensor]) -> tf.Tensor:
            return data.loss(model(inputs_of(model, batch), training=True), batch) + penalty * _share_open(gates)

        of_gates = [gate.log_alpha for gate in gates]
        known = {id(variable) for variable in of_gates}
        weights = [variable for variable in model.trainable_variables if id(variable) not in known]
        moved = TrainingSettings(learning_rate=self.config.gate_learning_rate)
        groups = [Group("weights", weights, training), Group("gates", of_gates, moved)]
        fit(model, loss, data.rows, training, data.options, None, groups=groups)


class HardConcrete(keras.layers.Wrapper):
    """A layer whose kernel is multiplied by gates: drawn anew in each training step, in inference their estimate."""

    def __init__(self, layer: keras.layers.Layer, seed: int) -> None:
        super().__init__(layer, name=f"gated_{layer.name}")
        self._seed = seed

    def build(self, input_shape: Any) -> None:
        """Adds log α of each weight, and a count of draws, so that a resumed run draws on."""
        super().build(input_shape)
        shape = kernel_of(self.layer).shape
        self.log_alpha = self.add_weight("log_alpha", shape, initializer=keras.initializers.Constant(OPEN))
        self.draws = self.add_weight("draws", (), tf.int64, keras.initializers.Zeros(), trainable=False)

    def call(self, inputs: Any, training: Any = None) -> Any:
        """The layer's answer with a gated kernel."""
        gates = self._drawn() if training else self._estimated()
        with _kernel_replaced(self.layer, kernel_of(self.layer) * gates):
            return self.layer.call(inputs)

    def close_zeros(self) -> None:
        """Closes the gates of weights that are zero, for good: an earlier method made them so."""
        self.log_alpha.assign(tf.where(tf.equal(kernel_of(self.layer), 0), CLOSED, OPEN))

    def gated_kernel(self) -> tf.Tensor:
        """The kernel that inference reckons with."""
        return kernel_of(self.layer) * self._estimated()

    def _drawn(self) -> tf.Tensor:
        """Equations 10 and 11."""
        seed = tf.stack([tf.constant(self._seed, tf.int64), self.draws.assign_add(1)])
        even = tf.random.stateless_uniform(self.log_alpha.shape, seed, minval=1e-6, maxval=1 - 1e-6)
        logits = tf.math.log(even) - tf.math.log(1 - even) + self.log_alpha
        return _stretched(tf.sigmoid(logits / TEMPERATURE))

    def _estimated(self) -> tf.Tensor:
        """Equation 13."""
        return _stretched(tf.sigmoid(self.log_alpha))


def _stretched(gates: tf.Tensor) -> tf.Tensor:
    return tf.clip_by_value(gates * (HIGH - LOW) + LOW, 0.0, 1.0)


def _share_open(gates: list[HardConcrete]) -> tf.Tensor:
    """The expected share of weights whose gate is not zero: equation 12, divided by the number of weights."""
    shift = TEMPERATURE * math.log(-LOW / HIGH)
    expected = tf.stack([tf.reduce_sum(tf.sigmoid(gate.log_alpha - shift)) for gate in gates])
    return tf.reduce_sum(expected) / tf.cast(tf.add_n([tf.size(gate.log_alpha) for gate in gates]), tf.float32)


@contextlib.contextmanager
def _kernel_replaced(layer: keras.layers.Layer, kernel: tf.Tensor) -> Iterator[None]:
    """The layer reckons with another kernel while the context lasts.

    By way of its dictionary: setting the attribute would make Keras forget the variable.
    """
    variable = kernel_of(layer)
    name = next(name for name, value in vars(layer).items() if value is variable)
    vars(layer)[name] = kernel
    try:
        yield
    finally:
        vars(layer)[name] = variable
